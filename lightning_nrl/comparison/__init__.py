"""Methods and baselines beside each other on one problem: `compare_module` runs them, `Comparison` shows them."""

from lightning_nrl.comparison.compare import Methods, compare_module, parse_methods
from lightning_nrl.comparison.comparison import Comparison, Duel, Entry, Point

__all__ = ["Comparison", "Duel", "Entry", "Methods", "Point", "compare_module", "parse_methods"]
