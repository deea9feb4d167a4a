"""Distilled fits, active-set polishes, layer whitening, quadratic programmes.

In: a problem and initial weights. Out: weights that break less, or the smallest change that meets the constraints.
"""
