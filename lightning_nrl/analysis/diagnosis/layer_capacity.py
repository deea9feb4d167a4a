"""Estimates what a change of each layer can do, from gradients of margins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.device import no_autocast
from lightning_nrl.analysis.diagnosis.findings import LayerCapacity
from lightning_nrl.analysis.diagnosis.fixability import REQUIRED_MARGIN
from lightning_nrl.data import Batch
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.layer_gradients import (
    LayerCall,
    is_by_sample,
    margin_calls,
    sample_gradients,
)
from lightning_nrl.evaluation.layers import Layer, layers_of
from lightning_nrl.methods.solvers.qp import solve_duals

SKETCH_SIZE = 16_384  # gradients of layers with more weights are projected to this size at random
MAX_RELATIVE_CHANGE = 10.0  # relative to the layer's norm; larger changes count as impossible


@torch.no_grad()
def layer_capacities(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], results: SampleResults, seed: int
) -> tuple[LayerCapacity, ...]:
    """Estimates the change of each layer that fixes a typical target.

    `batches` has this rank's part of the samples to use: pairs of a batch and its samples' rows in
    `results`. Returns `()` without a layer or without a target that has a margin.
    """
    if not (results.targeted & results.has_margin).any():
        return ()
    layers = layers_of(evaluator.model)
    rows, margin, gradients = _margin_gradients(evaluator, layers, batches, seed)
    is_used = results.has_margin[rows]
    rows, margin = rows[is_used], margin[is_used]
    gradients = {
        name: gradient[is_used.to(gradient.device)] for name, gradient in gradients.items()
    }
    is_target = results.targeted[rows]
    if not gradients or not is_target.any():
        return ()
    margin = margin.double()
    kept = (0.5 * margin).clamp_max(REQUIRED_MARGIN)
    missing = torch.where(is_target, REQUIRED_MARGIN, kept) - margin
    targets, passed = is_target.nonzero(), (~is_target).nonzero().flatten()
    members = torch.cat([targets, passed.expand(len(targets), -1)], 1)
    capacities = []
    for name, gradient in gradients.items():
        weight = layers[name].weight
        change = _needed_change(weight, gradient.flatten(1).float(), missing, members)
        kind = type(layers[name]).__name__
        capacities.append(LayerCapacity(name, kind, weight.numel(), float(change.median())))
    return tuple(capacities)


def _needed_change(weight: Tensor, gradient: Tensor, missing: Tensor, members: Tensor) -> Tensor:
    """Returns the smallest change, relative to the norm of `weight`, for each row of `members`."""
    norm = max(float(weight.float().norm()), 1e-12)
    # Rows get unit length so that one tolerance suits all.
    length = gradient.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    unit = gradient / length[:, None]
    # The matrices are so small that a CPU is as fast.
    gram, length = (unit @ unit.T).cpu().double(), length.cpu().double() * norm
    _, value = solve_duals(
        gram[members[:, :, None], members[:, None, :]],
        (missing / length)[members],
        max_value=0.5 * MAX_RELATIVE_CHANGE**2,
    )
    change = (2 * value.clamp_min(0)).sqrt()
    return torch.where(change > MAX_RELATIVE_CHANGE, torch.inf, change).float()


def _margin_gradients(
    evaluator: Evaluator,
    layers: Mapping[str, Layer],
    batches: Iterable[tuple[Batch, Tensor]],
    seed: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns rows, margins and their gradients in each layer, of all ranks, by ascending row."""
    collective = evaluator.collective
    rows, margins = [], []
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch, batch_rows in batches:
        margin, calls = margin_calls(evaluator, layers, batch)
        rows.append(batch_rows)
        margins.append(margin.detach().float().cpu())
        for name in list(parts):
            if is_by_sample(calls[name], len(batch_rows)):
                parts[name].append(_sketch(layers[name], calls[name], len(batch_rows), seed))
            else:
                del parts[name]
    shared = [name for name in layers if not collective.any(name not in parts)]
    columns = margins, *(parts[name] for name in shared)
    all_rows, all_margins, *gradients = collective.gather_sorted(rows, *columns)
    return all_rows, all_margins, dict(zip(shared, gradients, strict=True))


def _sketch(layer: Layer, calls: Sequence[LayerCall], n: int, seed: int) -> Tensor:
    """Returns the gradient of each sample's margin, projected to at most `n x SKETCH_SIZE`."""
    size, device = layer.weight.numel(), layer.weight.device
    generator = torch.Generator().manual_seed(seed)
    bucket = torch.randint(SKETCH_SIZE, (size,), generator=generator).to(device)
    sign = (torch.randint(2, (size,), generator=generator) * 2 - 1).to(device, torch.float32)
    parts = []
    with no_autocast(device):
        for weight, _ in sample_gradients(layer, calls, n):
            gradient = weight.flatten(1)
            if size > SKETCH_SIZE:
                sketch = torch.zeros(len(gradient), SKETCH_SIZE, device=device)
                gradient = sketch.index_add_(1, bucket, gradient.float() * sign)
            parts.append(gradient)
    return torch.cat(parts)
