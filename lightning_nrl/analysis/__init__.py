"""Studies around a repair: diagnosis, comparison with baselines, and sweeps.

In: a trained model and its data. Out: a `Diagnosis`, `Comparison` or `SweepResult`; the model stays
unchanged.
"""
