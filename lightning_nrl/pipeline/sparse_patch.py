"""Searches for a patch that changes fewer weights."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, changed, live_tensors
from lightning_nrl.methods import Problem, Proposal
from lightning_nrl.methods.budget import MAX_POLISHED_SIZES
from lightning_nrl.methods.solvers.polish import polish
from lightning_nrl.records import Step

SIZE_TOLERANCE = 1.1  # bisection ends when the size is known up to this factor
VALUE_ROUNDING = 1e-9  # allowance for rounding in sums of sample weights


def sparsify(problem: Problem, proposal: Proposal, loss: float) -> tuple[Proposal, Step]:
    """Searches for a patch that changes as few weights as possible and breaks no more samples.

    The patch keeps the largest weight changes of the proposal, and may lose a share `loss` of the
    repaired targets. Bisection finds how many changes to keep; each trial takes a pass over known
    data. Small steps of the kept weights then restore broken samples. Buffers, such as batch norm
    statistics, are those of the proposal. Returns the patch (or the proposal if fewer changes do
    not suffice) and the step for the report.
    """
    began = problem.clock.now()
    patch = _SortedPatch(problem, proposal.state)
    least_value = _least_value(problem, proposal, loss)
    best, best_size = proposal, patch.size
    if not problem.before.has_margins:
        # Without margins there is no polish.
        best_size, best = _smallest(patch, proposal, least_value, proposal.cost)
    else:
        size, _ = _smallest(patch, proposal, least_value, math.inf)
        last_factor = 0.0
        for _ in range(MAX_POLISHED_SIZES):
            if not 0 < size < best_size or patch.is_late():
                break
            trial = patch.polished(size)
            factor = 2.0
            if _repairs_enough(trial, proposal, least_value) and trial.cost <= proposal.cost:
                best, best_size = trial, size
                factor = 0.5
            if factor * last_factor == 1:
                break  # this size has been tried
            size = int(factor * size)
            last_factor = factor
    note = f"{best_size:,} of {patch.total:,} weights differ"
    if best_size < patch.size:
        note += f", {patch.size:,} before"
    else:
        note += "; fewer do not suffice"
    step = best.step(problem.clock.now() - began, note)
    if best is not proposal:
        step = replace(step, kind="sparse")
    return best, step


def _least_value(problem: Problem, proposal: Proposal, loss: float) -> float:
    if problem.before.weighted:
        return (1 - loss) * proposal.value - VALUE_ROUNDING
    # Exact arithmetic: in binary, (1 - 0.7) * 10 is slightly more than 3.
    return math.ceil((1 - Fraction(repr(float(loss)))) * proposal.repaired)


def _repairs_enough(trial: Proposal, proposal: Proposal, least_value: float) -> bool:
    return trial.value >= least_value and trial.missing <= proposal.missing


def _smallest(
    patch: _SortedPatch, proposal: Proposal, least_value: float, most_cost: float
) -> tuple[int, Proposal]:
    """Finds the fewest changes with repairs worth `least_value`, at a cost up to `most_cost`."""
    too_small = 0
    enough = patch.size
    best = proposal
    while enough > max(too_small + 1, SIZE_TOLERANCE * too_small) and not patch.is_late():
        # Sizes span orders of magnitude: geometric middle.
        middle = round(math.sqrt(max(too_small, 1) * enough))
        middle = min(max(middle, too_small + 1), enough - 1)
        trial = patch.problem.propose("sparse", patch.state(middle))
        if trial.cost <= most_cost and _repairs_enough(trial, proposal, least_value):
            enough = middle
            best = trial
        else:
            too_small = middle
    return enough, best


class _SortedPatch:
    """The parameters that a patch changes, with old and new values (tied ones once).

    `buffers` are the buffers that it changes.
    """

    def __init__(self, problem: Problem, state: State) -> None:
        self.problem = problem
        live = live_tensors(problem.model)
        names = {id(parameter): name for name, parameter in problem.model.named_parameters()}
        self.old: dict[str, Tensor] = {}
        self.new: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        for name, value in changed(problem.model, state).items():
            parameter = names.get(id(live[name]))
            if parameter is None:
                self.buffers[name] = value
            else:
                self.old[parameter] = live[name].detach()
                self.new[parameter] = value

    @property
    def total(self) -> int:
        return len(self.order)

    @cached_property
    def size(self) -> int:
        return sum(int((self.new[name] != self.old[name]).sum()) for name in self.new)

    @cached_property
    def order(self) -> Tensor:
        changes = [(self.new[name].float() - self.old[name].float()).flatten() for name in self.new]
        return torch.cat(changes).abs().argsort(descending=True, stable=True)

    def masks(self, size: int) -> dict[str, Tensor]:
        chosen = torch.zeros(self.total, dtype=torch.bool, device=self.order.device)
        chosen[self.order[:size]] = True
        masks = {}
        start = 0
        for name, value in self.new.items():
            masks[name] = chosen[start : start + value.numel()].view_as(value)
            start += value.numel()
        return masks

    def state(self, size: int) -> State:
        state = dict(self.buffers)
        for name, mask in self.masks(size).items():
            state[name] = torch.where(mask, self.new[name], self.old[name])
        return state

    def polished(self, size: int) -> Proposal:
        masks = {name: mask for name, mask in self.masks(size).items() if mask.any()}
        problem = replace(self.problem, scope=tuple(masks))
        result = polish(problem, self.state(size), masks=masks, deadline=problem.deadline)
        return problem.counted("sparse", result.state, result.after)

    def is_late(self) -> bool:
        return self.problem.deadline_of_method().is_over()
