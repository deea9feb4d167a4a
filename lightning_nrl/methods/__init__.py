"""How new weights are found: one method a file, each a problem in and a solution out."""

from __future__ import annotations

from lightning_nrl.errors import ConfigurationError, check_choice, explain
from lightning_nrl.methods.auto import Auto
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.finetune_polish import FineTunePolish
from lightning_nrl.methods.linearized import Linearized
from lightning_nrl.methods.local_search import by_swarm
from lightning_nrl.methods.polish_weights import Polish
from lightning_nrl.problem import Method, Problem, Proposal, Solution, Training, better
from lightning_nrl.report.stages import Step
from lightning_nrl.search import ParticleSwarm

__all__ = [
    "METHODS",
    "Auto",
    "Convex",
    "FineTunePolish",
    "Linearized",
    "Method",
    "Polish",
    "Problem",
    "Proposal",
    "Solution",
    "Step",
    "Training",
    "better",
    "parse_method",
    "solve",
]

METHODS: dict[str, type] = {
    "auto": Auto,
    "finetune-polish": FineTunePolish,
    "convex": Convex,
    "linearized": Linearized,
    "swarm": ParticleSwarm,
}
"""The methods that can be named, with their default settings."""


def parse_method(method: str | Method | ParticleSwarm) -> Method | ParticleSwarm:
    """Reads a method from its name; a method is given back as it is.

    Raises:
        ConfigurationError: there is no method of that name, or the value is none.
    """
    if isinstance(method, str):
        check_choice("method", method, tuple(METHODS))
        made: Method | ParticleSwarm = METHODS[method]()
        return made
    if isinstance(method, type) or not (isinstance(method, ParticleSwarm) or callable(method)):
        found = f"the class {method.__name__}" if isinstance(method, type) else f"a {type(method).__name__}"
        raise ConfigurationError(
            explain(f"`method` is {found}.", f"name one of {list(METHODS)}, or give an object such as ParticleSwarm().")
        )
    return method


def solve(method: Method | ParticleSwarm, problem: Problem) -> Solution:
    """Runs a method on a problem.

    Raises:
        ConfigurationError: a method of the user's own gave something else than a solution.
    """
    found = by_swarm(problem, method) if isinstance(method, ParticleSwarm) else method(problem)
    if not isinstance(found, Solution):
        raise ConfigurationError(
            explain(
                f"`method`: {type(method).__name__} gave a {type(found).__name__}, not a solution.",
                "return `Solution(proposal)`, or `Solution(None, reason)` where there is none.",
            )
        )
    return found
