"""Shared tools: ranks, precision, weights as tensors, time, files, names.

In: modules, tensors, values. Out: the same, without any knowledge of repairs.
"""
