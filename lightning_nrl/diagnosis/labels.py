"""Which failures have a label that looks wrong, without the rest of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_nrl.batches import Source
from lightning_nrl.collective import Collective
from lightning_nrl.diagnosis.features import see
from lightning_nrl.diagnosis.neighbours import doubtful, neighbours
from lightning_nrl.diagnosis.room import last_linear
from lightning_nrl.evidence import Context, Evidence
from lightning_nrl.targets import AllFailures
from lightning_nrl.tasks import Task

__all__ = ["doubtful_labels"]


def doubtful_labels(
    model: nn.Module,
    known: Sequence[Source],
    evidence: Evidence,
    *,
    task: Task,
    context: Context = nullcontext,
    collective: Collective | None = None,
) -> Tensor:
    """Targets whose label the model and the nearest passed samples agree to be another, `N` bool.

    One pass over the known data, or over those that matter most of very many. None is found where no Linear layer gives
    the logits.

    Args:
        model: in evaluation mode.
        known: this rank's share of the splits.
        evidence: what the model does on them.
        task: what passed means.
        context: entered around every forward pass.
        collective: the ranks that share the data.
    """
    found = torch.zeros_like(evidence.passed)
    means = {"task": task, "context": context, "collective": collective}
    features = see(model, known, last_linear(model)[1], target=AllFailures(), **means).features  # type: ignore[arg-type]
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
