"""Studies around a repair: a diagnosis before it, baselines beside it, a sweep over many of them.

In: a model and its data. Out: `Diagnosis`, `Comparison`, `SweepResult`. No live weight is changed.
"""
