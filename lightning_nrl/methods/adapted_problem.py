"""Solves a problem by moving low-rank adapters instead of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lightning_nrl._utils.state import State
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.methods.known_record import KnownRecord
from lightning_nrl.methods.lora import AttachedLayers, Lora, LoraAdapter
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal, Solution


@dataclass(frozen=True)
class AdaptedProblem(Problem):
    """A problem that changes only the adapters attached to its model.

    All counts are those of the merged weights, without adapters: they are what is deployed.
    """

    layers: AttachedLayers = field(kw_only=True)

    def evaluate(self, state: State) -> SampleResults:
        merged = self.layers.merged(state)
        with self.layers.detached():
            return super().evaluate(merged)

    def propose(self, name: str, state: State) -> Proposal:
        # Training may also have moved buffers, such as statistics of batch norm.
        return super().propose(name, self.layers.of(state))


def solve_with_adapters(
    problem: Problem, lora: Lora, solve: Callable[[Problem], Solution]
) -> Solution:
    """Solves the problem by adapters of this rank or `LoraConfig`, and merges them."""
    adapter = LoraAdapter.configured(lora, problem.model, problem.scope)
    with adapter.attached(problem.model, problem.seed) as layers:
        fields = {**vars(problem), "scope": layers.scope, "record": KnownRecord()}
        solution = solve(AdaptedProblem(**fields, layers=layers))
        proposal = solution.proposal
        if proposal is None:
            return solution
        adapter = replace(adapter, state=layers.of(proposal.state))
        merged = replace(proposal, state=layers.merged(proposal.state))
    return replace(solution, proposal=merged, adapter=adapter)
