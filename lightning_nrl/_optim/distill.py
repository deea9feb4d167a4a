"""Fit: distilled and mined steps that repair targets, for one layer, a block or a whole network as deployed.

Every known sample is trained on; passed samples are tied to what the original model says of them. Samples that are
right by a wide margin, before and now, are looked at less often.
"""

from __future__ import annotations

import math
import time
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._optim.descent import MOST, Descent, Teacher, deal, draw, measured
from lightning_nrl._utils.state import State
from lightning_nrl.data.batch import Batch
from lightning_nrl.problem import Problem

__all__ = ["fit"]

RATE, DECAY = 1e-3, 0.01
"""Of AdamW, falling to 0 along a cosine: the usual ones, which do not depend on the scale of the loss."""
VISITS = 16
"""Times that a sample is trained on, on average, if time allows; it still pays up to here."""
EMPHASIS = 3.0
"""How much more a target counts than another sample."""
HOLD = 5.0
"""How much a passed sample is held to what the original model says of it."""
EASY = 3 / 8
"""Samples with a margin above this part of the median of passed ones are easy, if they had it before too."""
SHARE = 0.25
"""The part of the easy samples that an epoch looks at."""
TIMED = 4
"""Steps that are timed, after a first one, to find how many there is time for."""


def fit(problem: Problem, *, seconds: float = math.inf) -> State:
    """Steps on known data, in evaluation mode, of the parameters in the problem's scope.

    Each is on the sum of `w loss + 5 v divergence(output, original output)` over a mini-batch, w = 3 v for targets and
    1 for others, the second term for passed samples only; v is the weight of the sample in the evidence, at most 10.

    Args:
        problem: the original model and what it does on known data. The task needs no margin; without one no sample is
            easy.
        seconds: how long it may take. How many steps there are is chosen by the time of the first ones, the same on
            every rank, and the schedule ends with them.

    Returns:
        The parameters of the scope; the original ones if there is no time for a step.
    """
    course = _Fit(problem, time.perf_counter() + seconds)
    rows = torch.arange(len(problem.before))
    while course.epoch(rows):
        rows = course.worth_a_look()
    return course.descent.state()


class _Fit:
    """A fit in progress.

    Attributes:
        margin: `N` float, of each sample as last seen, the same on every rank.
        seen: samples that were trained on so far, counted at each visit.
        planned: how many that will be.
    """

    def __init__(self, problem: Problem, deadline: float) -> None:
        before = problem.before
        self.problem, self.deadline = problem, deadline
        self.descent = Descent(problem, {}, partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY))
        self.teacher = Teacher(problem, ({},), torch.zeros(len(before), dtype=torch.int64))
        self.generator = torch.Generator().manual_seed(problem.seed)
        weight = before.weight.float().clamp(max=MOST)
        pull = torch.where(before.targeted, EMPHASIS * weight, 1.0)
        self.weights = torch.stack([pull, HOLD * before.passed.float() * weight], 1)
        self.wide = EASY * float(before.margin[before.passed].median()) if before.passed.any() else math.inf
        self.margin = before.margin.clone()
        self.seen, self.planned = 0, VISITS * len(before)

    def epoch(self, rows: Tensor) -> bool:
        """Steps on these rows in random order; whether there is time for another epoch."""
        batches = deal(rows, self.generator)
        found: list[tuple[Tensor, Tensor]] = []
        start, began = self.seen, time.perf_counter()
        for number, (batch, parts) in enumerate(zip(batches, draw(self.problem, batches), strict=True)):
            if number == 1 and not start:
                # The first step also warms up.
                start, began = self.seen, time.perf_counter()
            if number == 1 + TIMED:
                self._plan(start, began)
            if self.seen >= self.planned or self._is_late():
                return False
            progress = self.seen / self.planned
            self.descent.step(parts, partial(self._loss, found), rate=RATE * (1 + math.cos(math.pi * progress)) / 2)
            self.seen += len(batch)
        self.margin = measured(self.problem, self.margin, found)
        self._plan(start, began)
        self._tell()
        return self.seen < self.planned

    def worth_a_look(self) -> Tensor:
        """Rows for the next epoch: all but the easy ones, and a random part of these."""
        easy = (self.margin > self.wide) & (self.problem.before.margin > self.wide)
        return (~easy | (torch.rand(len(easy), generator=self.generator) < SHARE)).nonzero().flatten()

    def _loss(self, found: list[tuple[Tensor, Tensor]], batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
        task = self.problem.task
        margin = task.margin(output.detach(), batch.target)
        if margin is not None:
            found.append((rows, margin))
        weight, hold = self.weights[rows].to(output.device).unbind(1)
        kept = task.divergence(output, self.teacher(batch, rows, output.shape), batch.target)
        return (weight * task.loss(output, batch.target)).sum() + (hold * kept).sum()

    def _plan(self, start: int, began: float) -> None:
        """How many samples there is time for, by the pace since then; the first rank's answer."""
        now = time.perf_counter()
        if math.isfinite(self.deadline) and self.seen > start:
            more = max(0.0, self.deadline - now) * (self.seen - start) / (now - began)
            planned = min(VISITS * len(self.margin), self.seen + int(more))
            self.planned = max(1, int(self.problem.collective.agreed(torch.tensor(planned))))

    def _is_late(self) -> bool:
        return math.isfinite(self.deadline) and self.problem.collective.any(time.perf_counter() > self.deadline)

    def _tell(self) -> None:
        before, passes = self.problem.before, self.margin > 0
        broken = before.passed & ~passes & ~self.margin.isnan()
        self.problem.clock.tell(
            min(self.seen, self.planned), self.planned, int((before.targeted & passes).sum()), int(broken.sum())
        )
