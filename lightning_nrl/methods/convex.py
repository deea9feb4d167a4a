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

from lightning_nrl._convex.head import ConvexHead, regularization_path
from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._scoring import ActivationCache, Chunk
from lightning_nrl._scoring.plan_search import same_values
from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, InseparableBatchError, check_whole
from lightning_nrl.evaluation.flips import TargetCounts
from lightning_nrl.evaluation.requirements import Need, check_needs
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods._known_activations import record_known
from lightning_nrl.problem import Problem, Proposal, Solution
from lightning_nrl.report.run_records import Step

__all__ = ["Convex"]

SLACK_COSTS = tuple(2.0**power for power in range(-4, 6))
"""What a target's missing margin may cost, in units of what the median target would take if it were the only one."""

N_FOLDS = 4
"""Of the samples that came in with the failed ones, each is held out once."""

ROWS_PER_COPY = 4096
"""Samples whose features are copied out of a recording at once."""

REGRESSION_PRICE = 1
"""Held-out repairs that a held-out regression costs: the path is followed as long as its steps repair more than they
break, so that the whole of it repairs several times as many."""

DEPLOYED_FRACTIONS = (1.0, 0.98, 0.9, 0.75, 0.5, 0.25)
"""Fractions of a change that are tried on the deployed model: rounding may differ from that of the recording."""


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
        for chunk in recording.chunks(ROWS_PER_COPY):
            if _direct(recording, chunk) is None:
                raise _not_last(recording.space.sites[0].name)

    def __call__(self, problem: Problem) -> Solution:
        """Solves along strengths, and takes the strongest that held-out samples speak for.

        Raises:
            ConfigurationError: there are several layers, the layer's output is not the logits, or the task has no
                classes.
        """
        began = time.perf_counter()
        _check_layers(problem.space)
        check_needs(Convex.needs, problem.before, problem.task)
        with problem.clock.stage("record"):
            features, logits = _recorded(problem)
        with problem.clock.stage("solve"):
            end = problem.deadline_of_method().within(self.seconds)
            changes, held = _path(problem, features, logits, self.patience, end)
        if not len(changes):
            return Solution(None, "there was no time left to solve anything.")
        points = [
            _point(problem, features, logits, change, strength)
            for change, strength in zip(changes, SLACK_COSTS, strict=False)
        ]
        seconds = (time.perf_counter() - began) / len(points)
        steps = [
            point.step(seconds, f"strength {strength:g}; held out {one.gained} repaired, {one.lost} broken")
            for point, strength, one in zip(points, SLACK_COSTS, held, strict=False)
        ]
        best = _best(held, points)
        others = tuple(point for i, point in enumerate(points) if i != best and point.repaired)
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
            return Solution(None, reason, tuple(steps), others, held_out=held_out)
        return Solution(proposal, steps=tuple(steps), others=others, held_out=held_out)


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
def _recorded(problem: Problem) -> tuple[Tensor, Tensor]:
    """The layer's inputs, `N x d`, with a column of ones if its bias may change, and its outputs, by row."""
    site = problem.space.sites[0]
    try:
        recording = record_known(problem, torch.ones_like(problem.before.passed))
    except InseparableBatchError as error:
        raise _not_last(site.name) from error
    n_in, n_out, has_bias = site.module.weight.shape[1], site.module.weight.shape[0], _bias_name(problem) is not None
    # Filled part by part, so that beside the recording it is held once.
    own = torch.ones(len(recording.rows), n_in + has_bias + n_out, device=problem.space.device)
    start, is_last = 0, True
    for chunk in recording.chunks(ROWS_PER_COPY):
        part = _direct(recording, chunk)
        if part is None:
            is_last = False
            break
        if part[0].dtype != own.dtype:
            own = own.to(part[0].dtype)
        here = slice(start, start + len(chunk))
        own[here, :n_in], own[here, n_in + has_bias :] = part
        start += len(chunk)
    # On all ranks alike, also where one has no such samples, or none at all.
    if problem.collective.any(not is_last):
        raise _not_last(site.name)
    rows = torch.cat(problem.collective.gather(recording.rows))
    del recording
    whole = torch.cat(problem.collective.gather(own)) if problem.collective.world_size > 1 else own
    if not torch.equal(rows, torch.arange(len(rows))):
        whole = whole[rows.argsort().to(whole.device)]
    return whole[:, : n_in + has_bias], whole[:, n_in + has_bias :]


def _not_last(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"`method='convex'`: the output of `layer={name!r}` is not what the model returns as logits.",
        "name the last Linear layer, or use `method='linearized'`.",
    )


def _direct(recording: ActivationCache, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
    """A chunk's input and output of the layer; None unless the output is what the model returns."""
    if recording.is_replayable(chunk):
        x, y = recording.activations(chunk)
        logits = recording.replay(chunk, lambda site, x, y: y)
        if x.ndim == 2 and same_values(y, logits):
            return at_least_float32(x), at_least_float32(y)
    return None


@torch.no_grad()
def _path(
    problem: Problem, features: Tensor, logits: Tensor, patience: int | None, end: Deadline
) -> tuple[list[Tensor], list[_HeldOutFlips]]:
    """The change at each strength, `C x d`, and what it did to held-out samples; one rank solves for all."""
    collective, n = problem.collective, len(SLACK_COSTS)
    changes = torch.zeros(n, logits.shape[1], features.shape[1], device=features.device, dtype=features.dtype)
    held = torch.zeros(n, 5, dtype=torch.float64)
    made = torch.zeros((), dtype=torch.int64)
    if collective.rank == 0:
        for i, (change, *found) in enumerate(_solved(problem, features, logits, patience, end)):
            changes[i], held[i] = change, torch.tensor(found)
            made += 1
    changes, held, made = (collective.agreed(x) for x in (changes, held, made))
    return list(changes[: int(made)]), [
        _HeldOutFlips(int(a), int(b), c, d, int(e)) for a, b, c, d, e in held[: int(made)].tolist()
    ]


def _solved(
    problem: Problem, features: Tensor, logits: Tensor, patience: int | None, end: Deadline
) -> Iterator[tuple[Tensor, int, int, float, float, int]]:
    """The change at each strength that all samples ask for, and what changes made without a fold do on that fold.

    How many targets they repair, how many passed samples they break, what these weigh, and how many other failures they
    repair. A strength that time cuts short is left out, but for the first.
    """
    before, device = problem.before, features.device

    def is_over() -> bool:
        # Of this rank, which solves for all.
        return end.seconds_left <= 0

    known = (before.passed | before.targeted).to(device)
    weight = before.weight.to(features)[known] if before.weighted else None
    head = ConvexHead(
        features[known], logits[known], before.label.to(device)[known], before.targeted.to(device)[known], weight
    )
    by_row = _folds(problem)
    folds = by_row.to(device)
    fold, others = folds[known], ~known & (folds >= 0)
    other_labels = before.label.to(device)[others]
    used = [None, *(~problem.copies(by_row == number).to(device)[known] for number in range(N_FOLDS))]
    paths = [regularization_path(head, SLACK_COSTS, rows, is_over) for rows in used]
    counts = before.finite_weight.to(device)[known]
    worth: list[float] = []
    for change, *without in zip(*paths, strict=True):
        if worth and is_over():
            return
        flipped, n_others = torch.zeros_like(head.targeted), 0
        for number, made in enumerate(without):
            out = fold == number
            right = head.changed(made)[out].argmax(1) == head.label[out]
            flipped[out] = right == head.targeted[out]
            outputs = logits[others] + (features[others].to(made) @ made.T).to(logits)
            n_others += int(((outputs.argmax(1) == other_labels) & (folds[others] == number)).sum())
        gained, lost = flipped & head.targeted, flipped & ~head.targeted
        weights = float(counts[gained].sum()), float(counts[lost].sum())
        yield change, int(gained.sum()), int(lost.sum()), *weights, n_others
        worth.append(weights[0] - REGRESSION_PRICE * weights[1])
        is_past = patience is not None and len(worth) - 1 - worth.index(max(worth)) >= patience
        if is_over() or is_past:
            return


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


def _best(held: list[_HeldOutFlips], points: list[Proposal]) -> int:
    """Of the points whose slices lack the fewest repairs, what held-out samples speak for most; then the weakest."""
    worth = [one.gain - REGRESSION_PRICE * one.harm for one in held]
    return max(range(len(worth)), key=lambda i: (-points[i].missing, worth[i], points[i].repaired > 0, -i))


def _point(problem: Problem, features: Tensor, logits: Tensor, change: Tensor, strength: float) -> Proposal:
    """A point of the path, counted on the recorded features."""
    new, before = (logits + features @ change.T).cpu(), problem.before
    gaps = (new.gather(1, before.label[:, None]) - new).scatter(1, before.label[:, None], torch.inf).amin(1)
    loss = F.cross_entropy(new, before.label, reduction="none")
    prediction = new.argmax(1)
    after: SampleResults = replace(
        before, prediction=prediction, passed=prediction == before.label, margin=gaps, loss=loss.to(before.loss)
    )
    return problem.counted(f"convex {strength:g}", _state(problem, change), after)


def _deployed(problem: Problem, change: Tensor) -> tuple[Proposal | None, float]:
    """The greatest share of a change that breaks nothing when the deployed model runs with it."""
    for share in DEPLOYED_FRACTIONS:
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
