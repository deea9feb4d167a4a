"""Distilled fits, polishes with an active set, whitened layers, quadratic programmes.

In: a problem and weights to start from. Out: weights that break less, or the smallest change that does what is asked.
"""
