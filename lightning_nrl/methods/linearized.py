"""Repairs any layers by linearised margins. It linearises, solves, evaluates and steps in turn, and
never trains.

To first order, a sample's margin is linear in the weights of any layer. A round takes the gradients
of some margins at the present weights and solves for the step x,

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
from lightning_nrl.evaluation.deployed_precision import coarse_rounding
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods.budget import FIRST_ROUND_PASSES, MAX_LINEARIZATIONS
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.solvers.active_set import REFERENCE_MARGIN, SAFETY_MARGIN
from lightning_nrl.methods.solvers.convex_head import KEPT_MARGIN_RATIO
from lightning_nrl.methods.solvers.qp import solve_dual
from lightning_nrl.methods.solvers.whitening import Whitening, fit_whitening, margin_gradients
from lightning_nrl.records.steps import CUT, Step

# Upper limit of a passed sample's required margin, and a target's required margin, in units of the
# median margin of passed data. Both are larger than in `Convex`, since gradients only approximate
# margins.
MAX_KEPT_MARGIN_OF_LAYERS, TARGET_MARGIN_OF_LAYERS = 0.2, 0.2
MAX_STALLED_LINEARIZATIONS = 2  # rounds in a row without a better proposal
MAX_ROWS = 1000  # samples of one programme, at most half of them targets; time grows with the square of this
MAX_PROGRAMME_ENTRIES = (
    2**27
)  # samples x weights, half a GiB in float32; in larger layers only some weights change
CORRECTIONS = 2  # further solutions of a round, corrected by the error of the prediction
STEP_FRACTIONS = (0.5, 0.25)  # of the step, tried if the whole step breaks something
REGRESSION_COST = 3  # weighs broken samples against repairs if all steps of a round break something
# Price of a passed sample's missing margin, relative to a target's. It is finite, so that there is
# a solution even if samples are broken or gradients contradict each other.
PASSED_PRICE_FACTOR = 1e3
RADIUS_GROWTH, RADIUS_SHRINKAGE = (
    2.0,
    0.25,
)  # used if the whole step broke nothing, or if all steps broke something


@dataclass(frozen=True)
class Linearized(Method):
    """Repairs any Linear or convolution layers without breaking a known passed sample, in a few
    dozen
    forward passes.

    Each step is computed from the gradients of the margins of targets and of passed samples near
    the boundary. By these gradients, the step gives targets a fixed margin if possible. Passed
    samples keep half of their margin, or the fixed margin if that is less. Of all such steps, the
    smallest is taken: it changes the layers' outputs on passed data least, in the mean square. A
    step that breaks a known sample is corrected or shortened.
    """

    needs: ClassVar[tuple[Need, ...]] = ("margins",)

    def __call__(self, problem: Problem) -> Solution:
        """Steps from the original weights; raises a `ConfigurationError` if there are no margins or
        gradients.
        """
        check_needs(self.needs, problem.before, problem.evaluator.task)
        clock, deadline = problem.clock, problem.deadline_of_method()
        took = FIRST_ROUND_PASSES * clock.one_pass
        if not deadline.leaves(took):
            return Solution(
                None,
                f"no time was left for a repair after {clock.elapsed:.1f} s; raise `max_time`.",
            )
        entries = (
            MAX_PROGRAMME_ENTRIES
            if problem.memory_limit is None
            else min(MAX_PROGRAMME_ENTRIES, problem.memory_limit // 8)
        )
        with clock.stage("linearize"):
            whitening = fit_whitening(
                problem, max(1, entries // min(MAX_ROWS, len(problem.before)))
            )
        run = _TrustRegionSteps(problem, whitening)
        while not run.is_done and deadline.leaves(took):
            began = time.perf_counter()
            if not run.round():
                return Solution(
                    None, "the margins of the targets do not depend on the layer's weights."
                )
            took = time.perf_counter() - began
        if run.steps and not run.is_done:
            last = run.steps[-1]
            run.steps[-1] = replace(last, note=f"{last.note}; {CUT}", was_cut=True)
        if not run.found:
            reason = "no step along the gradients repairs a target without a regression."
            return Solution(None, reason, tuple(run.steps))
        *others, proposal = run.found
        return Solution(proposal, steps=tuple(run.steps), others=tuple(others))


Try = tuple[
    Proposal, Tensor
]  # a proposal and its change of the original weights, in `K` scaled coordinates


class _TrustRegionSteps:
    """Steps from the original weights. Proposals in `found` break nothing; each is better than the
    proposal before.
    """

    def __init__(self, problem: Problem, whitening: Whitening) -> None:
        before = problem.before
        self.problem, self.whitening = problem, whitening
        unit = before.margin_unit
        keep = (KEPT_MARGIN_RATIO * before.margin).clamp(max=MAX_KEPT_MARGIN_OF_LAYERS * unit)
        self.required = torch.where(before.targeted, TARGET_MARGIN_OF_LAYERS * unit, keep)
        # Margins that an accepted step must keep: less than the required margins, which a step may
        # miss by rounding.
        rounding = coarse_rounding(problem.evaluator.precision, before)
        self.least = (keep / 2).clamp(
            max=max(SAFETY_MARGIN * max(1.0, unit / REFERENCE_MARGIN), rounding)
        )
        self.after, self.closest = before, before.margin
        self.change: Tensor | None = None
        self.radius, self.price = torch.inf, 0.0
        self.found: list[Proposal] = []
        self.steps: list[Step] = []
        self.stalled = 0

    @property
    def is_done(self) -> bool:
        is_over = (
            len(self.steps) >= MAX_LINEARIZATIONS or self.stalled >= MAX_STALLED_LINEARIZATIONS
        )
        return is_over or self._repaired >= int(self.problem.before.targeted.sum())

    @property
    def _repaired(self) -> int:
        return self.found[-1].repaired if self.found else 0

    def round(self) -> bool:
        """Linearises, solves and makes a step. Returns False if no target's margin depends on the
        weights.
        """
        began = time.perf_counter()
        with self.problem.clock.stage("linearize"):
            self.problem.clock.tell(len(self.steps), MAX_LINEARIZATIONS, self._repaired, 0)
            linearized, here = self._linearized()
        self.price = self.price or linearized.price
        if not self.price:
            return False
        tries, note = self._tried(linearized, here)
        clean = [one for one in tries if self._is_clean(one[0].after)]
        length = float((tries[-1][1] - here).norm())
        if not clean:
            self.radius = RADIUS_SHRINKAGE * length
        elif len(tries) == 1:
            self.radius = max(self.radius, RADIUS_GROWTH * length)
        elif len(tries) > 1 + CORRECTIONS:
            self.radius = length
        best, place = max(clean or tries, key=lambda one: _worth(one[0]))
        if clean or _worth(best) >= (self.found[-1].value if self.found else 0.0):
            self.after, self.change = best.after, place
        self.stalled += 1
        if clean and (not self.found or best.rank > self.found[-1].rank) and best.repaired:
            self.found.append(best)
            self.stalled = 0
        self.steps.append(
            best.step(time.perf_counter() - began, f"{len(linearized.rows):,} gradients, {note}")
        )
        return True

    def _linearized(self) -> tuple[_LinearizedMargins, Tensor]:
        """Linearises at the present weights; also returns their change from the original weights,
        `K` coordinates.
        """
        before = self.problem.before
        change = torch.zeros(self.whitening.size) if self.change is None else self.change
        state = self.whitening.state(change.to(self.problem.space.device))
        rows, gradients = margin_gradients(self.problem, self._near(), self.whitening, state)
        margin, required = (x[rows].to(gradients) for x in (_margins(self.after), self.required))
        targeted = before.targeted[rows].to(gradients.device)
        weight = before.weight[rows].to(gradients) if before.weighted else None
        return _LinearizedMargins(rows, gradients, margin, required, targeted, weight), change.to(
            gradients
        )

    def _near(self) -> Tensor:
        """Returns rows of the samples nearest to the boundary; the distance of a target is divided
        by its weight.
        """
        before, margin = self.problem.before, _margins(self.after)
        targets, passed = before.targeted.nonzero().flatten(), before.passed.nonzero().flatten()
        distance = margin[targets].abs() / before.weight[targets].to(margin)
        targets = targets[distance.argsort(stable=True)[: MAX_ROWS // 2]]
        closest = torch.minimum(self.closest, margin)[passed]
        passed = passed[closest.argsort(stable=True)[: MAX_ROWS - len(targets)]]
        return torch.cat([targets, passed]).sort().values

    def _tried(self, linearized: _LinearizedMargins, here: Tensor) -> tuple[list[Try], str]:
        """Corrects, then shortens a step until it breaks nothing; returns all tries and a note for
        the report.
        """
        tries: list[Try] = []
        error = start = None
        for number in range(1 + CORRECTIONS):
            with self.problem.clock.stage("solve"):
                step, start = linearized.step(self.price, error, start)
                length = float(step.norm())
                step = step * (self.radius / length) if length > self.radius else step
                step = self.problem.collective.agreed(step)
            tries.append(self._proposed(here + step))
            if self._is_clean(tries[-1][0].after):
                return tries, "the whole step" + (f", corrected {number} times" if number else "")
            real = _margins(tries[-1][0].after)[linearized.rows].to(linearized.margin)
            error = real - (linearized.margin + linearized.gradients @ step)
        for fraction in STEP_FRACTIONS:
            tries.append(self._proposed(here + fraction * step))
            if self._is_clean(tries[-1][0].after):
                return tries, f"{fraction:.0%} of the step"
        return tries, "still breaks some samples"

    def _proposed(self, change: Tensor) -> Try:
        with self.problem.clock.stage("judge"):
            proposal = self.problem.propose("linearized", self.whitening.state(change))
        self.closest = torch.minimum(self.closest, _margins(proposal.after))
        return proposal, change

    def _is_clean(self, after: SampleResults) -> bool:
        """True if every known passed sample passes, by a margin that rounding at another batch size
        does not exceed.
        """
        right = after.passed & (_margins(after) >= self.least)
        return not bool((self.problem.before.passed & ~right).any())


def _worth(proposal: Proposal) -> float:
    return proposal.value - REGRESSION_COST * proposal.cost


def _margins(results: SampleResults) -> Tensor:
    finite = results.margin.isfinite() & results.loss.isfinite()
    return torch.where(finite, results.margin, -1e6)


@dataclass(frozen=True)
class _LinearizedMargins:
    rows: Tensor  # m int64, rows of the known samples in the programme
    gradients: Tensor  # m x K, of the margins
    margin: Tensor  # m, at the present weights
    required: Tensor  # m, margins that the step should reach
    targeted: Tensor  # m bool, True for targets, False for passed samples
    weight: Tensor | None  # m, relative prices of targets; None if all are equal

    @cached_property
    def gram(self) -> Tensor:
        return (self.gradients @ self.gradients.T).to(widest(self.gradients.device))

    @property
    def price(self) -> float:
        """Price of missing margin at which the median target alone is repaired; 0 if no step can
        help a target.
        """
        length, missing = self.gram.diagonal(), (self.required - self.margin).to(self.gram)
        some = self.targeted & (missing > 0) & (length > 0)
        return float((missing[some] / length[some]).median()) if some.any() else 0.0

    def step(
        self, price: float, error: Tensor | None, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns a step, `K`, and its multipliers, `m`. `error`, `m`, is added to the predicted
        margins.
        """
        missing = (
            self.required - self.margin if error is None else self.required - self.margin - error
        )
        own = price if self.weight is None else price * self.weight
        limit = torch.where(self.targeted, own, PASSED_PRICE_FACTOR * price).to(self.gram)
        values = solve_dual(self.gram, missing.to(self.gram), limit, start).values
        return self.gradients.T @ values.to(self.gradients), values
