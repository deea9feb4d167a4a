"""Tools that know nothing of repairs: ranks, precision, tensors, time, files, JSON, registries.

In: modules, tensors and plain values. Out: modules, tensors, plain values and files.
"""
