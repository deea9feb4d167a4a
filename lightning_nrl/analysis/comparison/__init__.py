"""Methods and baselines beside each other on one problem: `compare_module` runs them, `Comparison` shows them."""

from lightning_nrl.analysis.comparison.compare_module import Methods, compare_module, parse_methods
from lightning_nrl.analysis.comparison.comparison_result import Comparison, Duel, Entry, Point

__all__ = ["Comparison", "Duel", "Entry", "Methods", "Point", "compare_module", "parse_methods"]
