"""What this package takes from Lightning, of whichever of its two packages a user has.

In: a trainer, a module or a callback of either. Out: classes that stand for both, and Lightning's private parts.
"""
