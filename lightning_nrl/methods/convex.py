"""Repairing a last Linear layer by convex optimisation: a path over strength, its point chosen by cross-validation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_nrl._convex.head import ConvexHead, regularization_path
from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._scoring import ActivationCache
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, check_whole
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods._head_inputs import check_last, record_head
from lightning_nrl.problem import Problem, Proposal, Solution
from lightning_nrl.report.run_records import Step

__all__ = ["Convex"]

SLACK_COSTS = tuple(2.0**power for power in range(-4, 6))
"""What a target's missing margin may cost, in units of what the median target would take if it were the only one."""

N_FOLDS = 4
"""Of the samples that came in with the failed ones, each is held out once."""

REGRESSION_PRICE = 1
"""Held-out repairs that a held-out regression costs: the path is followed as long as its steps repair more than they
break, so that the whole of it repairs several times as many."""

DEPLOYED_FRACTIONS = (1.0, 0.98, 0.9, 0.75, 0.5, 0.25)
"""Fractions of a change that are tried on the deployed model: rounding may differ from that of the recording."""


RECORDING_PASSES = 2.0
"""What it takes to record the layer's inputs and to compare its outputs with the model's."""

NO_TIME_TO_SOLVE = "there was no time left to solve anything."

TRIAL_PASSES = 2.0
"""Passes for which there must be time where another of these fractions is tried: its own, and the verdict's."""


class _HeldOutFlips(NamedTuple):
    """What a change did to samples that it was not made from."""

    gained: int  # targets that were repaired
    lost: int  # passed samples that were broken
    gain: float  # what the former weigh
    harm: float  # what the latter weigh
    others: int  # failures that are no targets and were repaired all the same

    def counts(self, n_passed: int, n_targeted: int, n_others: int) -> TargetCounts:
        """The same as counts of so many samples that were held out."""
        repaired = self.gained + self.others
        failing = n_targeted + n_others - repaired
        return TargetCounts(n_passed - self.lost, self.lost, repaired, failing, n_targeted, self.gained)


class _Point(NamedTuple):
    """What a change does to the known samples, counted on what was recorded."""

    repaired: int  # targets
    broken: int
    missing: int  # repairs that slices lack
    counts: TargetCounts

    def step(self, strength: float, seconds: float, held: _HeldOutFlips) -> Step:
        """A line for the report."""
        note = f"strength {strength:g}; held out {held.gained} repaired, {held.lost} broken"
        return Step(f"convex {strength:g}", self.repaired, self.broken, round(seconds, 3), note)


@dataclass(frozen=True)
class _KnownHead:
    """The layer on the known samples: those that count, `N` bool, and the rest."""

    rows: Tensor
    head: ConvexHead
    rest: ConvexHead

    @classmethod
    def recorded(cls, problem: Problem) -> _KnownHead:
        """Runs the model once over all known data."""
        found = record_head(problem, _bias_name(problem) is not None)
        before = problem.before
        rows = before.passed | before.targeted
        return cls(rows, found.head(problem, rows, before.targeted), found.head(problem, ~rows, before.targeted))

    def point(self, problem: Problem, change: Tensor) -> _Point:
        """What a change does."""
        before, right = problem.before, torch.zeros_like(problem.before.passed)
        right[self.rows] = self.head.right(change).cpu()
        right[~self.rows] = _right_of_rest(self.rest, change).cpu()
        after = replace(before, passed=right)
        found = problem.counted("convex", {}, after)
        return _Point(found.repaired, found.broken, found.missing, problem.target_counts(after))


@dataclass(frozen=True)
class Convex:
    """Repairs a last Linear layer so that no known passed sample breaks: least change of logits, exact, in seconds.

    Attributes:
        patience: the path over strengths ends after so many in a row that held-out samples speak for less than for the
            best; None: it goes to its end. Large strengths take the longest where data contradict each other.
        seconds: how long solving may take; the weakest strength is solved at least in part.

    Raises:
        ConfigurationError: on construction, for a patience below 1.
    """

    needs: ClassVar[tuple[Need, ...]] = ("classes",)
    patience: int | None = None
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.patience is not None:
            check_whole("Convex.patience", self.patience, 1)

    def check(self, recording: ActivationCache) -> None:
        """Refuses layers that are not the one last Linear, by a recording of some samples.

        Raises:
            ConfigurationError: as above.
        """
        _check_layers(recording.space)
        check_last(recording)

    def __call__(self, problem: Problem) -> Solution:
        """Solves along strengths, and takes the strongest that held-out samples speak for.

        Raises:
            ConfigurationError: there are several layers, the layer's output is not the logits, or the task has no
                classes.
        """
        began = time.perf_counter()
        _check_layers(problem.space)
        check_needs(Convex.needs, problem.before, problem.task)
        if not problem.deadline_of_method().leaves(RECORDING_PASSES * problem.clock.one_pass):
            return Solution(None, NO_TIME_TO_SOLVE)
        with problem.clock.stage("record"):
            known = _KnownHead.recorded(problem)
        with problem.clock.stage("solve"):
            # What is chosen is counted once more by the model that is deployed.
            end = problem.deadline_of_method().earlier(problem.clock.one_pass).within(self.seconds)
            changes, held = _path(problem, known, self.patience, end)
            if not len(changes):
                return Solution(None, NO_TIME_TO_SOLVE)
            points = [known.point(problem, change) for change in changes]
        del known
        seconds = (time.perf_counter() - began) / len(points)
        steps = [
            point.step(strength, seconds, one) for point, strength, one in zip(points, SLACK_COSTS, held, strict=False)
        ]
        best = _best(held, points)
        tried = tuple(point.counts for i, point in enumerate(points) if i != best and point.repaired)
        folded, before = _folds(problem) >= 0, problem.before
        kinds = (before.passed, before.targeted, ~before.passed & ~before.targeted)
        held_out = held[best].counts(*(int((folded & kind).sum()) for kind in kinds))
        with problem.clock.stage("judge"):
            began = time.perf_counter()
            proposal, share = _deployed(problem, changes[best])
            seconds = time.perf_counter() - began
            note = f"strength {SLACK_COSTS[best]:g} is chosen" + (f", {share:.0%} of it" if share < 1 else "")
            steps.append(proposal.step(seconds, note) if proposal else Step("convex", 0, 0, round(seconds, 3), note))
        if proposal is None:
            reason = "no change of the layer that held-out samples speak for repairs a target without a regression."
            return Solution(None, reason, tuple(steps), tried=tried, held_out=held_out)
        return Solution(proposal, steps=tuple(steps), tried=tried, held_out=held_out)


def _check_layers(space: ParameterSpace) -> None:
    names = [site.name for site in space.sites]
    if not names:
        raise ConfigurationError(space.obstacle, "name the last Linear layer as `layer`.")
    if len(names) > 1 or not isinstance(space.sites[0].module, torch.nn.Linear):
        raise ConfigurationError(
            f"`method='convex'` repairs one last Linear layer, `layer` names {names}.",
            "leave `layer` at 'auto', or use `method='linearized'`.",
        )


@torch.no_grad()
def _path(
    problem: Problem, known: _KnownHead, patience: int | None, end: Deadline
) -> tuple[list[Tensor], list[_HeldOutFlips]]:
    """The change at each strength, `C x d`, and what it did to held-out samples; one rank solves for all."""
    collective, n, logits = problem.collective, len(SLACK_COSTS), known.head.logits
    changes = torch.zeros(n, logits.shape[1], known.head.n_features, device=logits.device, dtype=logits.dtype)
    held = torch.zeros(n, 5, dtype=torch.float64)
    made = torch.zeros((), dtype=torch.int64)
    if collective.rank == 0:
        for i, (change, *found) in enumerate(_solved(problem, known, patience, end)):
            changes[i], held[i] = change, torch.tensor(found)
            made += 1
    changes, held, made = (collective.agreed(x) for x in (changes, held, made))
    return list(changes[: int(made)]), [
        _HeldOutFlips(int(a), int(b), c, d, int(e)) for a, b, c, d, e in held[: int(made)].tolist()
    ]


def _solved(
    problem: Problem, known: _KnownHead, patience: int | None, end: Deadline
) -> Iterator[tuple[Tensor, int, int, float, float, int]]:
    """The change at each strength that all samples ask for, and what changes made without a fold do on that fold.

    How many targets they repair, how many passed samples they break, what these weigh, and how many other failures they
    repair. A strength that time cuts short is left out, but for the first.
    """

    def is_over() -> bool:
        # Of this rank, which solves for all.
        return end.seconds_left <= 0

    head, rest, device = known.head, known.rest, known.head.label.device
    by_row = _folds(problem)
    folds = by_row.to(device)
    fold, fold_of_rest = folds[known.rows.to(device)], folds[~known.rows.to(device)]
    used = [None, *(~problem.copies(by_row == number)[known.rows].to(device) for number in range(N_FOLDS))]
    paths = [regularization_path(head, SLACK_COSTS, rows, is_over) for rows in used]
    counts = problem.before.finite_weight[known.rows].to(device)
    worth: list[float] = []
    for _ in SLACK_COSTS:
        made = []
        for path in paths:
            if worth and is_over():
                return
            made.append(next(path))
        change, *without = made
        if worth and is_over():
            return
        flipped, n_others = torch.zeros_like(head.targeted), 0
        for number, one in enumerate(without):
            out = fold == number
            flipped[out] = (head.right(one) == head.targeted)[out]
            n_others += int((_right_of_rest(rest, one) & (fold_of_rest == number)).sum())
        gained, lost = flipped & head.targeted, flipped & ~head.targeted
        weights = float(counts[gained].sum()), float(counts[lost].sum())
        yield change, int(gained.sum()), int(lost.sum()), *weights, n_others
        worth.append(weights[0] - REGRESSION_PRICE * weights[1])
        is_past = patience is not None and len(worth) - 1 - worth.index(max(worth)) >= patience
        if is_over() or is_past:
            return


def _right_of_rest(rest: ConvexHead, change: Tensor) -> Tensor:
    """`n` bool, which of the samples that are neither kept nor targets are right under a change."""
    right = torch.zeros_like(rest.targeted)
    for some in rest.blocks():
        outputs = rest.outputs(some) + (rest.inputs(some).to(change) @ change.T).to(rest.logits)
        right[some] = outputs.argmax(1) == rest.label[some]
    return right


def _folds(problem: Problem) -> Tensor:
    """`N` int64: the fold of each sample that came in with the failed ones, -1 for all others, which never leave."""
    before = problem.before
    fold = torch.full_like(before.label, -1)
    for source in problem.known:
        if source.failed:
            fold[before.of(source.split)] = 0
    here = (fold == 0) & problem.used
    fold[fold == 0] = -1
    generator = torch.Generator().manual_seed(problem.seed)
    for kind in (before.passed, before.targeted, ~before.passed & ~before.targeted):
        which = (here & kind).nonzero().flatten()
        fold[which] = torch.randperm(len(which), generator=generator) % N_FOLDS
    return fold


def _best(held: list[_HeldOutFlips], points: list[_Point]) -> int:
    """Of the points whose slices lack the fewest repairs, what held-out samples speak for most; then the weakest."""
    worth = [one.gain - REGRESSION_PRICE * one.harm for one in held]
    return max(range(len(worth)), key=lambda i: (-points[i].missing, worth[i], points[i].repaired > 0, -i))


def _deployed(problem: Problem, change: Tensor) -> tuple[Proposal | None, float]:
    """The greatest share of a change that breaks nothing when the deployed model runs with it."""
    for number, share in enumerate(DEPLOYED_FRACTIONS):
        if number and not problem.deadline.leaves(TRIAL_PASSES * problem.clock.one_pass):
            break
        proposal = problem.propose("convex", _state(problem, share * change))
        if not proposal.broken:
            return (proposal if proposal.repaired else None), share
    return None, 0.0


def _state(problem: Problem, change: Tensor) -> dict[str, Tensor]:
    """The layer's whole parameters with a change added."""
    module, n_in = problem.space.sites[0].module, problem.space.sites[0].module.weight.shape[1]
    weight = module.weight.detach()
    state = {next(iter(problem.space.sites[0].parameters)): (weight + change[:, :n_in]).to(weight.dtype)}
    bias = _bias_name(problem)
    if bias is not None and module.bias is not None:
        state[bias] = (module.bias.detach() + change[:, n_in]).to(weight.dtype)
    return state


def _bias_name(problem: Problem) -> str | None:
    """The bias, if there is one and it may change."""
    name = next(iter(problem.space.sites[0].parameters)).removesuffix("weight") + "bias"
    has = problem.space.sites[0].module.bias is not None
    return name if has and (name in problem.scope or problem.space.sites[0].include_bias) else None
