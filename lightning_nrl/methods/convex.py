"""Repairs the last Linear layer by convex optimisation at several prices; cross-validation
chooses one of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, InseparableBatchError, check_whole
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.methods.budget import RECORDING_PASSES, TRIAL_PASSES
from lightning_nrl.methods.held_out import estimate
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import record_known
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.solvers.convex_head import (
    ROWS_PER_BLOCK,
    ConvexHead,
    regularization_path,
)
from lightning_nrl.records.steps import CUT, Step
from lightning_nrl.search.scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl.search.scoring.replay_plan import same_values

# Prices of a target's missing margin. At 1 the median target would just be repaired on its own.
PRICES = tuple(2.0**power for power in range(-4, 6))
N_FOLDS = 4  # each sample from data sets with failures to repair is held out once
REGRESSION_PRICE = 1  # of a held-out regression, in held-out repairs
# Parts of the change, tried in turn, since the deployed model may round differently from the
# recording.
DEPLOYED_FRACTIONS = (1.0, 0.98, 0.9, 0.75, 0.5, 0.25)
ROWS_PER_COPY = 4096  # samples that are compared, or copied out of a recording, at once
NO_TIME_TO_SOLVE = "no time was left to solve anything."


@dataclass(frozen=True)
class Convex(Method):
    """Repairs the last Linear layer by the smallest change of the logits that breaks no known
    passed
    sample.

    The margin that a target lacks has a price: a higher price repairs more and changes more. Ten
    prices are tried, from low to high. The price with most repairs minus regressions in cross-validation wins.

    Attributes:
        patience: stops after this many prices in a row without a better held-out result. None
            means no limit.
        seconds: time limit in seconds.
        max_pairs: stops after a price that needs more than this number of constraints. A
            constraint is about one sample and one wrong class. None means no limit.

    Raises:
        ConfigurationError: on construction, for a `patience` or `max_pairs` below 1; when called,
            for several layers, a layer whose output is not the logits, or a task without classes.
    """

    needs: ClassVar[tuple[Need, ...]] = ("classes", "recording")
    patience: int | None = None
    seconds: float = math.inf
    max_pairs: int | None = None

    def __post_init__(self) -> None:
        for name in ("patience", "max_pairs"):
            if getattr(self, name) is not None:
                check_whole(f"Convex.{name}", getattr(self, name), 1)

    def check_recording(self, recording: ActivationCache) -> None:
        """Raises a `ConfigurationError` if the layer is not a Linear layer whose output is the
        logits.
        """
        _check_layers(recording.space)
        if any(_read_chunk(recording, chunk) is None for chunk in recording.chunks(ROWS_PER_COPY)):
            raise _not_last(recording.space)

    def __call__(self, problem: Problem) -> Solution:
        """Solves at each price and takes the price that does best on held-out samples."""
        began, before = time.perf_counter(), problem.before
        _check_layers(problem.space)
        check_needs(Convex.needs, before, problem.evaluator.task)
        end = problem.deadline_of_method().within(self.seconds)
        if not end.leaves(RECORDING_PASSES * problem.clock.one_pass):
            return Solution(None, NO_TIME_TO_SOLVE)
        with problem.clock.stage("record"):
            known = _KnownHead.recorded(problem)
        with problem.clock.stage("solve"):
            # Time is kept to count the chosen change in the deployed model.
            end = end.earlier(problem.clock.one_pass)
            changes, held_out = _path(problem, known, self, end)
            is_cut = problem.deadline.is_set and len(changes) < len(PRICES) and end.is_over()
            if not changes:
                return Solution(None, NO_TIME_TO_SOLVE)
            points = [
                problem.counted(
                    f"convex, price {price:g}", {}, replace(before, passed=known.right(change))
                )
                for change, price in zip(changes, PRICES, strict=False)
            ]
        del known
        seconds, folded = (time.perf_counter() - began) / len(points), _folds(problem) >= 0
        estimates = [estimate(before, replace(before, passed=right), folded) for right in held_out]
        steps = [
            replace(
                point.step(
                    seconds,
                    f"held-out: {counts.repaired_in_target} repaired, {counts.broken} broken",
                ),
                kind="alternative",
            )
            for point, counts in zip(points, estimates, strict=True)
        ]
        worth = [_worth(problem, right) for right in held_out]
        best = max(
            range(len(worth)),
            key=lambda i: (-points[i].missing, worth[i], points[i].repaired > 0, -i),
        )
        others = (point for i, point in enumerate(points) if i != best and point.repaired)
        tried = tuple(problem.target_counts(point.after) for point in others)
        with problem.clock.stage("judge"):
            began = time.perf_counter()
            proposal, share = _deployed(problem, changes[best])
            seconds = time.perf_counter() - began
            note = f"price {PRICES[best]:g} is chosen" + (
                f", {share:.0%} of it" if share < 1 else ""
            )
            note += f"; higher prices were {CUT}" if is_cut else ""
            steps.append(
                proposal.step(seconds, note, was_cut=is_cut)
                if proposal
                else Step("convex", 0, 0, round(seconds, 3), note, is_cut)
            )
        none = "the change of the layer that is best on held-out samples repairs no target without a regression."
        reason = "" if proposal else none
        return Solution(proposal, reason, tuple(steps), tried=tried, held_out=estimates[best])


def _check_layers(space: ParameterSpace) -> None:
    names = [site.name for site in space.sites]
    if not names:
        raise ConfigurationError(space.obstacle, "name the last Linear layer as `layer`.")
    if len(names) > 1 or not isinstance(space.sites[0].module, torch.nn.Linear):
        raise ConfigurationError(
            f"`method='convex'` repairs only the last Linear layer, but `layer` names {names}.",
            "leave `layer` at 'auto', or use `method='linearized'`.",
        )


def _not_last(space: ParameterSpace) -> ConfigurationError:
    return ConfigurationError(
        f"`method='convex'`: the output of `layer={space.sites[0].name!r}` is not the model's logits.",
        "name the last Linear layer, or use `method='linearized'`.",
    )


@torch.no_grad()
def _path(
    problem: Problem, known: _KnownHead, method: Convex, end: Deadline
) -> tuple[list[Tensor], list[Tensor]]:
    collective, n, logits = problem.collective, len(PRICES), known.head.logits
    changes = torch.zeros(
        n, logits.shape[1], known.head.n_features, device=logits.device, dtype=logits.dtype
    )
    right, made = (
        torch.zeros(n, len(known.rows), dtype=torch.uint8),
        torch.zeros((), dtype=torch.int64),
    )
    if collective.rank == 0:
        for i, (change, held_out) in enumerate(_solved(problem, known, method, end)):
            changes[i], right[i] = change, held_out
            made += 1
    changes, right, made = (collective.agreed(x) for x in (changes, right, made))
    return list(changes[: int(made)]), list(right[: int(made)].bool())


def _solved(
    problem: Problem, known: _KnownHead, method: Convex, end: Deadline
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each price the change, `C x d`, and which samples are right in the
    cross-validation, `N` bool.

    The samples of a fold are predicted with the change that was fitted without them. If time runs
    out at the first price, folds without a change are predicted with the original layer. A later
    price is left out instead.
    """

    def is_over() -> bool:
        return end.seconds_left <= 0  # of this rank, which solves for all ranks

    fold = _folds(problem)
    kept = (~problem.copies(fold == number)[known.rows] for number in range(N_FOLDS))
    used = [None, *(rows.to(known.head.label.device) for rows in kept)]
    paths = [
        regularization_path(known.head, PRICES, rows, is_over, method.max_pairs) for rows in used
    ]
    worth: list[float] = []
    for _ in PRICES:
        made: list[Tensor | None] = []
        for path in paths:
            change = None if is_over() else next(path, None)
            if change is None and (worth or not made):
                return
            made.append(change)
        if worth and is_over():
            return
        right = problem.before.passed.clone()
        for number, change in enumerate(made[1:]):
            if change is not None:
                right = torch.where(fold == number, known.right(change), right)
        assert made[0] is not None
        yield made[0], right
        worth.append(_worth(problem, right))
        problem.clock.tell(len(worth), len(PRICES))
        is_past = (
            method.patience is not None
            and len(worth) - 1 - worth.index(max(worth)) >= method.patience
        )
        if is_over() or is_past:
            return


def _worth(problem: Problem, right: Tensor) -> float:
    before, weight = problem.before, problem.before.finite_weight
    lost = float(weight[before.passed & ~right].sum())
    return float(weight[before.targeted & right].sum()) - REGRESSION_PRICE * lost


def _folds(problem: Problem) -> Tensor:
    """Draws a fold, `N` int64, for each sample from data sets with failures to repair. Other
    samples get -1.
    """
    before = problem.before
    fold, here = torch.full_like(before.label, -1), problem.came_with_failures & problem.used
    generator = torch.Generator().manual_seed(problem.seed)
    for kind in (before.passed, before.targeted, ~before.passed & ~before.targeted):
        which = (here & kind).nonzero().flatten()
        fold[which] = torch.randperm(len(which), generator=generator) % N_FOLDS
    return fold


def _deployed(problem: Problem, change: Tensor) -> tuple[Proposal | None, float]:
    """Finds the largest part of a change with which the deployed model breaks nothing. None if it
    repairs nothing.
    """
    for number, share in enumerate(DEPLOYED_FRACTIONS):
        if number and not problem.deadline.leaves(TRIAL_PASSES * problem.clock.one_pass):
            break
        proposal = problem.propose("convex", _state(problem, share * change))
        if not proposal.broken:
            return (proposal if proposal.repaired else None), share
    return None, 0.0


def _state(problem: Problem, change: Tensor) -> dict[str, Tensor]:
    site = problem.space.sites[0]
    weight, bias = site.module.weight.detach(), _bias_name(problem)
    n_in = weight.shape[1]
    if len(weight) == 1:
        change = change[1:] - change[:1]
    state = {next(iter(site.parameters)): (weight + change[:, :n_in]).to(weight.dtype)}
    if bias is not None and site.module.bias is not None:
        state[bias] = (site.module.bias.detach() + change[:, n_in]).to(weight.dtype)
    return state


def _bias_name(problem: Problem) -> str | None:
    site = problem.space.sites[0]
    name = next(iter(site.parameters)).removesuffix("weight") + "bias"
    return (
        name
        if site.module.bias is not None and (name in problem.scope or site.include_bias)
        else None
    )


@dataclass(frozen=True)
class _KnownHead:
    """The layer's values: `head` has passed and targeted samples (`rows`, `N` bool), `rest` all
    other known samples.
    """

    rows: Tensor
    head: ConvexHead
    rest: ConvexHead

    @classmethod
    def recorded(cls, problem: Problem) -> _KnownHead:
        """Runs the model once; raises a `ConfigurationError` on all ranks if the layer's output is
        not the logits.
        """
        before = problem.before
        features, logits = _recorded(problem)
        device, ones = features.device, _bias_name(problem) is not None
        if ones and len(features) <= ROWS_PER_BLOCK:
            features, ones = F.pad(features, (0, 1), value=1.0), False

        def head(rows: Tensor) -> ConvexHead:
            own = rows.to(device)
            weight = before.weight.to(features)[own] if before.weighted else None
            label, targeted = before.label.to(device)[own], before.targeted.to(device)[own]
            if bool(rows.all()):
                return ConvexHead(features, logits, label, targeted, weight, None, ones)
            if len(rows) <= ROWS_PER_BLOCK:
                return ConvexHead(features[own], logits[own], label, targeted, weight, None, ones)
            return ConvexHead(
                features, logits, label, targeted, weight, own.nonzero().flatten(), ones
            )

        rows = before.passed | before.targeted
        return cls(rows, head(rows), head(~rows))

    def right(self, change: Tensor) -> Tensor:
        right, rest = torch.zeros_like(self.rows), torch.zeros_like(self.rest.targeted)
        right[self.rows] = self.head.right(change).cpu()
        for some in self.rest.blocks():
            rest[some] = self.rest.changed(change, some).argmax(1) == self.rest.label[some]
        right[~self.rows] = rest.cpu()
        return right


@torch.no_grad()
def _recorded(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns the layer's inputs, `N x d`, and logits, `N x C`, of the known samples in order, at
    least float32.
    """
    collective = problem.collective
    try:
        recording = record_known(problem, torch.ones_like(problem.before.passed))
    except InseparableBatchError as error:
        raise _not_last(problem.space) from error
    found = _inputs_and_logits(recording)
    if collective.any(found is None):
        raise _not_last(problem.space)
    assert found is not None
    rows = torch.cat(collective.gather(recording.rows))
    del recording
    features, logits = (
        found if collective.world_size == 1 else (torch.cat(collective.gather(x)) for x in found)
    )
    if not torch.equal(rows, torch.arange(len(rows))):
        order = rows.argsort().to(features.device)
        features, logits = features[order], logits[order]
    # A single logit belongs to class 1; class 0 gets the logit 0.
    return features, F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits


def _inputs_and_logits(recording: ActivationCache) -> tuple[Tensor, Tensor] | None:
    held = _recorded_tensors(recording)
    n, (n_out, n_in) = len(recording.rows), recording.space.sites[0].module.weight.shape
    x, y = held or (torch.empty(n, size, device=recording.space.device) for size in (n_in, n_out))
    start = 0
    for chunk in recording.chunks(ROWS_PER_COPY):
        part = _read_chunk(recording, chunk)
        if part is None:
            return None
        if held is None:
            x, y = x.to(part[0].dtype), y.to(part[0].dtype)
            here = slice(start, start + len(chunk))
            x[here], y[here] = part
            start += len(chunk)
    return x, y


def _recorded_tensors(recording: ActivationCache) -> tuple[Tensor, Tensor] | None:
    """Returns the recorded tensors, which saves a copy, or None if they cannot be used as they are."""
    if len(recording.groups) != 1 or recording.groups[0].recomputed:
        return None
    whole = next(iter(recording.chunks()), None)
    if whole is None or not recording.is_replayable(whole):
        return None
    x, y = recording.activations(whole)
    fits = all(
        t.ndim == 2 and t.is_contiguous() and t.dtype in (torch.float32, torch.float64)
        for t in (x, y)
    )
    return (x, y) if fits and x.dtype == y.dtype else None


def _read_chunk(recording: ActivationCache, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
    """Returns the layer's inputs and outputs for a chunk, or None if the outputs are not the
    logits.
    """
    if recording.is_replayable(chunk):
        x, y = recording.activations(chunk)
        logits = recording.replay(chunk, lambda site, x, y: y)
        if x.ndim == 2 and same_values(y, logits):
            return at_least_float32(x), at_least_float32(y)
    return None
