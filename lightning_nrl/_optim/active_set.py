"""The border between right and wrong: samples close to it, and rounds of small steps on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._optim.descent import BATCH, MOST, Descent, Teacher, deal, draw, measured, outputs
from lightning_nrl._utils.state import State, holding
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.problem import Problem

__all__ = ["RATE", "SAFE", "TYPICAL", "ActiveSet"]

TYPICAL = 8.0
"""The median margin of passed samples for which the numbers below are meant; they grow and shrink with it."""
SAFE = 1e-3
"""The margin without which a passed sample counts as broken, so that another batch size or device does not flip it."""
GOAL, RELATIVE_GOAL = 0.3, 0.5
"""Passed samples are pushed up to this margin, or to this part of the one they had, whichever is less."""
TARGET_GOAL = 0.1
"""Targets are pushed up to this margin; more would be paid for by passed samples."""
REACH = 0.3
"""Failing targets this close to being right are tried too."""
NEAR, FOLLOWED = 1.0, 2.0
"""Steps are on samples with a margin below NEAR; those below FOLLOWED are watched."""
REST = 8 * BATCH
"""Further passed samples, drawn once, that hold the model where it is."""
FOLLOW = 64 * BATCH
"""Followed samples at most, so that a round stays short however much is known."""
RATE = 5e-5
"""Of Adam. Each step moves what nobody looks at too, so small steps are better than few."""
FASTER, FASTEST = 1 / 8, 20.0
"""How much faster for each sample that is not right yet, while targets are insisted on, and at most: hundreds are out
of reach of small steps, and few are not worth large ones."""
FEW = 32
"""While more than these are not right, the margins that were seen on the way suffice to go on."""
STEPS = 8
"""In a round, at the least: few samples are gone through several times."""
HOLD = 5
PRESSURE, MOST_PRESSURE = 1.4, 1e3
"""What a broken sample's weight in the loss is multiplied with, round by round, until it is right, and what it becomes
at most: half precisions end at some 60,000."""


class ActiveSet:
    """Margins of all known samples as last measured, and the samples that are followed.

    A followed sample has a teacher: the given state where it is right, else the original model where that is.
    """

    def __init__(self, problem: Problem, state: State, after: SampleResults, insisted: Tensor) -> None:
        before = problem.before
        self.problem, self.state, self.insisted = problem, state, insisted
        self.unit = float(before.margin[before.passed].median()) / TYPICAL
        self.right = after.passed
        self.asked = before.margin.clamp(max=SAFE * max(1.0, self.unit))
        self.goal = (RELATIVE_GOAL * before.margin).clamp(RELATIVE_GOAL * 0.05 * self.unit, GOAL * self.unit)
        weight = before.weight.float()
        self.weight = torch.where(before.passed, 1.0, weight.clamp(max=MOST))
        # Failing targets that count more are tried from further away.
        self.reach = -self.unit * REACH * torch.where(before.targeted, weight.clamp(1, MOST), 1.0)
        self.pressure = torch.where(before.passed, weight.clamp(max=MOST), 1.0)
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.margin = _margins(after)
        # The given state where it is right, else the original model, which matters where that is right.
        self.teacher = Teacher(problem, (state, {}), (~self.right).long())
        self.followed = self._close()
        rest = (before.passed & ~self.followed).nonzero().flatten()
        self.followed[rest[torch.randperm(len(rest), generator=self.generator)[:REST]]] = True

    @property
    def broken(self) -> Tensor:
        """`N` bool: passed samples that do not have the margin that is asked of them."""
        return self.problem.before.passed & ~(self.margin >= self.asked)

    @property
    def open(self) -> Tensor:
        """`N` bool: broken samples, and targets insisted on that are not right yet."""
        return self.broken | (self.insisted & ~(self.margin >= SAFE * max(1.0, self.unit)))

    @property
    def hopeless(self) -> Tensor:
        """`N` bool: broken samples without a finite loss, which no step can mend and whose slopes would spoil all."""
        return self.broken & self.margin.isnan()

    def seen(self, after: SampleResults) -> None:
        """All margins measured again; samples that came close are followed from now on."""
        self.margin = _margins(after)
        self.followed |= self._close()

    def breaks(self, state: State, rows: Tensor) -> bool:
        """Whether passed samples, some rows of the evidence, do not have under a state what is asked of them."""
        self.margin = measured(self.problem, self.margin, self._look(state, rows))
        return bool(self.broken[rows].any())

    def steps(self, descent: Descent) -> None:
        """A round: steps on the samples near the border and as many others, then their margins again."""
        before = self.problem.before
        self.pressure[self.open] *= PRESSURE
        self.pressure.clamp_(max=MOST_PRESSURE)
        wanted = ~before.passed & (self.margin.abs() < self.unit * NEAR) & (self.margin > self.reach)
        wanted |= self.insisted & (self.margin < self.unit * NEAR)
        near = self.followed & ((before.passed & (self.margin < self.unit * NEAR)) | wanted)
        core, rest = near.nonzero().flatten(), (self.followed & ~near).nonzero().flatten()
        rest = rest[torch.randperm(len(rest), generator=self.generator)[: len(core)]]
        weight = self.weight * torch.where(before.passed | self.insisted, self.pressure, wanted.float())
        goal = torch.where(before.passed, self.goal, TARGET_GOAL * self.unit)
        table = torch.stack([weight, goal, (self.right | before.passed).float()], 1)
        found: list[tuple[Tensor, Tensor]] = []

        def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
            weight, goal, taught = table[rows].to(output.device).unbind(1)
            margin = self._margin(output, batch)
            found.append((rows, margin.detach()))
            kept = self.problem.task.divergence(output, self.teacher(batch, rows, output.shape), batch.target)
            return (weight * F.relu(goal - margin)).sum() + HOLD * (taught * kept).sum()

        ahead = int(self.open.sum()) if self.insisted.any() else 0
        rate = RATE * min(max(1.0, FASTER * ahead), FASTEST)
        rows = torch.cat([core, rest])
        self.teacher.prepare(rows)
        batches = deal(rows, self.generator)
        while 0 < len(batches) < STEPS:
            batches += deal(rows, self.generator)
        for parts in draw(self.problem, batches):
            descent.step(parts, loss, rate=rate)
        self.margin = measured(self.problem, self.margin, found)
        if not self.insisted.any() or int(self.open.sum()) <= FEW:
            self.margin = measured(self.problem, self.margin, self._look(descent.state(), core))

    def _close(self) -> Tensor:
        before, margin = self.problem.before, self.margin
        repaired = (self.right | before.targeted) & ~before.passed & (margin > self.reach)
        close = (before.passed & (margin < self.unit * FOLLOWED)) | (repaired & (margin < self.unit * FOLLOWED))
        rows = close.nonzero().flatten()
        first = torch.where(before.passed, margin, margin.abs())[rows].argsort(stable=True)[:FOLLOW]
        chosen = self.insisted.clone()
        chosen[rows[first]] = True
        return chosen

    @torch.no_grad()
    def _look(self, state: State, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows and margins of chosen samples of this rank's share under a state."""
        problem, found = self.problem, []
        with holding(problem.model, state):
            for parts in draw(problem, rows.split(BATCH) if len(rows) else ()):
                for batch, places in parts:
                    output = outputs(problem, batch)
                    finite = problem.task.loss(output, batch.target).isfinite()
                    found.append((places, torch.where(finite, self._margin(output, batch), torch.nan)))
        return found

    def _margin(self, output: Tensor, batch: Batch) -> Tensor:
        margin = self.problem.task.margin(output, batch.target)
        assert margin is not None
        return margin


def _margins(evidence: SampleResults) -> Tensor:
    """Margins, NaN where the loss is not finite, since that counts as wrong, and below 0 where a tie was lost."""
    margin = torch.where(evidence.passed, evidence.margin, evidence.margin.clamp(max=-SAFE))
    return torch.where(evidence.loss.isfinite(), margin, torch.nan)
