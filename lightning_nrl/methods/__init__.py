"""How new weights are found: one method a file, each a problem in and a solution out."""

from __future__ import annotations

from lightning_nrl.errors import ConfigurationError, check_choice, explain
from lightning_nrl.methods.constrained import Constrained
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.linearised import Linearised
from lightning_nrl.methods.polishing import Polish
from lightning_nrl.methods.strongest import Strongest
from lightning_nrl.methods.swarm import by_swarm
from lightning_nrl.problem import Method, Problem, Proposal, Solution, Step, Training, better
from lightning_nrl.search import ParticleSwarm

__all__ = [
    "METHODS",
    "Constrained",
    "Convex",
    "Linearised",
    "Method",
    "Polish",
    "Problem",
    "Proposal",
    "Solution",
    "Step",
    "Strongest",
    "Training",
    "better",
    "parse_method",
    "solve",
]

METHODS: dict[str, type] = {
    "auto": Strongest,
    "constrained": Constrained,
    "convex": Convex,
    "linearised": Linearised,
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
