"""Each layer's capacity for a repair: how free it is to help targets and harm no passed sample, to first order.

The gradient of a target's margin in a layer's weights says how the layer could help it, those of near passed samples
what would harm them. Only inner products count, so gradients of large layers are kept as random sketches whose inner
products are right on average (count sketch, Charikar et al. 2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.device import no_autocast
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layer_gradients import LayerCall, is_by_sample, margin_calls, sample_gradients
from lightning_nrl.evaluation.layers import Layer, layers_of
from lightning_nrl.methods._solvers.qp import solve_dual

SKETCH_SIZE = 16_384  # numbers that a sample's gradient is kept in, where the layer has more weights
MAX_RELATIVE_CHANGE = 10.0  # of the layer's norm: a larger change is none


class GradientSketches(NamedTuple):
    """Margin gradients of samples, layer by layer."""

    rows: Tensor  # n int64, ascending
    margin: Tensor  # n
    layers: dict[str, Tensor]  # n x (weights or SKETCH_SIZE), of the layers that tell samples apart


class FirstOrderCapacity(NamedTuple):
    """A layer's freedom to help each of the targets."""

    share: Tensor  # T, from 0 to 1: of what a small change could gain for it, what is left if no passed one may lose
    change: Tensor  # T, norm of the smallest change that would repair it, in parts of the layer's; infinite if none


def sketch_gradients(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], *, seed: int = 0
) -> GradientSketches:
    """Gradients of this rank's samples, given with their rows, and of all others: every rank gets the same."""
    collective, layers = evaluator.collective, layers_of(evaluator.model)
    rows, margins = [], []
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch, at in batches:
        margin, calls = margin_calls(evaluator.model, layers, batch, evaluator.task, evaluator.context)
        rows.append(at)
        margins.append(margin.detach().float().cpu())
        for name in list(parts):
            if is_by_sample(calls[name], len(at)):
                parts[name].append(_sketched(name, layers[name], calls[name], len(at), seed))
            else:
                del parts[name]
    usable = [not collective.any(bool(rows) and name not in parts) for name in layers]
    found = {name: _joined(parts.get(name, []), collective) for name, use in zip(layers, usable, strict=True) if use}
    all_rows, all_margins = (_joined(x, collective) for x in (rows, margins))
    order = all_rows.argsort()
    found = {name: x[order.to(x.device)] for name, x in found.items() if len(x)}
    return GradientSketches(all_rows[order], all_margins[order], found)


@torch.no_grad()
def layer_capacities(
    sketches: GradientSketches, targets: Tensor, norms: Mapping[str, float], keep: float
) -> dict[str, FirstOrderCapacity]:
    """First-order capacities; `keep` is the margin asked of targets, and of passed samples with twice as much."""
    margin, t, p = sketches.margin.double(), targets.nonzero().flatten(), (~targets).nonzero().flatten()
    if not sketches.layers or not len(t):
        return {}
    rows = torch.cat([t[:, None], p.expand(len(t), -1)], 1)
    asked = torch.where(targets, keep, (0.5 * margin).clamp_max(keep)) - margin
    grams, bounds = [], []
    for name, sketched in sketches.layers.items():
        # Small matrices from here on, which a CPU factors as fast. All rows have one length: one tolerance suits.
        length = sketched.flatten(1).float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        unit = sketched.flatten(1).float() / length[:, None]
        gram, length = (unit @ unit.T).cpu().double(), length.cpu().double() * norms[name]
        grams.append(gram[rows[:, :, None], rows[:, None, :]])
        bounds.append((asked / length)[rows])
    gram, bound = torch.cat(grams), torch.cat(bounds)
    among, against = gram[:, 1:, 1:].contiguous(), -gram[:, 1:, 0]
    lost = solve_dual(among, against).value if len(p) else torch.zeros(len(gram))
    needed = solve_dual(gram, bound, max_value=0.5 * MAX_RELATIVE_CHANGE**2).value
    share, change = (1 - 2 * lost).clamp(0, 1).sqrt(), (2 * needed.clamp_min(0)).sqrt()
    change = torch.where(change > MAX_RELATIVE_CHANGE, torch.inf, change)
    return {
        name: FirstOrderCapacity(*(x.float() for x in pair))
        for name, *pair in zip(sketches.layers, share.split(len(t)), change.split(len(t)), strict=True)
    }


def _sketched(name: str, layer: Layer, calls: Sequence[LayerCall], n: int, seed: int) -> Tensor:
    """`n x (weights or SKETCH_SIZE)`, the gradient of each sample's margin in a layer's weight."""
    size = layer.weight.numel()
    generator = torch.Generator().manual_seed(seed)
    bucket = torch.randint(SKETCH_SIZE, (size,), generator=generator).to(layer.weight.device)
    sign = (torch.randint(2, (size,), generator=generator) * 2 - 1).to(layer.weight.device, torch.float32)
    parts = []
    with torch.no_grad(), no_autocast(layer.weight.device):
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
