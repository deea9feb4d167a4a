"""Continues the training of a copy of a module.

In: a trainer, its module and the known data. Out: trained weights.
"""
