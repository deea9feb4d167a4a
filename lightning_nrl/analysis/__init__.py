"""Studies around a repair: a diagnosis before it, baselines beside it, sweeps over many.

In: a trained model and its data. Out: a `Diagnosis`, `Comparison` or `SweepResult`; the model stays as it is.
"""
