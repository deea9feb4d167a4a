"""Fine-tunes layers or a whole network, and holds passed samples to the original model's outputs.

Trains in evaluation mode on every known sample. Easy samples, which are right by a wide margin both
before the repair and at present, are skipped in most epochs.
"""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.data import Batch
from lightning_nrl.errors import DeviceMemoryError, RepairWarning
from lightning_nrl.methods.budget import PACE_STEPS
from lightning_nrl.methods.problem import Problem, Trained
from lightning_nrl.methods.solvers.descent import MAX_SAMPLE_WEIGHT, Descent
from lightning_nrl.methods.solvers.mini_batches import (
    BATCH_SIZE,
    load_batches,
    merge_measurements,
    shuffled_batches,
)
from lightning_nrl.methods.solvers.teacher import DISTILLATION_WEIGHT, Teacher

DISTILL_RATE = 1e-3  # of AdamW at first, at most; falls to 0 along a cosine
MOST_MOVED_BY_TRAINING = 0.1  # by the first step of an epoch, see `Descent.limited_step`
WEIGHT_DECAY = 0.01  # of AdamW, torch's default
TARGET_EMPHASIS = 3.0  # weight of a target's loss relative to that of other samples
# Samples with a larger margin, relative to the median margin of passed samples, are easy.
EASY_MARGIN = 3 / 8
EASY_FRACTION = 0.25  # share of the easy samples that an epoch visits


def distill(
    problem: Problem,
    *,
    start: State,
    epochs: int,
    deadline: Deadline,
    weight: Tensor,
) -> Trained:
    """Trains the parameters in the problem's scope on known data, from the values in `start`.

    The loss of a step is a sum over samples, with sample weights v of at most 10: `3 v loss` for a
    target, `loss + 5 v divergence` for a passed sample, `loss` for any other. `divergence` is from
    the original model's output.

    Samples whose `weight`, `N`, is 0 are left out; other values of `weight` have no effect. Under a
    deadline, the pace of the first steps decides how many steps are made. The learning rate falls
    to 0 over all steps. If a single sample exceeds the memory, `distill` warns and returns the
    weights so far.
    """
    used = weight > 0
    run = _Distillation(problem, start, epochs, deadline, used)
    rows = used.nonzero().flatten()
    try:
        while run.epoch(rows):
            rows = run.hard_and_some_easy()
    except DeviceMemoryError as error:
        warnings.warn(
            RepairWarning(
                f"the training stopped after {run.visits:,} samples: {error}",
                "the repair goes on with the weights trained so far.",
            ),
            stacklevel=3,
        )
    n = len(problem.before)
    planned = run.most if run.deadline.is_set else run.visits
    return Trained(run.descent.state(), run.visits / n, planned / n)


def trusted_rate(problem: Problem, rate: float) -> float:
    """Returns a rate of AdamW, at most `rate`, with a first step of `MOST_MOVED_BY_TRAINING`."""
    rows = (problem.used & problem.before.targeted).nonzero().flatten()[:BATCH_SIZE]
    run = _Distillation(problem, {}, 1, Deadline(), problem.used)
    for parts in load_batches(problem, [rows]):
        run.descent.limited_step(parts, run.loss, rate=rate, most=MOST_MOVED_BY_TRAINING)
    return rate * run.descent.trust


class _Distillation:
    def __init__(
        self, problem: Problem, start: State, epochs: int, deadline: Deadline, used: Tensor
    ) -> None:
        before = problem.before
        self.problem = problem
        self.deadline = deadline
        self.used = used
        self.descent = Descent(
            problem, start, partial(torch.optim.AdamW, lr=DISTILL_RATE, weight_decay=WEIGHT_DECAY)
        )
        self._teacher = Teacher(problem)
        self._generator = torch.Generator().manual_seed(problem.seed)
        weight = before.weight.float().clamp(max=MAX_SAMPLE_WEIGHT)
        of_loss = torch.where(before.targeted, TARGET_EMPHASIS * weight, 1.0)
        of_divergence = DISTILLATION_WEIGHT * before.passed.float() * weight
        self._weights = torch.stack([of_loss, of_divergence], 1).to(problem.device)
        self._easy = EASY_MARGIN * before.margin_unit if before.passed.any() else math.inf
        self.margin = before.margin.clone()
        self._measured: list[tuple[Tensor, Tensor]] = []
        self.visits = 0
        self.planned = self.most = epochs * len(before)

    def epoch(self, rows: Tensor) -> bool:
        """Trains on `rows` in random order. Returns False if the training is over."""
        batches = shuffled_batches(rows, self._generator)
        self._measured = []
        is_first = not self.visits
        self._start_timing()
        for number, (batch, parts) in enumerate(
            zip(batches, load_batches(self.problem, batches), strict=True)
        ):
            if number == 1 and is_first:
                self._start_timing()  # the first step is slower
            if number == 1 + PACE_STEPS:
                self._plan()
            if self.visits >= self.planned or self.deadline.is_over():
                return False
            cosine = math.cos(math.pi * (self.visits / self.planned))
            rate = DISTILL_RATE * (1 + cosine) / 2
            if number == 0:
                self.descent.limited_step(parts, self.loss, rate=rate, most=MOST_MOVED_BY_TRAINING)
            else:
                self.descent.step(parts, self.loss, rate=rate)
            self.visits += len(batch)
        self.margin = merge_measurements(self.problem, self.margin, self._measured)
        self._plan()
        before = self.problem.before
        n_broken = int((before.passed & (self.margin <= 0)).sum())
        n_repaired = int((before.targeted & (self.margin > 0)).sum())
        self.problem.clock.tell(min(self.visits, self.planned), self.planned, n_repaired, n_broken)
        return self.visits < self.planned

    def hard_and_some_easy(self) -> Tensor:
        easy = (self.margin > self._easy) & (self.problem.before.margin > self._easy)
        is_drawn = ~easy | (torch.rand(len(easy), generator=self._generator) < EASY_FRACTION)
        return (is_drawn & self.used).nonzero().flatten()

    def loss(self, batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
        task = self.problem.evaluator.task
        margin = task.margin(output.detach(), batch.target)
        if margin is not None:
            self._measured.append((rows, margin))
        weights = self._weights[rows.to(self._weights.device, non_blocking=True)]
        of_loss, of_divergence = weights.to(output.device).unbind(1)
        divergence = task.divergence(output, self._teacher(batch, rows, output.shape), batch.target)
        loss = task.loss(output, batch.target)
        return (of_loss * loss).sum() + (of_divergence * divergence).sum()

    def _start_timing(self) -> None:
        self._timed_visits = self.visits
        self._timed_since = self.deadline.clock()

    def _plan(self) -> None:
        """Under a deadline, plans as many visits as fit in at the pace measured."""
        visits = self.visits - self._timed_visits
        if not self.deadline.is_set or not visits:
            return
        seconds_left = max(0.0, self.deadline.seconds_left)
        more = seconds_left * visits / (self.deadline.clock() - self._timed_since)
        planned = min(self.most, self.visits + int(more))
        self.planned = max(1, int(self.problem.collective.agreed(torch.tensor(planned))))
