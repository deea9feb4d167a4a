"""Repair methods, one per file.

In: a `Problem`. Out: a `Solution`. `solve` runs a method; it wraps a searcher in a `LocalSearch`.
To add a method, write a frozen dataclass that inherits from `Method`, and register it below.
"""

from dataclasses import replace

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.evaluator import check_needs
from lightning_nrl.methods.auto import Auto
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.finetune_polish import FineTunePolish
from lightning_nrl.methods.local_search import LocalSearch
from lightning_nrl.methods.lora import Lora
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.polish_weights import Polish
from lightning_nrl.methods.problem import Problem, Trained, Training
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.search import SEARCHERS, Searcher

AnyMethod = Method | Searcher
"""A method, or a searcher, which `solve` runs as a `LocalSearch`."""

METHODS: Registry[AnyMethod] = Registry(
    "method",
    "the name of one, or an object such as ParticleSwarm()",
    lambda value: isinstance(value, (Method, Searcher)),
    include=(SEARCHERS,),
    on_demand={
        "apricot": "lightning_nrl.published:Apricot",
        "merged": "lightning_nrl.published:MergedRepairs",
        "neurecover-lite": "lightning_nrl.published.bundles:neurecover_lite",
        "neurecover": "lightning_nrl.published.bundles:neurecover",
        "arachne": "lightning_nrl.published.bundles:arachne",
        "arachne-de": "lightning_nrl.published.bundles:arachne_de",
    },
    group="methods",
)
"""The methods by name. A name stands for a method with its default settings."""

METHODS.register("auto")(Auto)
METHODS.register("finetune-polish")(FineTunePolish)
METHODS.register("convex")(Convex)


def with_lora(method: AnyMethod, lora: Lora) -> FineTunePolish:
    """Returns `finetune-polish` with adapters, which `auto` stands for, too."""
    if isinstance(method, Auto):
        return FineTunePolish(lora=lora)
    if not isinstance(method, FineTunePolish):
        raise ConfigurationError(
            f"`lora={lora!r}`: {type(method).__name__} changes whole weights, not adapters.",
            "leave `method` out, or write `method='finetune-polish'`.",
        )
    return replace(method, lora=lora)


def solve(method: AnyMethod, problem: Problem) -> Solution:
    """Runs a method on a problem; raises a `ConfigurationError` if it returns no `Solution`."""
    solver = LocalSearch(method) if isinstance(method, Searcher) else method
    check_needs(solver.needs, problem.before, problem.evaluator.task)
    solution = solver(problem)
    if not isinstance(solution, Solution):
        kind = type(solution).__name__
        raise ConfigurationError(
            f"`method`: {type(method).__name__} returned a {kind} instead of a `Solution`.",
            "return `Solution(proposal)`, "
            "or `Solution(None, reason)` if no better weights were found.",
        )
    return solution


__all__ = [
    "METHODS",
    "AnyMethod",
    "Auto",
    "Convex",
    "FineTunePolish",
    "LocalSearch",
    "Method",
    "Polish",
    "Problem",
    "Proposal",
    "Solution",
    "Trained",
    "Training",
    "better",
    "solve",
]
