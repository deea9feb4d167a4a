"""Methods and baselines beside each other on one problem.

In: a module, known and unseen data, and names of methods. Out: a `Comparison`: what each method repairs and breaks at
several strengths, as data, a page and a figure.
"""

from lightning_nrl.analysis.comparison.compare_models import Methods, compare_module, parse_methods
from lightning_nrl.analysis.comparison.comparison_result import Comparison, CurvePoint, Entry, HeadToHead

__all__ = [
    "Comparison",
    "CurvePoint",
    "Entry",
    "HeadToHead",
    "Methods",
    "compare_module",
    "parse_methods",
]
