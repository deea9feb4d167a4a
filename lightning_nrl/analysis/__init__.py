"""Studies around a repair: diagnosis and comparison with baselines.

In: a trained model and its data. Out: a `Diagnosis` or `Comparison`; the model stays unchanged.
"""
