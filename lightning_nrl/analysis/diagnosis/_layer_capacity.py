"""Each layer's capacity for a repair: how free it is to help targets and harm no passed sample, to first order.

The gradient of a target's margin in a layer's weights says how the layer could help it, those of near passed samples
what would harm them. Only inner products count, so gradients of large layers are kept as random sketches whose inner
products are right on average (count sketch, Charikar et al. 2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.device import no_autocast
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.analysis.diagnosis._last_layer import REQUIRED_MARGIN
from lightning_nrl.analysis.diagnosis.findings import LayerCapacity
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layer_gradients import LayerCall, is_by_sample, margin_calls, sample_gradients
from lightning_nrl.evaluation.layers import Layer, layers_of
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods._solvers.qp import solve_dual

SKETCH_SIZE = 16_384  # numbers that a sample's gradient is kept in, where the layer has more weights
MAX_RELATIVE_CHANGE = 10.0  # of the layer's norm: a larger change is none


@torch.no_grad()
def layer_capacities(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], results: SampleResults, seed: int
) -> tuple[LayerCapacity, ...]:
    """Compares layers on this rank's share of some samples, given with their rows, and that of all others."""
    if not results.targeted.any() or bool(results.margin[results.targeted].isnan().all()):
        return ()
    layers = layers_of(evaluator.model)
    at, margin, gradients = _gradients(evaluator, layers, batches, seed)
    targets, margin = results.targeted[at], margin.double()
    t, p = targets.nonzero().flatten(), (~targets).nonzero().flatten()
    if not gradients or not len(t):
        return ()
    rows = torch.cat([t[:, None], p.expand(len(t), -1)], 1)
    asked = torch.where(targets, REQUIRED_MARGIN, (0.5 * margin).clamp_max(REQUIRED_MARGIN)) - margin
    grams, bounds = [], []
    for name, gradient in gradients.items():
        norm = max(float(layers[name].weight.detach().float().norm()), 1e-12)
        # Small matrices from here on, which a CPU factors as fast. All rows have one length: one tolerance suits.
        length = gradient.flatten(1).float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        unit = gradient.flatten(1).float() / length[:, None]
        gram, length = (unit @ unit.T).cpu().double(), length.cpu().double() * norm
        grams.append(gram[rows[:, :, None], rows[:, None, :]])
        bounds.append((asked / length)[rows])
    gram, bound = torch.cat(grams), torch.cat(bounds)
    among, against = gram[:, 1:, 1:].contiguous(), -gram[:, 1:, 0]
    lost = solve_dual(among, against).value if len(p) else torch.zeros(len(gram))
    needed = solve_dual(gram, bound, max_value=0.5 * MAX_RELATIVE_CHANGE**2).value
    room, change = (1 - 2 * lost).clamp(0, 1).sqrt().float(), (2 * needed.clamp_min(0)).sqrt()
    change = torch.where(change > MAX_RELATIVE_CHANGE, torch.inf, change).float()
    return tuple(
        LayerCapacity(
            name,
            type(layers[name]).__name__,
            layers[name].weight.numel(),
            room=round(float(own_room.mean()), 4),
            change=float(own_change.median()),
        )
        for name, own_room, own_change in zip(gradients, room.split(len(t)), change.split(len(t)), strict=True)
    )


def _gradients(
    evaluator: Evaluator, layers: Mapping[str, Layer], batches: Iterable[tuple[Batch, Tensor]], seed: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows, ascending, margins, and their gradients in each layer that tells samples apart; all ranks get the same."""
    collective = evaluator.collective
    rows, margins = [], []
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch, at in batches:
        margin, calls = margin_calls(evaluator.model, layers, batch, evaluator.task, evaluator.context)
        rows.append(at)
        margins.append(margin.detach().float().cpu())
        for name in list(parts):
            if is_by_sample(calls[name], len(at)):
                parts[name].append(_sketched(layers[name], calls[name], len(at), seed))
            else:
                del parts[name]
    usable = [not collective.any(bool(rows) and name not in parts) for name in layers]
    found = {name: _joined(parts.get(name, []), collective) for name, use in zip(layers, usable, strict=True) if use}
    all_rows, all_margins = (_joined(x, collective) for x in (rows, margins))
    order = all_rows.argsort()
    return all_rows[order], all_margins[order], {name: x[order.to(x.device)] for name, x in found.items() if len(x)}


def _sketched(layer: Layer, calls: Sequence[LayerCall], n: int, seed: int) -> Tensor:
    """`n x (weights or SKETCH_SIZE)`, the gradient of each sample's margin in a layer's weight."""
    size = layer.weight.numel()
    generator = torch.Generator().manual_seed(seed)
    bucket = torch.randint(SKETCH_SIZE, (size,), generator=generator).to(layer.weight.device)
    sign = (torch.randint(2, (size,), generator=generator) * 2 - 1).to(layer.weight.device, torch.float32)
    parts = []
    with no_autocast(layer.weight.device):
        for weight, _ in sample_gradients(layer, calls, n):
            gradient = weight.flatten(1)
            if size > SKETCH_SIZE:
                gradient = torch.zeros(len(gradient), SKETCH_SIZE, device=gradient.device).index_add_(
                    1, bucket, gradient.float() * sign
                )
            parts.append(gradient)
    return torch.cat(parts)


def _joined(parts: Sequence[Tensor], collective: Collective) -> Tensor:
    mine = torch.cat(list(parts)) if parts else torch.zeros(0)
    shares = [x for x in collective.gather(mine) if len(x)]
    return torch.cat(shares) if shares else mine
