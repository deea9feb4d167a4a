"""Shared tools of all packages: ranks, precision, weights as tensors, time, files, names.

In: modules, tensors, values. Out: the same, or what was asked of them. Knows nothing of repairs.
"""
