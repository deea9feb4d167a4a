"""Which input values a sparse change of a layer meets: changed weights sorted by output unit, and their inputs.

Output units are grouped by how many changed weights they have, within a factor of two, so that each group is one
batched matrix product with little padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._model.layer_inputs import pad_input
from lightning_nrl._model.layers import Convolution, LayerRef

__all__ = ["DeltaLayout", "UnitBucket", "make_delta_layout"]

MIN_SHARE_OF_ALL_UNITS = 0.9
"""Beyond this share of changed units all units are treated as changed: that saves putting them together."""


@dataclass(frozen=True)
class UnitBucket:
    """`u` output units with about equally many changed weights, `m` each, padded with weights that stay."""

    columns: Tensor  # u x m int64, which of the K values each weight is; K: it stays
    kernel_index: Tensor  # u x m int64, its place in the unit's flattened kernel
    channels: Tensor  # int64, input channels that the weights meet, ascending
    channel: Tensor  # u x m int64, which of them each weight meets

    def linear_inputs(self, x: Tensor, copies: int) -> Tensor:
        """For each weight the input of a Linear that it meets, `u x copies x m x R`."""
        u, m = self.kernel_index.shape
        met = x.reshape(copies, -1, x.shape[-1]).index_select(-1, self.kernel_index.flatten())
        return met.view(*met.shape[:2], u, m).permute(2, 0, 3, 1).contiguous()

    def convolution_inputs(self, conv: Convolution, x: Tensor, out: Sequence[int], copies: int) -> Tensor:
        """For each weight the padded input at its place in the kernel, at every output position.

        `x` is `copies * n x C x ...`, candidate by candidate; `out` are the sizes of the output behind the channels.
        """
        u, m = self.kernel_index.shape
        x = pad_input(conv, x.index_select(1, self.channels))
        size, kernel = x.shape[2:], conv.kernel_size
        index = self.channel.view(u, m, 1)
        position = torch.zeros(1, dtype=torch.int64, device=x.device)
        within = self.kernel_index % math.prod(kernel)
        for d in range(len(size)):
            inner = math.prod(kernel[d + 1 :])
            at = within // inner % kernel[d] * conv.dilation[d]
            index = index * size[d] + at.unsqueeze(2)
            step = torch.arange(out[d], device=x.device) * conv.stride[d]
            position = (position.unsqueeze(1) * size[d] + step).flatten()
        places = (index + position).flatten()
        flat = x.flatten(1).index_select(1, places).view(copies, -1, u, m, len(position))
        return flat.permute(2, 0, 3, 1, 4).flatten(3)


@dataclass(frozen=True)
class DeltaLayout:
    """Changed weights of one layer."""

    units: Tensor  # U int64, the output units that have some, bucket by bucket
    buckets: tuple[UnitBucket, ...]  # the units by how many changed weights they have
    bias: Tensor  # U int64, which of the K values each unit's bias is; K: it stays

    def to(self, device: torch.device) -> DeltaLayout:
        """The same on a device, in one transfer."""
        own = [self.units, self.bias]
        for b in self.buckets:
            own += [b.columns, b.kernel_index, b.channels, b.channel]
        if device.type == "cpu":
            return self
        moved = torch.cat([x.flatten() for x in own]).to(device).split([x.numel() for x in own])
        units, bias, *rest = (new.view(old.shape) for new, old in zip(moved, own, strict=True))
        return DeltaLayout(units, tuple(UnitBucket(*rest[i : i + 4]) for i in range(0, len(rest), 4)), bias)


def make_delta_layout(site: LayerRef, where: Tensor) -> DeltaLayout:
    """Sorts the changed weights of a layer; `where` is `K` int64 on the CPU, each once, and may lie outside of it."""
    k, out = len(where), site.weight_shape[0]
    size, per_unit = site.weight_shape.numel(), site.weight_shape[1:].numel()
    is_weight, is_bias = (where >= 0) & (where < size), (where >= size) & (where < site.size)
    unit, index, column = where[is_weight] // per_unit, where[is_weight] % per_unit, is_weight.nonzero().flatten()
    units = torch.cat([unit, where[is_bias] - size]).unique()
    if len(units) > MIN_SHARE_OF_ALL_UNITS * out:
        units = torch.arange(out, device=where.device)
    bias = torch.full((len(units),), k, device=where.device)
    bias[torch.searchsorted(units, where[is_bias] - size)] = is_bias.nonzero().flatten()
    slot = torch.searchsorted(units, unit)
    counts = torch.bincount(slot, minlength=len(units))
    level = counts.clamp_min(1).double().log2().ceil().long()
    groups = 1 if isinstance(site.module, nn.Linear) else site.module.groups
    kernel = math.prod(site.weight_shape[2:])
    by_unit, first = slot.argsort(stable=True), counts.cumsum(0) - counts
    buckets, order = [], []
    for size_class in level.unique().tolist():
        slots = (level == size_class).nonzero().flatten()
        places = torch.arange(max(1, int(counts[slots].max())), device=where.device)
        stays = places >= counts[slots].unsqueeze(1)
        own = torch.where(stays, 0, first[slots].unsqueeze(1) + places)
        columns, kernel_index = (
            F.pad(x[by_unit], (0, 1))[own].masked_fill(stays, fill) for x, fill in ((column, k), (index, 0))
        )
        group = units[slots] // (out // groups)
        met = group.unsqueeze(1) * site.weight_shape[1] + kernel_index // kernel
        buckets.append(UnitBucket(columns, kernel_index, *met.unique(return_inverse=True)))
        order.append(slots)
    if order:
        units, bias = units[torch.cat(order)], bias[torch.cat(order)]
    return DeltaLayout(units, tuple(buckets), bias)
