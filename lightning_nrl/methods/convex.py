"""Repairing a last Linear layer by convex optimisation: a path over strength, its point chosen by cross-validation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, InseparableBatchError, check_whole
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods._solvers.convex_head import ROWS_PER_BLOCK, ConvexHead, regularization_path
from lightning_nrl.methods.budget import RECORDING_PASSES, TRIAL_PASSES
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import record_known
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.report.run_records import Step
from lightning_nrl.search._scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl.search._scoring.replay_plan import same_values

SLACK_COSTS = tuple(2.0**power for power in range(-4, 6))
"""What a target's missing margin may cost, in units of what the median target would take if it were the only one."""

N_FOLDS = 4
"""Of the samples that came in with the failed ones, each is held out once."""

REGRESSION_PRICE = 1
"""Held-out repairs that a held-out regression costs: the path is followed as long as its steps repair more than they
break, so that the whole of it repairs several times as many."""

DEPLOYED_FRACTIONS = (1.0, 0.98, 0.9, 0.75, 0.5, 0.25)
"""Fractions of a change that are tried on the deployed model: rounding may differ from that of the recording."""


NO_TIME_TO_SOLVE = "there was no time left to solve anything."


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


@dataclass(frozen=True)
class _KnownHead:
    """The layer on the known samples: those that count, `N` bool, and the rest."""

    rows: Tensor
    head: ConvexHead
    rest: ConvexHead

    @classmethod
    def recorded(cls, problem: Problem) -> _KnownHead:
        found = record_head(problem, _bias_name(problem) is not None)
        before = problem.before
        rows = before.passed | before.targeted
        return cls(rows, found.head(problem, rows, before.targeted), found.head(problem, ~rows, before.targeted))

    def counted(self, problem: Problem, change: Tensor, strength: float) -> Proposal:
        """What a change does to the known samples, by what was recorded; without its weights."""
        before, right = problem.before, torch.zeros_like(problem.before.passed)
        right[self.rows] = self.head.right(change).cpu()
        right[~self.rows] = _right_of_rest(self.rest, change).cpu()
        return problem.counted(f"convex {strength:g}", {}, replace(before, passed=right))


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

    needs: ClassVar[tuple[Need, ...]] = ("classes", "recording")
    patience: int | None = None
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.patience is not None:
            check_whole("Convex.patience", self.patience, 1)

    def check_recording(self, recording: ActivationCache) -> None:
        """Refuses layers that are not the one last Linear by a `ConfigurationError`."""
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
        check_needs(Convex.needs, problem.before, problem.evaluator.task)
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
            points = [known.counted(problem, *one) for one in zip(changes, SLACK_COSTS, strict=False)]
        del known
        seconds = (time.perf_counter() - began) / len(points)
        steps = [
            point.step(seconds, f"strength {strength:g}; held out {one.gained} repaired, {one.lost} broken")
            for point, strength, one in zip(points, SLACK_COSTS, held, strict=False)
        ]
        best = _best(held, points)
        tried = tuple(
            problem.target_counts(point.after) for i, point in enumerate(points) if i != best and point.repaired
        )
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
        for i, (change, found) in enumerate(_solved(problem, known, patience, end)):
            changes[i], held[i] = change, torch.tensor(found)
            made += 1
    changes, held, made = (collective.agreed(x) for x in (changes, held, made))
    return list(changes[: int(made)]), [
        _HeldOutFlips(int(a), int(b), c, d, int(e)) for a, b, c, d, e in held[: int(made)].tolist()
    ]


def _solved(
    problem: Problem, known: _KnownHead, patience: int | None, end: Deadline
) -> Iterator[tuple[Tensor, _HeldOutFlips]]:
    """The change at each strength that all samples ask for, and what changes made without a fold do on that fold.

    A strength that time cuts short is left out, but for the first.
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
        yield change, _HeldOutFlips(int(gained.sum()), int(lost.sum()), *weights, n_others)
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
    fold, here = torch.full_like(before.label, -1), problem.came_with_failures & problem.used
    generator = torch.Generator().manual_seed(problem.seed)
    for kind in (before.passed, before.targeted, ~before.passed & ~before.targeted):
        which = (here & kind).nonzero().flatten()
        fold[which] = torch.randperm(len(which), generator=generator) % N_FOLDS
    return fold


def _best(held: list[_HeldOutFlips], points: list[Proposal]) -> int:
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
    module, n_in = problem.space.sites[0].module, problem.space.sites[0].module.weight.shape[1]
    weight = module.weight.detach()
    state = {next(iter(problem.space.sites[0].parameters)): (weight + change[:, :n_in]).to(weight.dtype)}
    bias = _bias_name(problem)
    if bias is not None and module.bias is not None:
        state[bias] = (module.bias.detach() + change[:, n_in]).to(weight.dtype)
    return state


def _bias_name(problem: Problem) -> str | None:
    name = next(iter(problem.space.sites[0].parameters)).removesuffix("weight") + "bias"
    has = problem.space.sites[0].module.bias is not None
    return name if has and (name in problem.scope or problem.space.sites[0].include_bias) else None


ROWS_PER_COPY = 4096
"""Samples that are compared, or copied out of a recording, at once."""


class HeadInputs(NamedTuple):
    """The layer's inputs and outputs by row of the results, at least float32."""

    features: Tensor  # N x d
    logits: Tensor  # N x C
    ones: bool  # whether a column of ones, for the bias, is still to be put beside the features

    def head(self, problem: Problem, rows: Tensor, targeted: Tensor) -> ConvexHead:
        """Some of the samples, `N` bool; those of them that are targeted are to be repaired."""
        device, before = self.features.device, problem.before
        mine = rows.to(device)
        label, own = before.label.to(device)[mine], targeted.to(device)[mine]
        weight = before.weight.to(self.features)[mine] if before.weighted else None
        if bool(rows.all()):
            return ConvexHead(self.features, self.logits, label, own, weight, None, self.ones)
        if len(rows) <= ROWS_PER_BLOCK:
            return ConvexHead(self.features[mine], self.logits[mine], label, own, weight, None, self.ones)
        return ConvexHead(self.features, self.logits, label, own, weight, mine.nonzero().flatten(), self.ones)


@torch.no_grad()
def record_head(problem: Problem, has_bias: bool) -> HeadInputs:
    """Runs the model once over all known data.

    Raises:
        ConfigurationError: the layer's output is not the logits, on some rank.
    """
    site = problem.space.sites[0]
    try:
        recording = record_known(problem, torch.ones_like(problem.before.passed))
    except InseparableBatchError as error:
        raise not_last(site.name) from error
    held = _held(recording)
    features, logits = held if held is not None else _copied(recording, site.module.weight.shape)
    # On all ranks alike, also where one has no such samples, or none at all.
    if problem.collective.any(features is None or logits is None):
        raise not_last(site.name)
    assert features is not None
    assert logits is not None
    rows = torch.cat(problem.collective.gather(recording.rows))
    del recording
    if problem.collective.world_size > 1:
        features, logits = (torch.cat(problem.collective.gather(x)) for x in (features, logits))
    if not torch.equal(rows, torch.arange(len(rows))):
        order = rows.argsort().to(features.device)
        features, logits = features[order], logits[order]
    if has_bias and len(features) <= ROWS_PER_BLOCK:
        return HeadInputs(F.pad(features, (0, 1), value=1.0), logits, False)
    return HeadInputs(features, logits, has_bias)


def check_last(recording: ActivationCache) -> None:
    """Refuses a layer whose output is not what the model returns as logits, by a recording of some samples."""
    for chunk in recording.chunks(ROWS_PER_COPY):
        if _direct(recording, chunk) is None:
            raise not_last(recording.space.sites[0].name)


def not_last(name: str) -> ConfigurationError:
    """The error for a layer that is not the last one."""
    return ConfigurationError(
        f"`method='convex'`: the output of `layer={name!r}` is not what the model returns as logits.",
        "name the last Linear layer, or use `method='linearized'`.",
    )


def _held(recording: ActivationCache) -> tuple[Tensor | None, Tensor | None] | None:
    """The recorded tensors themselves, where they are as they are needed; twice None unless the layer is the last."""
    if len(recording.groups) != 1 or recording.groups[0].recomputed:
        return None
    whole = next(iter(recording.chunks()), None)
    if whole is None or not recording.is_replayable(whole):
        return None
    x, y = recording.activations(whole)
    fits = all(t.ndim == 2 and t.is_contiguous() and t.dtype in (torch.float32, torch.float64) for t in (x, y))
    if not fits or x.dtype != y.dtype:
        return None
    is_last = all(_direct(recording, chunk) is not None for chunk in recording.chunks(ROWS_PER_COPY))
    return (x, y) if is_last else (None, None)


def _copied(recording: ActivationCache, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    n, (n_out, n_in) = len(recording.rows), shape
    features, logits = (torch.empty(n, size, device=recording.space.device) for size in (n_in, n_out))
    start = 0
    for chunk in recording.chunks(ROWS_PER_COPY):
        part = _direct(recording, chunk)
        if part is None:
            return None, None
        if part[0].dtype != features.dtype:
            features, logits = features.to(part[0].dtype), logits.to(part[0].dtype)
        here = slice(start, start + len(chunk))
        features[here], logits[here] = part
        start += len(chunk)
    return features, logits


def _direct(recording: ActivationCache, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
    """A chunk's input and output of the layer; None unless the output is what the model returns."""
    if recording.is_replayable(chunk):
        x, y = recording.activations(chunk)
        logits = recording.replay(chunk, lambda site, x, y: y)
        if x.ndim == 2 and same_values(y, logits):
            return at_least_float32(x), at_least_float32(y)
    return None
