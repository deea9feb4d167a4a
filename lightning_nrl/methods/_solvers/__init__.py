"""Solvers: distilled fits, polishes with an active set, whitened layers, quadratic programmes.

In: a problem and weights to start from, or features and margin gradients of samples. Out: weights, or the smallest
change of weights that does what is asked; the live model stays as it is.
"""
