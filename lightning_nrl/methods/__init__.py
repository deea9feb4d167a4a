"""How new weights are found: one method a file.

In: a `Problem`. Out: a `Solution`. `solve` runs a method or a searcher; `METHODS` has those that can be named. A new
method is one file with a frozen dataclass that is called with a problem, and a line in `method_registry.py`.
"""

from lightning_nrl.methods.apricot import Apricot
from lightning_nrl.methods.auto import Auto
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.finetune_polish import FineTunePolish
from lightning_nrl.methods.linearized import Linearized
from lightning_nrl.methods.local_search import LocalSearch
from lightning_nrl.methods.merged_repairs import MergedRepairs
from lightning_nrl.methods.method_registry import METHODS, AnyMethod, solve
from lightning_nrl.methods.polish_weights import Polish
from lightning_nrl.methods.problem import Method, Problem, Training
from lightning_nrl.methods.published_methods import BUNDLES, bundle
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.methods.warm_start import warm_started_search

__all__ = [
    "BUNDLES",
    "METHODS",
    "AnyMethod",
    "Apricot",
    "Auto",
    "Convex",
    "FineTunePolish",
    "Linearized",
    "LocalSearch",
    "MergedRepairs",
    "Method",
    "Polish",
    "Problem",
    "Proposal",
    "Solution",
    "Training",
    "better",
    "bundle",
    "solve",
    "warm_started_search",
]
