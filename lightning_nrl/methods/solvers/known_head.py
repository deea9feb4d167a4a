"""The last Linear layer of a model on its known data, and what a change of it restores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.state import State
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.head_features import head_features
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.methods.budget import MAX_PAIRS
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import choose_samples
from lightning_nrl.methods.solution import Proposal
from lightning_nrl.methods.solvers.convex_head import ConvexHead, regularization_path


def restored_by_head(problem: Problem, start: Proposal, price: float) -> Proposal:
    """Restores what `start` breaks by the smallest change of the last Linear layer.

    What is right with `start` stays right. A broken sample's missing margin has a price, as that
    of a target in `Convex`. If the last pass was recorded, neither the change nor its results take
    another. Returns `start` if the layer is not the chosen one or may not change, or if this
    restores nothing.
    """
    before, task = problem.before, problem.evaluator.task
    broken = before.passed & ~start.after.passed & start.after.loss.isfinite()
    kept = start.after.right & (before.passed | before.targeted)
    has_classes = task.by_arg_max and bool((before.label >= 0).all())
    is_recorded = problem.record.is_trusted and problem.record.cache is not None
    may_change = is_recorded and _weight_of(problem.space) in problem.scope
    if not (broken.any() and kept.any() and has_classes and may_change):
        return start
    with problem.clock.stage("solve"):
        work = partial(_restoring_head, problem, start, kept, broken, price)
        head = problem.work.once("head", work, dict[str, Tensor])
        proposal = problem.propose("head", {**start.state, **head})
    return proposal if proposal.rank > start.rank else start


@torch.no_grad()
def _restoring_head(
    problem: Problem, start: Proposal, kept: Tensor, broken: Tensor, price: float
) -> dict[str, Tensor]:
    def is_over() -> bool:
        return problem.deadline.seconds_left <= 0  # of the rank that solves for all

    with problem.starting_at(start) as moved:
        moved = replace(moved, before=replace(moved.before, passed=kept, targeted=broken))
        try:
            known = KnownHead.record(moved)
        except ConfigurationError:  # with these weights, the layer does not give the logits
            return {}
        changes = []
        if problem.collective.rank == 0:
            every = torch.ones_like(known.head.targeted)
            path = regularization_path(known.head, [price], every, is_over, MAX_PAIRS)
            changes = [change.to("cpu") for change in path]
        (change,) = problem.collective.of_first(changes)
        return dict(head_state(moved, change.to(known.head.logits)))


@dataclass(frozen=True)
class KnownHead:
    """The recorded layer on the known samples, or on `Problem.n_scored` of them."""

    passed: Tensor  # N bool, before a change
    recorded: Tensor  # N bool
    rows: Tensor  # N bool, recorded samples that passed or are targets
    head: ConvexHead  # the layer on these samples
    remaining: ConvexHead  # the layer on all other recorded samples
    note: str  # how many samples are recorded; empty if all are

    @classmethod
    def record(cls, problem: Problem) -> KnownHead:
        """Runs the model once.

        Raises a `ConfigurationError` on all ranks if the layer's output is not the logits.
        """
        before = problem.before
        keep = torch.ones_like(before.passed)
        note = ""
        if len(before) > problem.n_scored:
            choice = choose_samples(before, before.passed, problem.n_scored, problem.seed)
            keep, note = choice.recorded, choice.note
        features, logits = _recorded(problem, keep)
        label = before.label[keep].to(features.device)
        targeted = before.targeted[keep].to(features.device)
        weight = before.weight[keep].to(features)
        has_bias = _may_change_bias(problem)

        def head(mask: Tensor) -> ConvexHead:
            rows = mask[keep].nonzero().flatten().to(features.device)
            return ConvexHead(
                features, logits, rows, label[rows], targeted[rows], weight[rows], has_bias
            )

        used = keep & (before.passed | before.targeted)
        return cls(before.passed, keep, used, head(used), head(keep & ~used), note)

    def right(self, change: Tensor) -> Tensor:
        """Marks the known samples that are right, `N` bool, after a change of the weights.

        Samples that are not recorded count as unchanged.
        """
        right = self.passed.clone()
        right[self.rows] = self.head.right(change).cpu()
        remaining = self.remaining
        blocks = remaining.blocks(remaining.all)
        predicted = torch.cat([remaining.changed(change, block).argmax(1) for block in blocks])
        right[self.recorded & ~self.rows] = (predicted == remaining.label).cpu()
        return right


@torch.no_grad()
def _recorded(problem: Problem, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the layer's inputs, `n x d`, and logits, `n x C`, of the `n` known samples to keep.

    They are in the order of the results.
    """
    head = problem.space.sites[0].module
    assert isinstance(head, torch.nn.Linear)
    record = None if problem.record.cache is None else problem.record.cache.head
    rows = keep.nonzero().flatten()
    features = head_features(problem.evaluator, problem.known, head, problem.before, rows, record)
    if features is None:
        raise not_last(problem.space)
    return features.inputs, features.logits


def not_last(space: ParameterSpace) -> ConfigurationError:
    """Returns the error for a chosen layer that does not give the logits."""
    layer = space.sites[0].name
    return ConfigurationError(
        f"`method='convex'`: the output of `layer={layer!r}` is not the model's logits.",
        "name the last Linear layer, or use `method='finetune-polish'`.",
    )


def head_state(problem: Problem, change: Tensor) -> State:
    """Returns the layer's parameters after `change`, `C x d`, which may have a column of biases."""
    site = problem.space.sites[0]
    layer = site.module
    weight = layer.weight.detach()
    n_in = weight.shape[1]
    if len(weight) == 1:
        change = change[1:] - change[:1]
    name = _weight_of(problem.space)
    state = {name: (weight + change[:, :n_in]).to(weight.dtype)}
    if layer.bias is not None and _may_change_bias(problem):
        state[_bias_of(name)] = (layer.bias.detach() + change[:, n_in]).to(weight.dtype)
    return state


def _may_change_bias(problem: Problem) -> bool:
    site = problem.space.sites[0]
    is_in_scope = _bias_of(_weight_of(problem.space)) in problem.scope
    return site.module.bias is not None and (is_in_scope or site.include_bias)


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _weight_of(space: ParameterSpace) -> str:
    return next(iter(space.sites[0].parameters))
