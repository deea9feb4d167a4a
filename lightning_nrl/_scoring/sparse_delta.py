"""The sparse change of one layer: what K changed weights of a Linear or a convolution add to its output.

The new output is the old one plus, for each output unit that has changed weights, a dense product of the weights'
change with the few input values that they meet. Units are grouped by how many changed weights they have (within a
factor of two), and each group is one batched matrix product.

In half precisions the old output and the change are summed in float32 and rounded once, as matrix products in half
precision do themselves; under autocast inputs and weights are rounded first, as autocast does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._model.layers import LayerRef, ParameterSpace
from lightning_nrl._scoring.varied import Pending, Varied
from lightning_nrl._utils.precision import no_autocast

__all__ = ["LayerDelta", "Taps", "edits", "layer_output", "make_changes"]

NEARLY_ALL = 0.9
"""Beyond this share of changed units all units are treated as changed: that saves putting them together."""

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Bucket:
    """`u` output units with about equally many changed weights, `m` each, padded with weights that stay.

    Attributes:
        columns: which of the K values each weight is, `u x m` int64; K stands for a weight that stays.
        taps: its place in the unit's flattened kernel, `u x m` int64.
        channels: input channels that the weights meet, ascending, int64.
        channel: which of them each weight meets, `u x m` int64.
    """

    columns: Tensor
    taps: Tensor
    channels: Tensor
    channel: Tensor


@dataclass(frozen=True)
class Taps:
    """What the change of a layer needs to know of some samples.

    Attributes:
        x: for each bucket the input values that the changed weights meet, `u x B x m x R` with `R` output positions of
            all samples; `B` is 1 if all candidates have the same input, else `P`.
        base: the units' old outputs, `B x n x U x ...`, float32 in half precisions.
        rounded: the same as the layer gave them.
    """

    x: tuple[Tensor, ...]
    base: Tensor
    rounded: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.x, self.base))


@dataclass(frozen=True)
class LayerDelta:
    """The change of one layer, for any values of the changed weights.

    Attributes:
        site: the layer.
        units: the output units with changed weights, `U` int64, bucket by bucket.
        buckets: the units by how many changed weights they have.
        bias: for each unit which of the K values is its bias, `U` int64; K where the bias stays.
        original: the K values as they are now, in the deployed dtype.
    """

    site: LayerRef
    units: Tensor
    buckets: tuple[_Bucket, ...]
    bias: Tensor
    original: Tensor

    @property
    def unit_dim(self) -> int:
        """The dimension of the layer's output that counts its units."""
        return -1 if isinstance(self.site.module, nn.Linear) else 1

    def output(self, values: Tensor, x: Tensor, y: Tensor, copies: int = 1, taps: Taps | None = None) -> Tensor:
        """The layer's output under each candidate.

        Args:
            values: `P x K`, new values of the changed weights.
            x: the layer's input, `copies * n` samples.
            y: the layer's output under the weights as they are, as many samples as `x`.
            copies: 1 if the input is the same for all candidates, P if it goes candidate by candidate.
            taps: what `taps(x, y, copies)` gave, if it was kept.

        Returns:
            `P * n` samples, candidate by candidate, in memory of its own. If the input is the same for all candidates
            and some units do not change, a `Varied`.
        """
        p, dim = values.shape[0], self.unit_dim % y.ndim
        if not self.units.shape[0]:
            return Varied.repeated(y, p) if copies != p else y
        if copies == 1 and y.dtype not in HALF:
            taps = self.taps(x, y) if taps is None else taps
            return Varied(y, p, dim, self.units, Pending(partial(self._onto, self.change(values, y.dtype), taps)))
        with no_autocast(y.device):
            units = self.unit_outputs(values, self.taps(x, y, copies) if taps is None else taps).movedim(2, dim + 1)
            if copies == 1:
                return Varied(y, p, dim, self.units, units)
            return y.unflatten(0, (p, -1)).index_copy(dim + 1, self.units, units).flatten(0, 1)

    def taps(self, x: Tensor, y: Tensor, copies: int = 1) -> Taps:
        """Gathers what the change needs of the samples in `x`, `copies * n` of them, candidate by candidate."""
        conv = self.unit_dim == 1
        rounded = y.index_select(self.unit_dim, self.units).unflatten(0, (copies, -1))
        rounded = rounded if conv else rounded.movedim(-1, 2)
        base = rounded
        if y.dtype in HALF:
            base = self._in_float32(x, y.dtype).index_select(self.unit_dim, self.units).unflatten(0, (copies, -1))
            base = base if conv else base.movedim(-1, 2)
        gather = self._conv_taps if conv else self._linear_taps
        compute = torch.float32 if y.dtype in HALF else y.dtype
        return Taps(tuple(gather(b, x, y, copies).to(y.dtype).to(compute) for b in self.buckets), base, rounded)

    def unit_outputs(self, values: Tensor, taps: Taps) -> Tensor:
        """The changed units' outputs under each candidate, `P x n x U x ...`, in the layer's output dtype."""
        change = self.change(values, taps.rounded.dtype)
        p, (_, n, u, *rest) = values.shape[0], taps.base.shape
        delta = self._delta(change, taps).view(u, p, n, *rest).permute(1, 2, 0, *range(3, 3 + len(rest)))
        new = torch.add(taps.base, delta, out=taps.base.new_empty(p, n, u, *rest))
        if taps.rounded.dtype in HALF:
            same = (change == 0).all(1).view(p, *[1] * (new.ndim - 1))
            new = torch.where(same, taps.rounded, new.to(taps.rounded.dtype))
        return new

    def change(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """New minus old of each weight as the layer's product sees them, `P x (K + 1)`; the last one is 0."""
        compute = torch.float32 if dtype in HALF else dtype
        new, old = (w.to(self.original.dtype).to(dtype).to(compute) for w in (values, self.original))
        return F.pad(new - old, (0, 1))

    def deltas(self, values: Tensor, taps: Taps) -> Tensor:
        """What each candidate, `P x K`, adds to each unit's outputs, `U x P x R`."""
        with no_autocast(values.device):
            return self._delta(self.change(values, taps.rounded.dtype), taps)

    def _onto(self, change: Tensor, taps: Taps, base: Tensor, scale: Tensor | None) -> Tensor:
        """Each unit's change times a factor, added to a base `U x n x ...`: `U x P x n x ...`."""
        with no_autocast(change.device):
            out = self._delta(change, taps, scale, base.reshape(base.shape[0], 1, -1))
        return out.view(base.shape[0], change.shape[0], *base.shape[1:])

    def _delta(self, change: Tensor, taps: Taps, scale: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        delta = change.new_empty(self.units.shape[0], change.shape[0], taps.base[0, :, 0].numel())
        start = 0
        for bucket, x in zip(self.buckets, taps.x, strict=True):
            d = change[:, bucket.columns].transpose(0, 1)  # u x P x m
            stop = start + d.shape[0]
            if scale is not None:
                d = d * scale[start:stop].view(-1, 1, 1)
            if x.shape[1] != 1:
                torch.matmul(d.unsqueeze(2), x, out=delta[start:stop].unsqueeze(2))
            elif base is None:
                torch.bmm(d, x[:, 0], out=delta[start:stop])
            else:
                torch.baddbmm(base[start:stop], d, x[:, 0], out=delta[start:stop])
            start = stop
        if self.site.include_bias:
            bias = change[:, self.bias].t()
            delta += (bias if scale is None else bias * scale.unsqueeze(1)).unsqueeze(2)
        return delta

    def _linear_taps(self, bucket: _Bucket, x: Tensor, y: Tensor, copies: int) -> Tensor:
        u, m = bucket.taps.shape
        flat = x.reshape(copies, -1, x.shape[-1]).index_select(-1, bucket.taps.flatten())
        return flat.unflatten(-1, (u, m)).permute(2, 0, 3, 1).contiguous()

    def _conv_taps(self, bucket: _Bucket, x: Tensor, y: Tensor, copies: int) -> Tensor:
        """For each weight, the padded input at its place in the kernel, at every output position."""
        conv: Any = self.site.module
        u, m = bucket.taps.shape
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x.index_select(1, bucket.channels), conv._reversed_padding_repeated_twice, mode=mode)
        size, out, kernel = x.shape[2:], y.shape[2:], conv.kernel_size
        index = bucket.channel.view(u, m, 1)
        position = torch.zeros(1, dtype=torch.int64, device=x.device)
        within = bucket.taps % math.prod(kernel)
        for d in range(len(size)):
            inner = math.prod(kernel[d + 1 :])
            at = within // inner % kernel[d] * conv.dilation[d]
            index = index * size[d] + at.unsqueeze(2)
            step = torch.arange(out[d], device=x.device) * conv.stride[d]
            position = (position.unsqueeze(1) * size[d] + step).flatten()
        places = (index + position).flatten()
        flat = x.flatten(1).index_select(1, places).view(copies, -1, u, m, len(position))
        return flat.permute(2, 0, 3, 1, 4).flatten(3)

    def _in_float32(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        module: Any = self.site.module
        bias = None if module.bias is None else module.bias.detach().to(dtype).float()
        with no_autocast(x.device):
            return layer_output(module, x.to(dtype).float(), module.weight.detach().to(dtype).float(), bias)


def layer_output(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a Linear or a convolution gives with other weights."""
    return F.linear(x, weight, bias) if isinstance(module, nn.Linear) else module._conv_forward(x, weight, bias)


def edits(
    changes: Sequence[LayerDelta], values: Tensor, taps: Taps | None = None
) -> Callable[[LayerRef, Tensor, Tensor], Tensor]:
    """What `Plan.resume` calls at each site to run candidates `P x K` on the same samples.

    Args:
        changes: the change of each site.
        values: `P x K`.
        taps: what the first site's change needs to know of the samples, if it was kept.
    """
    by_site = {id(change.site): change for change in changes}
    first = True

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        nonlocal first
        if first:
            first = False
            return by_site[id(site)].output(values, x, y, 1, taps)
        x, y = (t.dense() if isinstance(t, Varied) else t for t in (x, y))
        return by_site[id(site)].output(values, x, y, len(values))

    return edit


def make_changes(space: ParameterSpace, where: Tensor) -> tuple[LayerDelta, ...]:
    """The change of each site.

    Args:
        space: all sites.
        where: `K` int64, flat positions of the changed weights, each once.

    Returns:
        One change a site, in the order of the sites; a site without changed weights has one without units.
    """
    where = where.to(space.device)
    original = space.flat()[where]
    return tuple(_make_change(site, where - site.offset, original) for site in space.sites)


def _make_change(site: LayerRef, where: Tensor, original: Tensor) -> LayerDelta:
    k, out = len(where), site.weight_shape[0]
    size, per_unit = site.weight_shape.numel(), site.weight_shape[1:].numel()
    columns = torch.arange(k, device=where.device)
    weight = (where >= 0) & (where < size)
    is_bias = (where >= size) & (where < site.size)
    unit, tap, column = where[weight] // per_unit, where[weight] % per_unit, columns[weight]
    units = torch.cat([unit, where[is_bias] - size]).unique()
    if len(units) > NEARLY_ALL * out:
        units = torch.arange(out, device=where.device)
    bias = torch.full((len(units),), k, device=where.device)
    bias[torch.searchsorted(units, where[is_bias] - size)] = columns[is_bias]
    slot = torch.searchsorted(units, unit)
    counts = torch.bincount(slot, minlength=len(units))
    level = counts.clamp_min(1).cpu().double().log2().ceil().long().to(where.device)
    groups: Any = getattr(site.module, "groups", 1)
    kernel = math.prod(site.weight_shape[2:])
    buckets, order = [], []
    for size_class in level.unique().tolist():
        slots = (level == size_class).nonzero().flatten()
        m = max(1, int(counts[slots].max()))
        cols = torch.full((len(slots), m), k, device=where.device)
        taps = torch.zeros_like(cols)
        for row, s in enumerate(slots.tolist()):
            mine = (slot == s).nonzero().flatten()
            cols[row, : len(mine)], taps[row, : len(mine)] = column[mine], tap[mine]
        group = units[slots] // (out // groups)
        channels, channel = (group.unsqueeze(1) * site.weight_shape[1] + taps // kernel).unique(return_inverse=True)
        buckets.append(_Bucket(cols, taps, channels, channel))
        order.append(slots)
    if order:
        units, bias = units[torch.cat(order)], bias[torch.cat(order)]
    return LayerDelta(site, units, tuple(buckets), bias, original)
