"""Which failures have a label that looks wrong, without the rest of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nrl._model.layers import last_linear
from lightning_nrl.data.batch import Source
from lightning_nrl.data.targets import AllFailures
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.head_features import collect_features
from lightning_nrl.evaluation.neighbors import doubtful, neighbours
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["find_label_issues"]


def find_label_issues(evaluator: Evaluator, known: Sequence[Source], evidence: SampleResults) -> Tensor:
    """Targets whose label the model and the nearest passed samples agree to be another, `N` bool.

    One pass over the known data, or over those that matter most of very many. None is found where no Linear layer gives
    the logits.

    Args:
        evaluator: the model and what passed means.
        known: this rank's share of the splits.
        evidence: what the model does on them.
    """
    found = torch.zeros_like(evidence.passed)
    features = collect_features(evaluator, known, last_linear(evaluator.model)[1], AllFailures()).features
    if features is None:
        return found
    label, passed, targeted = (x[features.rows] for x in (evidence.label, evidence.passed, evidence.targeted))
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
