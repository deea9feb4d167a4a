"""The default: strong proposals under hard constraints, then a swarm over localised weights that starts from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, ReplayError, check_kind
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.finetune_polish import FineTunePolish
from lightning_nrl.methods.linearized import Linearized
from lightning_nrl.methods.local_search import by_swarm
from lightning_nrl.methods.polish_weights import Polish
from lightning_nrl.problem import Problem, Solution, better
from lightning_nrl.report.stages import Step
from lightning_nrl.search import ParticleSwarm

__all__ = ["Auto"]

SHARE = 0.9
"""Of the time, what proposals may take; the rest is the swarm's."""


@dataclass(frozen=True)
class Auto:
    """Does what repairs most where it may change what it likes, and the best that is left where it may not.

    1. Proposals. Where the whole network, a block or several layers may change: training goes on and is polished
       (`FineTunePolish`). Where one last Linear may change, or there is no time for a fit: `Convex`. Where that does
       not apply: `Linearized`.
    2. The weights of the chosen layer that matter for the failures that are left are localised, and a swarm searches
       them from the proposals on, every known passed sample a constraint.

    In an update the targets were right under the replaced model: the proposal is a polish of the new one that brings
    them back (`Polish`). A task without margins is searched by the swarm alone.

    Attributes:
        swarm: settings of the swarm.

    Raises:
        ConfigurationError: on construction, if `swarm` is something else.
    """

    trains: ClassVar[bool] = True
    swarm: ParticleSwarm = field(default_factory=ParticleSwarm)

    def __post_init__(self) -> None:
        fits = isinstance(self.swarm, ParticleSwarm)
        check_kind("Auto.swarm", self.swarm, fits, "ParticleSwarm", "Auto(ParticleSwarm(particles=50))")

    def __call__(self, problem: Problem) -> Solution:
        """Runs the parts in order; the steps of all are kept.

        Raises:
            EmptyLocalizationError: the swarm alone can be used and has no weights to search.
        """
        if not bool(problem.before.margin.isfinite().all()):
            return by_swarm(problem, self.swarm)
        found = tuple(_proposals(problem))
        steps = tuple(step for solution in found for step in solution.steps)
        seeds = [p for solution in found for p in (solution.proposal, *solution.others) if p is not None]
        best = better(solution.proposal for solution in found)
        if best is None or best.broken:
            last = by_swarm(problem, self.swarm)
            chosen = better([best, last.proposal])
            reason = last.reason or " ".join(solution.reason for solution in found)
            return replace(last, proposal=chosen, reason=reason, steps=(*steps, *last.steps))
        try:
            last = by_swarm(problem, self.swarm, base=best.state, seeds=seeds)
        except (EmptyLocalizationError, ReplayError) as error:
            note = str(error).partition("\n")[0].rstrip(".")
            last = Solution(best, steps=(Step("swarm", best.repaired, best.broken, 0.0, f"not run: {note}"),))
        return replace(last, steps=(*steps, *last.steps), others=tuple(seeds))


def _proposals(problem: Problem) -> Iterator[Solution]:
    """What other methods find; those that do not suit the model are passed over."""
    if problem.update:
        yield Polish(share=SHARE)(problem)
        return
    one_layer = len(problem.space.sites) == 1 and set(problem.scope) <= _parameters(problem)
    if not one_layer:
        solution = FineTunePolish(SHARE)(problem)
        yield solution
        if not problem.whole or (solution.proposal is not None and solution.proposal.repaired):
            return
    for method in (Convex(), Linearized()) if one_layer else (Convex(),):
        try:
            solution = method(problem)
        except ConfigurationError:
            continue
        yield solution
        return


def _parameters(problem: Problem) -> set[str]:
    """Names of all parameters of the layer that is searched, its bias included."""
    site = problem.space.sites[0]
    prefix = f"{site.name}." if site.name else ""
    return {f"{prefix}{name}" for name, _ in site.module.named_parameters(recurse=False)}
