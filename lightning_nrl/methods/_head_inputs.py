"""What a last Linear layer gets and gives on all known samples, each number held once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._convex.head import ROWS_PER_BLOCK, ConvexHead
from lightning_nrl._scoring import ActivationCache, Chunk
from lightning_nrl._scoring.replay_plan import same_values
from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl.errors import ConfigurationError, InseparableBatchError
from lightning_nrl.methods._known_activations import record_known
from lightning_nrl.problem import Problem

__all__ = ["HeadInputs", "check_last", "record_head"]

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
    """The same copied out of the recording, part by part."""
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
