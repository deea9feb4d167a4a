"""Chooses the strength of a patch, and searches for a patch that changes fewer weights.

The weights at strength t are w0 + t (w - w0), with the original weights w0 and the patch's weights
w. t may exceed 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, between, changed, current_state, live_tensors
from lightning_nrl.evaluation import FlipCounts, Flips, SampleResults
from lightning_nrl.gate import Gate
from lightning_nrl.methods import Problem, Proposal
from lightning_nrl.methods.budget import (
    CURVE_SHARE,
    FULL_CURVE_SAMPLES,
    MAX_POLISHED_SIZES,
    MAX_POLISHES,
)
from lightning_nrl.methods.solvers.polish import polish
from lightning_nrl.pipeline.baseline import EvaluatedData
from lightning_nrl.records import StrengthPoint
from lightning_nrl.records.stats import Selection
from lightning_nrl.records.steps import Step

PATH_STRENGTHS: tuple[float, ...] = (
    1.0,
    1.15,
    0.6,
    0.8,
    0.4,
    0.2,
    1.3,
)  # the most informative first


class PatchPath:
    """Evaluates a patch at several strengths on known and calibration data, and counts what it
    repairs
    and breaks.

    A patch that breaks nothing at strength 1 may break samples at a lower strength. Then `take`
    polishes the weights: it takes small steps until these samples are right again. `counted` has
    the counts by strength; for polished weights, those after the polish. `broken_unpolished` counts
    broken calibration samples before any polish.
    """

    def __init__(
        self,
        problem: Problem,
        patch: State,
        gate: Gate | None = None,
        calibration: EvaluatedData | None = None,
    ) -> None:
        self.problem, self.patch, self.calibration = problem, patch, calibration
        self.gate = gate or Gate.instance()
        self.counted: dict[float, StrengthPoint] = {}
        self.broken_unpolished: dict[float, int] = {}

    @property
    def points(self) -> tuple[StrengthPoint, ...]:
        return tuple(self.counted[strength] for strength in sorted(self.counted))

    @property
    def has_margins(self) -> bool:
        return not bool(self.problem.before.margin.isnan().all())

    def state(self, strength: float) -> State:
        return between(current_state(self.problem.model), self.patch, strength)

    def count(
        self, strengths: Iterable[float] = PATH_STRENGTHS, *, after: SampleResults | None = None
    ) -> tuple[StrengthPoint, ...]:
        """Evaluates the patch at several strengths, in the given order, and returns all points
        counted
        so far.

        If a strength above 1 violates the gate, greater strengths are skipped. If time is short,
        only the first strength is certain to be evaluated. `after` has the results on known data at
        strength 1, if they are available.
        """
        clock, took, strongest = self.problem.clock, 0.0, float("inf")
        for number, strength in enumerate(strengths):
            if number and not self.leaves_time_for(took):
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
        if strength not in self.counted:
            point = self._count(self.state(strength), strength, after)
            self.counted[strength] = point
            if point.calibration is not None:
                self.broken_unpolished[strength] = point.calibration.broken
        return self.counted[strength]

    def take(self, strength: float) -> State:
        """Returns the weights at a strength. Below 1, it polishes weights that violate the gate, if
        margins exist.
        """
        state = self.state(strength)
        if strength < 1 and not self.within_gate(self.point(strength)) and self.has_margins:
            state = polish(self.problem, state, deadline=self.problem.deadline).state
            self.counted[strength] = replace(self._count(state, strength), polished=True)
        return state

    def count_broken_unpolished(self, strength: float) -> int:
        assert self.calibration is not None
        if strength not in self.broken_unpolished:
            flips = self.calibration.flips(self.problem.evaluator, self.state(strength))
            self.broken_unpolished[strength] = flips.counts().broken
        return self.broken_unpolished[strength]

    def within_gate(self, point: StrengthPoint) -> bool:
        return not self.gate.excess_of(point.known, point.cost_of_known)

    def within_limit(self, strength: float, limit: Gate) -> bool:
        """True if the patch at a strength keeps the limit on calibration data and the gate on known
        data.

        Below strength 1 the gate is ignored if the task has margins, because the polish in `take`
        may still satisfy it.
        """
        point = self.point(strength)
        assert point.calibration is not None
        known = self.within_gate(point) or (strength < 1 and self.has_margins)
        return known and not limit.excess_of(point.calibration, point.cost_of_calibration)

    def takes_time(self, strength: float) -> bool:
        """True if `take` must evaluate the model or polish for this strength."""
        return strength not in self.counted or (
            strength < 1 and not self.within_gate(self.counted[strength])
        )

    def leaves_time_for(self, seconds: float) -> bool:
        """True if every rank has time for work of this duration and for a pass over the data after
        it.
        """
        return self.problem.deadline.leaves(seconds + self.problem.clock.one_pass)

    def _count(
        self, state: State, strength: float, after: SampleResults | None = None
    ) -> StrengthPoint:
        problem, before = self.problem, self.problem.before
        flips = Flips.between(before, problem.evaluate(state) if after is None else after)
        repaired = flips.repaired & before.targeted
        point = StrengthPoint(strength, int(repaired.sum()), flips.counts())
        cost = self.gate.cost(before, flips.broken)
        if before.weighted:
            point = replace(point, value=before.value(repaired))
        if before.weighted or cost != point.known.broken:
            point = replace(point, cost=cost)
        if self.calibration is None:
            return point
        flips_of_calibration, results = (
            self.calibration.flips(problem.evaluator, state),
            self.calibration.before,
        )
        cost_of_broken = results.cost(flips_of_calibration.broken) if results.weighted else None
        return replace(
            point, calibration=flips_of_calibration.counts(), calibration_cost=cost_of_broken
        )


LIMIT_STRENGTHS = tuple(step / 20 for step in range(1, 27))  # strengths to try under a limit
# Sets of weights that calibration data may choose under a limit: one per strength and, below 1, a
# polished one, too.
LIMIT_STATES = len(LIMIT_STRENGTHS) + sum(t < 1 for t in LIMIT_STRENGTHS)


@dataclass(frozen=True)
class LineSearchResult:
    """The `chosen` strength, or None if no strength keeps the limit. `path` has the counts at each
    tried strength.

    `state` has each changed tensor at the chosen strength. `selection` says how calibration data
    chose this strength.
    """

    path: tuple[StrengthPoint, ...] = ()
    chosen: float | None = 1.0
    state: State = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)


def line_search(
    problem: Problem,
    patch: State,
    gate: Gate,
    *,
    calibration: EvaluatedData | None = None,
    fixed: float | None = None,
    limit: Gate | None = None,
    after: SampleResults | None = None,
) -> LineSearchResult:
    """Evaluates a patch at several strengths and chooses one, by default with `choose_strength`.

    If `fixed` is given, this strength is chosen. `limit` is a limit on broken calibration samples.
    If it is given, the greatest strength in `LIMIT_STRENGTHS` is chosen whose weights keep the
    limit and the gate, if necessary after a polish. `after` has the results on known data with the
    patch, if they are available.
    """
    path = PatchPath(problem, patch, gate, calibration)
    strengths = PATH_STRENGTHS
    if fixed is not None and fixed not in strengths:
        strengths = (fixed, *strengths)
    if calibration is None:
        # Without calibration data the points are only reported, so strengths up to 1 come first.
        strengths = tuple(sorted(strengths, key=lambda strength: (strength != fixed, strength > 1)))
        if len(problem.before) > FULL_CURVE_SAMPLES:
            strengths = strengths[: max(2, int(CURVE_SHARE * problem.visits / len(problem.before)))]
    points = path.count(strengths, after=after)
    if (
        limit is None
        and fixed is None
        and any(p.strength == 1 and math.isinf(p.cost_of_calibration) for p in points)
    ):
        # The patch breaks protected calibration samples. This limit allows any broken samples but
        # these.
        limit = Gate.tolerance(1.0)
    if limit is not None and calibration is not None:
        return _strongest_within(path, limit)
    strength, selection = fixed, Selection()
    if strength is None:
        # With protected samples the data decide which weights are tried, so all that could be tried
        # count.
        weighted = calibration is not None and calibration.before.weighted
        strength = choose_strength(points)
        selection = Selection(LIMIT_STATES if weighted else 1 + len(_free(points)))
    state = path.take(strength)
    return LineSearchResult(path.points, strength, state, selection)


def choose_strength(path: Sequence[StrengthPoint]) -> float:
    """Returns the strength to take by default: 1, or a greater strength that repairs more targets
    at
    no cost.

    At no cost means that no known sample breaks, and no more calibration samples break than at
    strength 1.
    """
    chosen = _whole_patch(path)
    if chosen is None:
        return 1.0
    for point in _free(path):
        no_worse = (
            point.calibration is not None
            and point.cost_of_calibration <= chosen.cost_of_calibration
        )
        if no_worse and point.value_of_repairs > chosen.value_of_repairs:
            chosen = point
    return chosen.strength


def _free(path: Sequence[StrengthPoint]) -> list[StrengthPoint]:
    """Returns the points above strength 1 that repair more targets than 1 does and break no known
    sample.
    """
    patch = _whole_patch(path)
    if patch is None or patch.calibration is None:
        return []
    return [
        point
        for point in path
        if point.strength > 1
        and not point.known.broken
        and point.value_of_repairs > patch.value_of_repairs
    ]


def _whole_patch(path: Sequence[StrengthPoint]) -> StrengthPoint | None:
    return next((point for point in path if point.strength == 1), None)


def _strongest_within(path: PatchPath, limit: Gate) -> LineSearchResult:
    low = max((t for t in path.counted if path.within_limit(t, limit)), default=0.0)
    high = min((t for t in path.counted if t > low), default=low)
    finer = [t for t in reversed(LIMIT_STRENGTHS) if low < t < high]
    weaker = [t for t in reversed(LIMIT_STRENGTHS) if t <= low]
    clock, took, polished = path.problem.clock, 0.0, 0
    for strength in (*finer, *([low] if low and low not in weaker else []), *weaker):
        if path.takes_time(strength) and (
            polished == MAX_POLISHES or not path.leaves_time_for(took)
        ):
            continue
        began = clock.now()
        if path.within_limit(strength, limit):
            state = path.take(strength)
            polished += path.counted[strength].polished
            if path.within_limit(strength, limit) and path.within_gate(path.counted[strength]):
                return LineSearchResult(
                    path.points, strength, state, _selection(path, strength, limit)
                )
        took = clock.now() - began
    return LineSearchResult(path.points, None)


def _selection(path: PatchPath, strength: float, limit: Gate) -> Selection:
    """Returns how calibration data chose a strength under a limit. The bound on future errors
    depends
    on this choice.

    The search goes from strong to weak, to save time. If all weaker strengths keep the limit too, a
    walk from weak to strong would also have accepted this strength. Then the tighter bound of such
    a walk holds: its order (`LIMIT_STRENGTHS`) and the number of samples that may break were fixed
    in advance.
    """
    allowed = _fixed_allowance(path, limit)
    if (
        allowed is not None
        and not path.counted[strength].polished
        and _walk_accepts(path, strength, allowed)
    ):
        return Selection(LIMIT_STATES, True, allowed)
    return Selection(LIMIT_STATES, allowed is not None)


def _walk_accepts(path: PatchPath, strength: float, allowed: int) -> bool:
    """True if no strength up to `strength` breaks more than `allowed` calibration samples. False if
    time is short.
    """
    clock, took = path.problem.clock, 0.0
    for weaker in (t for t in LIMIT_STRENGTHS if t <= strength):
        if weaker not in path.broken_unpolished and not path.leaves_time_for(took):
            return False
        counted, began = weaker in path.broken_unpolished, clock.now()
        if path.count_broken_unpolished(weaker) > allowed:
            return False
        took = took if counted else clock.now() - began
    return True


def _fixed_allowance(path: PatchPath, limit: Gate) -> int | None:
    """Returns how many calibration samples may break. None if the number depends on the repair, or
    if all may break.
    """
    assert path.calibration is not None
    now = Flips.between(path.calibration.before, path.calibration.before).counts()
    best, worst = FlipCounts(now.kept, 0, now.failing, 0), FlipCounts(0, now.kept, 0, now.failing)
    allowed = limit.allowed(best)
    return allowed if allowed == limit.allowed(worst) and allowed < now.kept else None


SIZE_TOLERANCE = 1.1  # bisection ends when the size is known up to this factor
VALUE_ROUNDING = 1e-9  # allowance for rounding in sums of sample weights


def sparsify(problem: Problem, proposal: Proposal, loss: float) -> tuple[Proposal, Step]:
    """Searches for a patch that changes as few weights as possible and breaks no more known samples
    than the proposal.

    The patch keeps the largest weight changes of the proposal, and may lose a share `loss` of the
    repaired targets. Bisection finds how many changes to keep; each trial takes a pass over known
    data. Small steps of the kept weights then restore broken samples. Buffers, such as batch norm
    statistics, are those of the proposal. Returns the patch (or the proposal if fewer changes do
    not suffice) and the step for the report.
    """
    began = problem.clock.now()
    patch = _SortedPatch(problem, proposal.state)
    # Exact arithmetic: in binary, (1 - 0.7) * 10 is slightly more than 3.
    least: float = math.ceil((1 - Fraction(repr(float(loss)))) * proposal.repaired)
    if problem.before.weighted:
        least = (1 - loss) * proposal.value - VALUE_ROUNDING
    polishes = not bool(problem.before.margin.isnan().all())
    best, size = proposal, patch.size
    tried, found = _smallest(patch, proposal, least, None if polishes else proposal.cost)
    before = 0.0
    for _ in range(MAX_POLISHED_SIZES if polishes else 1):
        if not 0 < tried < size or (polishes and patch.is_late()):
            break
        if polishes:
            found = patch.polished(tried)
        good = (
            found.value >= least
            and found.cost <= proposal.cost
            and found.missing <= proposal.missing
        )
        if good:
            best, size = found, tried
        factor = 0.5 if good else 2.0
        if factor * before == 1:
            break
        tried, before = int(factor * tried), factor
    note = f"{size:,} of {patch.total:,} weights differ"
    note += f", {patch.size:,} before" if size < patch.size else "; fewer do not suffice"
    return best, best.step(problem.clock.now() - began, note)


def _smallest(
    patch: _SortedPatch, whole: Proposal, least: float, most_broken: float | None
) -> tuple[int, Proposal]:
    """Bisects the least number of changes that repair targets worth `least`, at a cost of at most
    `most_broken`.
    """
    low, high, best = 0, patch.size, whole
    while high > max(low + 1, SIZE_TOLERANCE * low) and not patch.is_late():
        middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
        found = patch.problem.propose("sparse", patch.state(middle))
        enough = found.value >= least and found.missing <= whole.missing
        if enough and (most_broken is None or found.cost <= most_broken):
            high, best = middle, found
        else:
            low = middle
    return high, best


class _SortedPatch:
    """The parameters that a patch changes, with old and new values (tied ones once), and the
    buffers it changes.
    """

    def __init__(self, problem: Problem, state: State) -> None:
        self.problem = problem
        live = live_tensors(problem.model)
        names = {id(parameter): name for name, parameter in problem.model.named_parameters()}
        different = changed(problem.model, state)
        self.new = {
            names[id(live[name])]: value
            for name, value in different.items()
            if id(live[name]) in names
        }
        self.old = {name: live[name].detach() for name in self.new}
        self.buffers = {
            name: value for name, value in different.items() if id(live[name]) not in names
        }

    @property
    def total(self) -> int:
        return sum(value.numel() for value in self.new.values())

    @cached_property
    def size(self) -> int:
        return sum(int((self.new[name] != self.old[name]).sum()) for name in self.new)

    @cached_property
    def order(self) -> Tensor:
        changes = [
            (self.new[name].float() - self.old[name].float()).abs().flatten() for name in self.new
        ]
        return torch.cat(changes).argsort(descending=True, stable=True)

    def masks(self, size: int) -> dict[str, Tensor]:
        chosen = torch.zeros(self.total, dtype=torch.bool, device=self.order.device)
        chosen[self.order[:size]] = True
        parts = chosen.split([value.numel() for value in self.new.values()])
        return {
            name: part.view_as(self.new[name]) for name, part in zip(self.new, parts, strict=True)
        }

    def state(self, size: int) -> State:
        masks = self.masks(size)
        return self.buffers | {
            name: torch.where(masks[name], self.new[name], self.old[name]) for name in self.new
        }

    def polished(self, size: int) -> Proposal:
        masks = {name: mask for name, mask in self.masks(size).items() if mask.any()}
        problem = replace(self.problem, scope=tuple(masks))
        found = polish(problem, self.state(size), masks=masks, deadline=problem.deadline)
        return problem.counted("sparse", found.state, found.after)

    def is_late(self) -> bool:
        return self.problem.deadline_of_method().is_over()
