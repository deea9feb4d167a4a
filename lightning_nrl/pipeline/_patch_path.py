"""The path from the original weights (t = 0) to a patch (t = 1), and a little beyond, each point of it counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lightning_nrl._optim.polish import polish
from lightning_nrl._utils.state import State, between, current_state
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation import Flips, SampleResults
from lightning_nrl.gate import Gate
from lightning_nrl.pipeline._held_out import HeldOut
from lightning_nrl.problem import Problem
from lightning_nrl.report import StrengthPoint

__all__ = ["PATH_STRENGTHS", "PatchPath"]

PATH_STRENGTHS: tuple[float, ...] = (1.0, 1.15, 0.6, 0.8, 0.4, 0.2, 1.3)
"""Strengths to be counted, the most telling first, since time may be short."""


class PatchPath:
    """What a patch does at several strengths, by real forward passes over known and calibration data.

    A patch that breaks nothing at its end may break something half way: a point that is taken there is polished first.

    Attributes:
        counted: what was counted so far, by strength; where a point was polished, after that.
        broken_unpolished: calibration samples that break at a strength before anything is polished there.
    """

    def __init__(
        self, problem: Problem, patch: State, gate: Gate | None = None, calibration: HeldOut | None = None
    ) -> None:
        self.problem, self.patch, self.calibration = problem, patch, calibration
        self.gate = gate or Gate.instance()
        self.counted: dict[float, StrengthPoint] = {}
        self.broken_unpolished: dict[float, int] = {}

    @property
    def points(self) -> tuple[StrengthPoint, ...]:
        """What was counted, by ascending strength."""
        return tuple(self.counted[strength] for strength in sorted(self.counted))

    @property
    def has_margins(self) -> bool:
        """Whether anything can be polished."""
        return not bool(self.problem.before.margin.isnan().all())

    def state(self, strength: float) -> State:
        """The weights at a strength."""
        return between(current_state(self.problem.model), self.patch, strength)

    def count(
        self,
        strengths: Iterable[float] = PATH_STRENGTHS,
        *,
        after: SampleResults | None = None,
        deadline: Deadline | None = None,
    ) -> tuple[StrengthPoint, ...]:
        """Counts the patch at several strengths, each by one forward pass.

        Args:
            strengths: the most telling first. Of those beyond 1, none above the first that breaks more than the gate
                allows; the last ones are left out where time is short, but not the first.
            after: what the model does on known data at 1, if that is known already.
            deadline: after which no further point is begun; None: that of the repair alone.

        Returns:
            The points that were counted so far, ascending; the same on every rank.
        """
        clock, took, strongest = self.problem.clock, 0.0, float("inf")
        for number, strength in enumerate(strengths):
            if number and (not self.leaves_time_for(took) or (deadline is not None and deadline.is_over())):
                break
            if strength > strongest:
                continue
            began, known = clock.now(), after if strength == 1 else None
            point = self.point(strength, known)
            took = max(clock.now() - began, clock.one_pass if known is not None else 0.0)
            if strength > 1 and not self.within_gate(point):
                strongest = min(strongest, strength)
        return self.points

    def point(self, strength: float, after: SampleResults | None = None) -> StrengthPoint:
        """What the patch does at a strength, counted once; `after` are results on known data, if there are any yet."""
        if strength not in self.counted:
            point = self._count(self.state(strength), strength, after)
            self.counted[strength] = point
            if point.calibration is not None:
                self.broken_unpolished[strength] = point.calibration.broken
        return self.counted[strength]

    def take(self, strength: float) -> State:
        """The weights at a strength, polished if it lies before the patch and breaks more than the gate allows."""
        state = self.state(strength)
        if strength < 1 and not self.within_gate(self.point(strength)) and self.has_margins:
            state = polish(self.problem, state, deadline=self.problem.deadline).state
            self.counted[strength] = replace(self._count(state, strength), polished=True)
        return state

    def count_broken_unpolished(self, strength: float) -> int:
        """Calibration samples that break at a strength before anything is polished there."""
        assert self.calibration is not None
        if strength not in self.broken_unpolished:
            flips = self.calibration.flips(self.problem.evaluator, self.state(strength))
            self.broken_unpolished[strength] = flips.counts().broken
        return self.broken_unpolished[strength]

    def within_gate(self, point: StrengthPoint) -> bool:
        """Whether no more known samples break than the gate allows."""
        return not self.gate.excess_of(point.known, point.cost)

    def within_limit(self, strength: float, limit: Gate) -> bool:
        """Whether a strength keeps within a limit for calibration data and within the gate.

        Before the patch anything that breaks known samples counts as within the gate, since it can be polished.
        """
        point = self.point(strength)
        assert point.calibration is not None
        known = self.within_gate(point) or (strength < 1 and self.has_margins)
        return known and not limit.excess_of(point.calibration, point.calibration_cost)

    def takes_time(self, strength: float) -> bool:
        """Whether a strength has to be counted first, or polished."""
        return strength not in self.counted or (strength < 1 and not self.within_gate(self.counted[strength]))

    def leaves_time_for(self, seconds: float) -> bool:
        """Whether there is time for work that long and the recount that follows; the same on every rank."""
        return self.problem.deadline.leaves(seconds + self.problem.clock.one_pass)

    def _count(self, state: State, strength: float, after: SampleResults | None = None) -> StrengthPoint:
        problem, before = self.problem, self.problem.before
        flips = Flips.between(before, problem.evaluate(state) if after is None else after)
        repaired = flips.repaired & before.targeted
        point = StrengthPoint(strength, int(repaired.sum()), flips.counts())
        cost = self.gate.harm(before, flips.broken)
        if before.weighted:
            point = replace(point, gain=before.gain(repaired))
        if before.weighted or cost != point.known.broken:
            point = replace(point, harm=cost)
        if self.calibration is None:
            return point
        held_out, results = self.calibration.flips(problem.evaluator, state), self.calibration.before
        harm = results.harm(held_out.broken) if results.weighted else None
        return replace(point, calibration=held_out.counts(), calibration_harm=harm)
