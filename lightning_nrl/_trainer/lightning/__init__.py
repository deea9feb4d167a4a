"""All imports from Lightning's two packages.

In: a trainer, a module or a callback of either. Out: classes that cover both, and access to private parts.
"""
