"""All imports from Lightning, from whichever of its two packages is used.

In: a trainer, a module or a callback of either. Out: classes that stand for both, and Lightning's private parts.
"""
