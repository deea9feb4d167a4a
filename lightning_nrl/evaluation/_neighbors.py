"""How mixed the neighbourhoods of samples are in the features before the last layer, and which labels are doubtful."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._model.layers import last_linear
from lightning_nrl.data.batch import Source
from lightning_nrl.data.targets import AllFailures
from lightning_nrl.evaluation._head_features import collect_features
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["NEIGHBOURS", "Neighbours", "doubtful", "find_label_issues", "neighbours"]

NEIGHBOURS = 10
"""Passed samples that a sample is compared with."""

MAX_SIMILARITIES = 2**24
"""Most similarities that are held at once."""

AGREEMENT_SHARE = 0.9
"""Share of the neighbours that must have the predicted class before a label is doubted."""


class Neighbours(NamedTuple):
    """The nearest passed samples of each sample."""

    agreement: Tensor  # n float, share of them that have the sample's own label; NaN if there are none
    label: Tensor  # n int64, the label that most of them have; the smallest of several
    share: Tensor  # n float, share of them that have it


@torch.no_grad()
def neighbours(
    inputs: Tensor,
    label: Tensor,
    passed: Tensor,
    passed_label: Tensor,
    *,
    itself: Tensor | None = None,
    k: int = NEIGHBOURS,
) -> Neighbours:
    """Compares labels with those of the k nearest passed samples, by the cosine of centred features.

    Args:
        inputs: `n x D`, features of the samples.
        label: `n` int64.
        passed: `P x D`, features of the passed samples.
        passed_label: `P` int64.
        itself: `n` int64, which passed sample each one is; it is no neighbour of its own.
        k: how many are compared with; all where there are fewer.
    """
    middle = passed.mean(0)
    left, right = (F.normalize(x - middle, dim=1) for x in (inputs, passed))
    k = min(k, len(passed) - (itself is not None))
    if k < 1 or not len(inputs):
        agreement = torch.full_like(label, torch.nan, dtype=torch.float32)
        return Neighbours(agreement, torch.full_like(label, -1), torch.zeros_like(agreement))
    classes = int(torch.cat([label, passed_label]).max()) + 1
    counts = []
    for at in torch.arange(len(left), device=left.device).split(max(1, MAX_SIMILARITIES // len(right))):
        likeness = left[at] @ right.T
        if itself is not None:
            likeness.scatter_(1, itself[at, None], -torch.inf)
        near = passed_label[likeness.topk(k, dim=1).indices]
        votes = torch.zeros(len(at), classes, device=left.device)
        counts.append(votes.scatter_add_(1, near, torch.ones_like(near, dtype=votes.dtype)))
    shares = torch.cat(counts) / k
    share, most = shares.max(1)
    return Neighbours(shares.gather(1, label[:, None])[:, 0], most, share)


def doubtful(near: Neighbours, label: Tensor, logits: Tensor, passed_logits: Tensor, passed_label: Tensor) -> Tensor:
    """Samples with a doubtful label, `n` bool: neighbours and model agree on another class, and the model is sure.

    Sure means: by as large a lead over the given label as it has, at the median, over the runner-up where it is right
    about that class. So there is no threshold to choose. Shapes: `label` is `n` int64, `logits` `n x C`, those of the
    passed samples `P` and `P x C`.
    """
    prediction = logits.argmax(1)
    lead = (logits.gather(1, prediction[:, None]) - logits.gather(1, label[:, None]))[:, 0]
    top = passed_logits.topk(2, dim=1).values
    usual = torch.full((logits.shape[1],), torch.inf, dtype=top.dtype, device=top.device)
    for c in passed_label.unique().tolist():
        usual[c] = (top[:, 0] - top[:, 1])[passed_label == c].median()
    agreed = (near.label == prediction) & (near.share >= AGREEMENT_SHARE) & (prediction != label)
    return agreed & (lead >= usual[prediction])


def find_label_issues(evaluator: Evaluator, known: Sequence[Source], results: SampleResults) -> Tensor:
    """Targets whose label the model and the nearest passed samples agree to be another, `N` bool.

    One pass over the known data, or over those that matter most of very many. None is found where no Linear layer gives
    the logits. `results` are what the model does on this rank's share of the splits.
    """
    found = torch.zeros_like(results.passed)
    _, head = last_linear(evaluator.model, evaluator.called)
    features = collect_features(evaluator, known, head, AllFailures()).features
    if features is None:
        return found
    label, passed, targeted = (x[features.rows] for x in (results.label, results.passed, results.targeted))
    right = features.logits.argmax(1).cpu() == label
    targets, kept = (targeted & ~right).nonzero().flatten(), (passed & right).nonzero().flatten()
    if not len(targets) or not len(kept):
        return found
    device = features.inputs.device
    label, mine, theirs = label.to(device), targets.to(device), kept.to(device)
    near = neighbours(features.inputs[mine], label[mine], features.inputs[theirs], label[theirs])
    doubted = doubtful(near, label[mine], features.logits[mine], features.logits[theirs], label[theirs])
    found[features.rows[targets[doubted.cpu()]]] = True
    return found
