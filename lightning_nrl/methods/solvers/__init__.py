"""Solvers: distillation, polish, last layer, quadratic programmes, whitened coordinates.

In: a problem and initial weights. Out: weights that break less, or the smallest change that meets
the constraints.
"""
