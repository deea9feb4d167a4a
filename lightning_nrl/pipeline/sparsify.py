"""A sparse patch: as few changed weights as possible for a given loss of repairs.

The weights that changed most are kept, all others go back to what they were. Ranking the changes by how sensitive
margins are to them, too, was no better at any size on the network that this was tried on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, changed, live_tensors
from lightning_nrl.methods import Problem, Proposal
from lightning_nrl.methods._solvers.polish import polish
from lightning_nrl.methods.budget import MAX_POLISHED_SIZES
from lightning_nrl.report.run_records import Step

SIZE_TOLERANCE = 1.1
"""The size is bisected until it is known up to this factor."""
GAIN_ROUNDING = 1e-9  # of sums of sample weights


def sparsify(problem: Problem, proposal: Proposal, loss: float) -> tuple[Proposal, Step]:
    """Looks for the fewest changed weights that keep most repairs and break no more known samples.

    The size is found by bisection, each time by a real count of the repairs, of which a share `loss` may go. Then what
    broke is polished away; in that the kept weights alone move. Buffers, such as the statistics of batch norm, stay as
    the patch has them. The proposal is given back if fewer weights do not do.
    """
    began = problem.clock.now()
    patch = _SortedPatch(problem, proposal.state)
    # As a decimal fraction: in binary, 70 % of 10 repairs would be less than 7.
    least: float = math.ceil((1 - Fraction(repr(float(loss)))) * proposal.repaired)
    if problem.before.weighted:
        least = (1 - loss) * proposal.gain - GAIN_ROUNDING
    polishes = not bool(problem.before.margin.isnan().all())
    best, size = proposal, patch.size
    tried, found = _smallest(patch, proposal, least, None if polishes else proposal.harm)
    before = 0.0
    for _ in range(MAX_POLISHED_SIZES if polishes else 1):
        if not 0 < tried < size or (polishes and patch.is_late()):
            break
        if polishes:
            found = patch.polished(tried)
        good = found.gain >= least and found.harm <= proposal.harm and found.missing <= proposal.missing
        if good:
            best, size = found, tried
        factor = 0.5 if good else 2.0
        if factor * before == 1:
            break
        tried, before = int(factor * tried), factor
    note = f"{size:,} of {patch.total:,} weights differ"
    note += f", {patch.size:,} before" if size < patch.size else "; fewer do not do"
    return best, best.step(problem.clock.now() - began, note)


def _smallest(patch: _SortedPatch, whole: Proposal, least: float, most_broken: float | None) -> tuple[int, Proposal]:
    """Bisects the logarithm of the size: repairs worth `least`, at most `most_broken` of known samples (None: any)."""
    low, high, best = 0, patch.size, whole
    while high > max(low + 1, SIZE_TOLERANCE * low) and not patch.is_late():
        middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
        found = patch.problem.propose("sparse", patch.state(middle))
        enough = found.gain >= least and found.missing <= whole.missing
        if enough and (most_broken is None or found.harm <= most_broken):
            high, best = middle, found
        else:
            low = middle
    return high, best


class _SortedPatch:
    """A patch taken apart: parameters that differ, each under one name, as they were and are, and buffers."""

    def __init__(self, problem: Problem, state: State) -> None:
        self.problem = problem
        live = live_tensors(problem.model)
        names = {id(parameter): name for name, parameter in problem.model.named_parameters()}
        different = changed(problem.model, state)
        self.new = {names[id(live[name])]: value for name, value in different.items() if id(live[name]) in names}
        self.old = {name: live[name].detach() for name in self.new}
        self.buffers = {name: value for name, value in different.items() if id(live[name]) not in names}

    @property
    def total(self) -> int:
        return sum(value.numel() for value in self.new.values())

    @cached_property
    def size(self) -> int:
        return sum(int((self.new[name] != self.old[name]).sum()) for name in self.new)

    @cached_property
    def order(self) -> Tensor:
        changes = [(self.new[name].float() - self.old[name].float()).abs().flatten() for name in self.new]
        return torch.cat(changes).argsort(descending=True, stable=True)

    def masks(self, size: int) -> dict[str, Tensor]:
        chosen = torch.zeros(self.total, dtype=torch.bool, device=self.order.device)
        chosen[self.order[:size]] = True
        parts = chosen.split([value.numel() for value in self.new.values()])
        return {name: part.view_as(self.new[name]) for name, part in zip(self.new, parts, strict=True)}

    def state(self, size: int) -> State:
        masks = self.masks(size)
        return self.buffers | {name: torch.where(masks[name], self.new[name], self.old[name]) for name in self.new}

    def polished(self, size: int) -> Proposal:
        masks = {name: mask for name, mask in self.masks(size).items() if mask.any()}
        problem = replace(self.problem, scope=tuple(masks))
        found = polish(problem, self.state(size), masks=masks, deadline=problem.deadline)
        return problem.counted("sparse", found.state, found.after)

    def is_late(self) -> bool:
        return self.problem.deadline_of_method().is_over()
