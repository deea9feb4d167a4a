"""Repairs as quadratic programmes: the smallest change of weights under which margins are what is asked.

In: features or margin gradients of samples. Out: a change of weights, with its multipliers.
"""
