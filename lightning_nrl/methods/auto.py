"""The default: proposals under hard constraints first, then a local search that starts from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from lightning_nrl._utils.out_of_memory import is_out_of_memory
from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, ReplayError, check_kind
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.finetune_polish import FineTunePolish
from lightning_nrl.methods.linearized import Linearized
from lightning_nrl.methods.local_search import LocalSearch
from lightning_nrl.methods.polish_weights import Polish
from lightning_nrl.methods.warm_start import warm_started_search
from lightning_nrl.problem import Problem, Proposal, Solution, better
from lightning_nrl.report.run_records import Step
from lightning_nrl.search import ParticleSwarm, Searcher

__all__ = ["Auto"]

PROPOSAL_TIME_SHARE = 0.9
"""Of the time, what proposals may take; the rest is the local search's."""


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
        swarm: the searcher of the second part, a swarm or another one.

    Raises:
        ConfigurationError: on construction, if `swarm` is no searcher.
    """

    trains: ClassVar[bool] = True
    swarm: ParticleSwarm | Searcher[Any] = field(default_factory=ParticleSwarm)

    def __post_init__(self) -> None:
        fits = isinstance(self.swarm, Searcher)
        check_kind("Auto.swarm", self.swarm, fits, "searcher", "Auto(ParticleSwarm(particles=50))")

    def __call__(self, problem: Problem) -> Solution:
        """Runs the parts in order; the steps of all are kept.

        Raises:
            EmptyLocalizationError: the local search alone can be used and has no weights to search.
        """
        if not bool(problem.before.margin.isfinite().all()):
            return LocalSearch(self.swarm)(problem)
        solutions = tuple(_solutions(problem))
        steps = tuple(step for solution in solutions for step in solution.steps)
        proposals = [p for solution in solutions for p in (solution.proposal, *solution.others) if p is not None]
        best = better(solution.proposal for solution in solutions)
        if best is None or best.broken:
            last = LocalSearch(self.swarm)(problem)
            chosen = better([best, last.proposal])
            reason = last.reason or " ".join(solution.reason for solution in solutions)
            return replace(last, proposal=chosen, reason=reason, steps=(*steps, *last.steps))
        try:
            last = warm_started_search(problem, self.swarm, proposals, base=best.state)
        except (EmptyLocalizationError, ReplayError) as error:
            last = _without_search(best, str(error).partition("\n")[0].rstrip("."))
        except (RuntimeError, MemoryError) as error:
            # Of several ranks the others would wait for this one for ever.
            if problem.collective.world_size > 1 or not is_out_of_memory(error):
                raise
            last = _without_search(best, "out of memory")
        return replace(last, steps=(*steps, *last.steps), others=tuple(proposals))


def _without_search(best: Proposal, reason: str) -> Solution:
    """The best proposal as it is, with a line for the report."""
    return Solution(best, steps=(Step("swarm", best.repaired, best.broken, 0.0, f"not run: {reason}"),))


def _solutions(problem: Problem) -> Iterator[Solution]:
    """What other methods give; those that do not suit the model are passed over."""
    if problem.update:
        yield Polish(share=PROPOSAL_TIME_SHARE)(problem)
        return
    one_layer = len(problem.space.sites) == 1 and set(problem.scope) <= _layer_parameters(problem)
    if not one_layer:
        solution = FineTunePolish(PROPOSAL_TIME_SHARE)(problem)
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


def _layer_parameters(problem: Problem) -> set[str]:
    """Names of all parameters of the layer that is searched, its bias included."""
    site = problem.space.sites[0]
    prefix = f"{site.name}." if site.name else ""
    return {f"{prefix}{name}" for name, _ in site.module.named_parameters(recurse=False)}
