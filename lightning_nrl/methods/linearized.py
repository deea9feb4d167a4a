"""Repairs any layers by linearised margins.

It linearises, solves, evaluates and steps in turn, and never trains. To first order, a sample's
margin is linear in the weights of any layer. A round takes the gradients of some margins at the
present weights and solves for the step x,

    min over x 1/2 |x|^2 + price * (missing of targets + PASSED_PRICE_FACTOR * missing of passed
    samples).

Coordinates are scaled so that |x| measures how far the step moves the layers' outputs on passed
data. `missing` sums how far margins stay below the required margins. The deployed model evaluates
each step on all known data. If a step breaks something, the round solves again, with margins
corrected by the error of their prediction (second-order correction, as in sequential quadratic
programming). A step that breaks nothing and repairs more is kept. Samples that came near the
boundary join the next round.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.evaluation.evaluator import Need
from lightning_nrl.methods.budget import FIRST_ROUND_PASSES, MAX_LINEARIZATIONS
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import nearest
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.methods.solvers.active_set import REFERENCE_MARGIN, SAFETY_MARGIN
from lightning_nrl.methods.solvers.convex_head import KEPT_MARGIN_RATIO
from lightning_nrl.methods.solvers.qp import solve_dual
from lightning_nrl.methods.solvers.whitening import fit_whitening, margin_gradients
from lightning_nrl.records.steps import CUT, Step

# Upper limit of a passed sample's required margin, and a target's required margin, in units of the
# median margin of passed data. Both are larger than in `Convex`, since gradients only approximate
# margins.
MAX_KEPT_MARGIN_OF_LAYERS = 0.2
TARGET_MARGIN_OF_LAYERS = 0.2
MAX_STALLED_LINEARIZATIONS = 2  # rounds in a row without a better proposal
# Samples of one programme, at most half of them targets. Time grows with the square of this.
MAX_ROWS = 1000
# Samples x weights, half a GiB in float32. In larger layers only some weights change.
MAX_PROGRAMME_ENTRIES = 2**27
CORRECTIONS = 2  # further solutions of a round, corrected by the error of the prediction
STEP_FRACTIONS = (0.5, 0.25)  # of the step, tried if the whole step breaks something
REGRESSION_COST = 3  # weighs broken samples against repairs if all steps of a round break something
# Price of a passed sample's missing margin, relative to a target's. It is finite, so that there is
# a solution even if samples are broken or gradients contradict each other.
PASSED_PRICE_FACTOR = 1e3
RADIUS_GROWTH = 2.0  # if the whole step broke nothing
RADIUS_SHRINKAGE = 0.25  # if all steps broke something


@dataclass(frozen=True)
class Linearized(Method):
    """Repairs any Linear or convolution layers without breaking a known passed sample.

    It takes a few dozen forward passes. Each step is computed from the gradients of the margins of
    targets and of passed samples near the boundary. By these gradients, the step gives targets a
    fixed margin if possible. Passed samples keep half of their margin, or the fixed margin if that
    is less. Of all such steps, the smallest is taken: it changes the layers' outputs on passed data
    least, in the mean square. A step that breaks a known sample is corrected or shortened.
    """

    needs: ClassVar[tuple[Need, ...]] = ("margins",)

    def __call__(self, problem: Problem) -> Solution:
        """Steps from the original weights.

        Raises a `ConfigurationError` if there are no margins or gradients.
        """
        clock = problem.clock
        deadline = problem.deadline_of_method()
        seconds = FIRST_ROUND_PASSES * clock.one_pass
        if not deadline.leaves(seconds):
            return Solution(
                None,
                f"no time was left for a repair after {clock.elapsed:.1f} s; raise `max_time`.",
            )
        with clock.stage("linearize"):
            run = _TrustRegionSteps(problem)
        while not run.is_done and deadline.leaves(seconds):
            began = time.perf_counter()
            if not run.round():
                return Solution(
                    None, "the margins of the targets do not depend on the layer's weights."
                )
            seconds = time.perf_counter() - began
        if run.steps and not run.is_done:
            last = run.steps[-1]
            run.steps[-1] = replace(last, note=f"{last.note}; {CUT}", was_cut=True)
        if not run.proposals:
            return Solution(
                None,
                "no step along the gradients repairs a target without a regression.",
                run.steps,
            )
        *earlier, proposal = run.proposals
        return Solution(proposal, steps=run.steps, alternatives=earlier)


@dataclass(frozen=True)
class _Try:
    proposal: Proposal
    change: Tensor  # K, of the original weights, in scaled coordinates
    is_clean: bool  # True if it breaks nothing, even at another batch size

    @property
    def worth(self) -> float:
        return self.proposal.value - REGRESSION_COST * self.proposal.cost


class _TrustRegionSteps:
    """Steps from the original weights.

    Each of `proposals` breaks nothing and is better than the proposal before.
    """

    def __init__(self, problem: Problem) -> None:
        before = problem.before
        self.problem = problem
        entries = MAX_PROGRAMME_ENTRIES
        if problem.memory_limit is not None:
            entries = min(entries, problem.memory_limit // 8)
        self.whitening = fit_whitening(problem, max(1, entries // min(MAX_ROWS, len(before))))
        unit = before.margin_unit
        kept = (KEPT_MARGIN_RATIO * before.margin).clamp(max=MAX_KEPT_MARGIN_OF_LAYERS * unit)
        kept = kept.nan_to_num(0.0)
        self.required = torch.where(before.targeted, TARGET_MARGIN_OF_LAYERS * unit, kept)
        # Margins that an accepted step must keep: less than the required margins, which a step may
        # miss by rounding.
        safe = SAFETY_MARGIN * max(1.0, unit / REFERENCE_MARGIN)
        self.least = (kept / 2).clamp(max=max(safe, problem.rounding))
        self.after = before  # results of the present weights
        self.closest = before.margin  # smallest margin of each sample at any weights tried
        self.change = torch.zeros(self.whitening.size)  # to the present weights
        self.radius = torch.inf
        self.price = 0.0
        self.proposals: list[Proposal] = []
        self.steps: list[Step] = []
        self.n_stalled = 0

    @property
    def is_done(self) -> bool:
        if len(self.steps) >= MAX_LINEARIZATIONS or self.n_stalled >= MAX_STALLED_LINEARIZATIONS:
            return True
        return self._n_repaired >= int(self.problem.before.targeted.sum())

    @property
    def _n_repaired(self) -> int:
        return self.proposals[-1].repaired if self.proposals else 0

    def round(self) -> bool:
        """Linearises, solves and makes a step.

        Returns False if no target's margin depends on the weights.
        """
        began = time.perf_counter()
        clock = self.problem.clock
        with clock.stage("linearize"):
            clock.tell(len(self.steps), MAX_LINEARIZATIONS, self._n_repaired, 0)
            linearized = self._linearize()
        self.price = self.price or linearized.price
        if not self.price:
            return False
        start = self.change.to(linearized.gradients)
        tries, note = self._try_steps(linearized, start)
        clean = [step for step in tries if step.is_clean]
        length = float((tries[-1].change - start).norm())
        if not clean:
            self.radius = RADIUS_SHRINKAGE * length
        elif len(tries) == 1:
            self.radius = max(self.radius, RADIUS_GROWTH * length)
        elif len(tries) > 1 + CORRECTIONS:
            self.radius = length
        best = max(clean or tries, key=lambda step: step.worth)
        self._accept(best)
        note = f"{len(linearized.rows):,} gradients, {note}"
        self.steps.append(best.proposal.step(time.perf_counter() - began, note))
        return True

    def _accept(self, step: _Try) -> None:
        proposal = step.proposal
        last = better(self.proposals[-1:])
        if step.is_clean or step.worth >= (last.value if last else 0.0):
            self.after = proposal.after
            self.change = step.change
        self.n_stalled += 1
        if step.is_clean and proposal.repaired and better([last, proposal]) is proposal:
            self.proposals.append(proposal)
            self.n_stalled = 0

    def _linearize(self) -> _LinearizedMargins:
        """Linearises at the present weights."""
        before = self.problem.before
        state = self.whitening.state(self.change.to(self.problem.space.device))
        rows, gradients = margin_gradients(self.problem, self._near(), self.whitening, state)
        return _LinearizedMargins(
            rows,
            gradients,
            margin=_margins(self.after)[rows].to(gradients),
            required=self.required[rows].to(gradients),
            targeted=before.targeted[rows].to(gradients.device),
            weight=before.weight[rows].float().to(gradients.device),
        )

    def _near(self) -> Tensor:
        """Returns rows of the samples nearest to the boundary.

        The distance of a target is divided by its weight.
        """
        before = self.problem.before
        margin = _margins(self.after)
        distance = margin.abs() / before.weight.to(margin)
        targets = nearest(distance, before.targeted & before.has_margin, MAX_ROWS // 2)
        closest = torch.minimum(self.closest, margin)
        passed = nearest(closest, before.passed & before.has_margin, MAX_ROWS - len(targets))
        return torch.cat([targets, passed]).sort().values

    def _try_steps(self, linearized: _LinearizedMargins, start: Tensor) -> tuple[list[_Try], str]:
        """Corrects, then shortens a step until it breaks nothing.

        Returns all tries and a note for the report.
        """
        tries = []
        error = torch.zeros_like(linearized.margin)
        multipliers = torch.zeros_like(linearized.margin)
        for number in range(1 + CORRECTIONS):
            with self.problem.clock.stage("solve"):
                step, multipliers = linearized.step(self.price, error, multipliers)
                length = float(step.norm())
                if length > self.radius:
                    step = step * (self.radius / length)
                step = self.problem.collective.agreed(step)
            tries.append(self._evaluate(start + step))
            if tries[-1].is_clean:
                note = "the whole step"
                if number:
                    note += f", corrected {number} times"
                return tries, note
            margin = _margins(tries[-1].proposal.after)[linearized.rows].to(linearized.margin)
            error = margin - (linearized.margin + linearized.gradients @ step)
        for fraction in STEP_FRACTIONS:
            tries.append(self._evaluate(start + fraction * step))
            if tries[-1].is_clean:
                return tries, f"{fraction:.0%} of the step"
        return tries, "still breaks some samples"

    def _evaluate(self, change: Tensor) -> _Try:
        with self.problem.clock.stage("judge"):
            proposal = self.problem.propose("linearized", self.whitening.state(change))
        margin = _margins(proposal.after)
        self.closest = torch.minimum(self.closest, margin)
        # By a margin that rounding at another batch size does not exceed.
        right = proposal.after.passed & (margin >= self.least)
        return _Try(proposal, change, not bool((self.problem.before.passed & ~right).any()))


def _margins(results: SampleResults) -> Tensor:
    return results.judged_margin.nan_to_num(nan=-1e6, posinf=1e6)


@dataclass(frozen=True)
class _LinearizedMargins:
    rows: Tensor  # m int64, rows of the known samples in the programme
    gradients: Tensor  # m x K, of the margins
    margin: Tensor  # m, at the present weights
    required: Tensor  # m, margins that the step should reach
    targeted: Tensor  # m bool, True for targets, False for passed samples
    weight: Tensor  # m float32, relative prices of targets

    @cached_property
    def gram(self) -> Tensor:
        return (self.gradients @ self.gradients.T).to(widest(self.gradients.device))

    @property
    def price(self) -> float:
        """Price of missing margin at which the median target alone is repaired.

        0 if no step can help a target.
        """
        length = self.gram.diagonal()
        missing = (self.required - self.margin).to(self.gram)
        repairable = self.targeted & (missing > 0) & (length > 0)
        if not repairable.any():
            return 0.0
        return float((missing[repairable] / length[repairable]).median())

    def step(self, price: float, error: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a step, `K`, and its multipliers, `m`.

        `error`, `m`, is added to the predicted margins. `start` are the multipliers to start at.
        """
        missing = (self.required - self.margin - error).to(self.gram)
        limit = torch.where(self.targeted, price * self.weight, PASSED_PRICE_FACTOR * price)
        multipliers = solve_dual(self.gram, missing, limit.to(self.gram), start)
        return self.gradients.T @ multipliers.to(self.gradients), multipliers
