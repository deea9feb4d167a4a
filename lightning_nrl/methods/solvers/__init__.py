"""Solvers of the methods: distillation, polish, last layer, quadratic programmes, scaled
coordinates.

In: a problem and initial weights. Out: weights that break less, or the smallest change that meets
the constraints.
"""
