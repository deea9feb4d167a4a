"""All imports from Lightning's two packages.

In: a trainer, a module or a callback of either package. Out: classes for both packages, and access
to private parts.
"""
