"""Effect of K changed weights of a Linear or a convolution on the layer's output.

An output unit is an output feature of a Linear or an output channel of a convolution. Its output
changes by the sum, over its changed weights, of weight change times input. Units whose numbers of
changed weights differ by less than a factor of two form a bucket, which needs one batched matrix
product. In half precision, the original output and the change are summed in float32 and rounded
once. Under autocast, inputs and weights are first rounded to its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._utils.device import no_autocast
from lightning_nrl.evaluation.layer_gradients import pad_input
from lightning_nrl.evaluation.layers import Convolution, LayerRef, ParameterSpace, layer_output
from lightning_nrl.search.scoring.candidate_tensor import CandidateTensor, LazyDelta

HALF_PRECISIONS = (torch.float16, torch.bfloat16)
COPIED_INPUTS = 2
"""Above this many candidates per changed weight of a unit, `_products` copies inputs instead of
outputs on a CPU.
"""
MIN_SHARE_OF_ALL_UNITS = (
    0.9  # above this share of changed units, all units count as changed, which saves a copy
)


@dataclass(frozen=True)
class UnitBucket:
    """Group of u output units with up to m changed weights each, padded with unchanged weights."""

    columns: Tensor  # u x m int64, position of each weight among the K values; K: the weight is unchanged
    kernel_index: Tensor  # u x m int64, position in the unit's flattened kernel
    channels: Tensor  # int64, input channels of the weights, ascending
    channel: Tensor  # u x m int64, index of each weight's channel in `channels`

    def to(self, device: torch.device) -> UnitBucket:
        return UnitBucket(
            *(x.to(device) for x in (self.columns, self.kernel_index, self.channels, self.channel))
        )

    def linear_inputs(self, x: Tensor, copies: int) -> Tensor:
        """Returns the input of each weight of a Linear, `u x copies x m x R`, where `x` has R rows
        per copy.
        """
        u, m = self.kernel_index.shape
        met = x.reshape(copies, -1, x.shape[-1]).index_select(-1, self.kernel_index.flatten())
        return met.view(*met.shape[:2], u, m).permute(2, 0, 3, 1).contiguous()

    def convolution_inputs(
        self, conv: Convolution, x: Tensor, out: Sequence[int], copies: int
    ) -> Tensor:
        """Returns the input of each weight of a convolution at each output position, `u x copies x
        m x
        R`.

        `x`, `copies * n x C x ...`, is the layer's input, and `out` is the spatial shape of its
        output. R is the number of output positions of n samples, n times the product of `out`.
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
class GatheredInputs:
    """Inputs of changed weights, and original outputs of their U output units, for n samples.

    In the shapes, B is 1 if all P candidates have the same layer input, else P.
    """

    x: tuple[
        Tensor, ...
    ]  # per bucket: u x B x m x R, inputs of changed weights at R output positions of all samples
    base: Tensor  # B x n x U x ..., original outputs; if the layer has half precision, in float32
    rounded: Tensor  # B x n x U x ..., original outputs in the layer's dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.x, self.base))


@dataclass(frozen=True)
class LayerDelta:
    """Computes a layer's output for any values of K weights, from the layer's input and output
    before the change.
    """

    site: LayerRef
    original: Tensor  # K, original values, in the deployed dtype
    units: Tensor  # U int64, changed output units, bucket by bucket
    buckets: tuple[UnitBucket, ...]
    bias: (
        Tensor  # U int64, position of each unit's bias among the K values; K: the bias is unchanged
    )

    @property
    def unit_dim(self) -> int:
        return -1 if isinstance(self.site.module, nn.Linear) else 1

    def output(
        self,
        values: Tensor,
        x: Tensor,
        y: Tensor,
        copies: int = 1,
        gathered: GatheredInputs | None = None,
    ) -> Tensor:
        """Returns the layer's output under candidates `P x K`: `P * n` samples, candidate by
        candidate.

        `x` is the layer's input and `y` is its output under the original weights, for `copies * n`
        samples. `copies` is 1 if all candidates share the input, else P. `gathered` may be an
        earlier result of `gather(x, y, copies)`.
        """
        p, dim = values.shape[0], self.unit_dim % y.ndim
        if not self.units.shape[0]:
            return CandidateTensor.repeated(y, p) if copies != p else y
        if copies == 1 and y.dtype not in HALF_PRECISIONS:
            gathered = self.gather(x, y) if gathered is None else gathered
            delta = LazyDelta(partial(self._onto, self.weight_delta(values, y.dtype), gathered))
            return CandidateTensor(y, p, dim, self.units, delta)
        with no_autocast(y.device):
            gathered = self.gather(x, y, copies) if gathered is None else gathered
            units = self.unit_outputs(values, gathered).movedim(2, dim + 1)
            if copies == 1:
                return CandidateTensor(y, p, dim, self.units, units)
            changed: Tensor = y.unflatten(0, (p, -1)).index_copy(dim + 1, self.units, units)
            return changed.flatten(0, 1)

    def gather(self, x: Tensor, y: Tensor, copies: int = 1) -> GatheredInputs:
        """Selects the inputs of changed weights from `x`, and the outputs of changed units from `y`
        (see `output`).
        """
        module = self.site.module

        def units_of(y: Tensor) -> Tensor:
            chosen: Tensor = y.index_select(self.unit_dim, self.units).unflatten(0, (copies, -1))
            return chosen.movedim(self.unit_dim, 2) if self.unit_dim < 0 else chosen

        rounded = units_of(y)
        half = y.dtype in HALF_PRECISIONS
        base = units_of(self._in_float32(x, y.dtype)) if half else rounded
        compute = torch.float32 if half else y.dtype
        if isinstance(module, nn.Linear):
            met = (bucket.linear_inputs(x, copies) for bucket in self.buckets)
        else:
            met = (
                bucket.convolution_inputs(module, x, y.shape[2:], copies) for bucket in self.buckets
            )
        return GatheredInputs(
            tuple(inputs.to(y.dtype).to(compute) for inputs in met), base, rounded
        )

    def unit_outputs(self, values: Tensor, gathered: GatheredInputs) -> Tensor:
        """Returns the outputs of the changed units, `P x n x U x ...`, in the dtype of the layer's
        output.
        """
        change = self.weight_delta(values, gathered.rounded.dtype)
        p, (_, n, u, *rest) = values.shape[0], gathered.base.shape
        delta = (
            self._products(change, gathered)
            .view(u, p, n, *rest)
            .permute(1, 2, 0, *range(3, 3 + len(rest)))
        )
        new = torch.add(gathered.base, delta, out=gathered.base.new_empty(p, n, u, *rest))
        if gathered.rounded.dtype in HALF_PRECISIONS:
            same = (change == 0).all(1).view(p, *[1] * (new.ndim - 1))
            new = torch.where(same, gathered.rounded, new.to(gathered.rounded.dtype))
        return new

    def weight_delta(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the weight changes of candidates `P x K` and a zero column: `P x (K + 1)`, in
        float32 or float64.
        """
        compute = torch.float32 if dtype in HALF_PRECISIONS else dtype
        new, old = (
            w.to(self.original.dtype).to(dtype).to(compute) for w in (values, self.original)
        )
        return F.pad(new - old, (0, 1))

    def output_delta(self, values: Tensor, gathered: GatheredInputs) -> Tensor:
        """Returns the output changes of U units under candidates `P x K`, as `U x P x R` (see
        `GatheredInputs`).
        """
        with no_autocast(values.device):
            return self._products(self.weight_delta(values, gathered.rounded.dtype), gathered)

    def _onto(
        self, change: Tensor, gathered: GatheredInputs, base: Tensor, scale: Tensor | None
    ) -> Tensor:
        with no_autocast(change.device):
            out = self._products(change, gathered, scale, base.reshape(base.shape[0], 1, -1))
        return out.view(base.shape[0], change.shape[0], *base.shape[1:])

    def _products(
        self,
        change: Tensor,
        gathered: GatheredInputs,
        scale: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        delta = change.new_empty(
            self.units.shape[0], change.shape[0], gathered.base[0, :, 0].numel()
        )
        start = 0
        for bucket, x in zip(self.buckets, gathered.x, strict=True):
            d = change[:, bucket.columns].transpose(0, 1)  # u x P x m
            stop = start + d.shape[0]
            if scale is not None:
                d = d * scale[start:stop].view(-1, 1, 1)
            if x.shape[1] != 1:
                torch.matmul(d.unsqueeze(2), x, out=delta[start:stop].unsqueeze(2))
            elif base is None:
                torch.bmm(d, x[:, 0], out=delta[start:stop])
            elif d.device.type == "cpu" and d.shape[1] > COPIED_INPUTS * d.shape[2]:
                # The base is appended as an input with weight 1, so that it is not copied for each
                # candidate.
                d, met = F.pad(d, (0, 1), value=1.0), torch.cat([x[:, 0], base[start:stop]], 1)
                torch.bmm(d, met, out=delta[start:stop])
            else:
                torch.baddbmm(base[start:stop], d, x[:, 0], out=delta[start:stop])
            start = stop
        if self.site.include_bias:
            bias = change[:, self.bias].t()
            delta += (bias if scale is None else bias * scale.unsqueeze(1)).unsqueeze(2)
        return delta

    def _in_float32(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        module = self.site.module
        bias = None if module.bias is None else module.bias.detach().to(dtype).float()
        with no_autocast(x.device):
            return layer_output(
                module, x.to(dtype).float(), module.weight.detach().to(dtype).float(), bias
            )


def output_under(parameters: Mapping[str, Tensor], site: LayerRef, x: Tensor) -> Tensor:
    """Computes the output of a site (repaired layer) under other parameters, which are given by
    dotted name.
    """
    new = {name.rpartition(".")[2].split("_")[0]: parameters[name] for name in site.parameters}
    return layer_output(site.module, x, new["weight"], new.get("bias", site.module.bias))


def edit_layers(
    deltas: Sequence[LayerDelta], values: Tensor, gathered: GatheredInputs | None = None
) -> Callable[[LayerRef, Tensor, Tensor], Tensor]:
    """Returns an `edit` function that applies candidates `P x K` in one call of
    `ReplayPlan.resume`.

    `gathered` is the result of `LayerDelta.gather` for the first site. Without it, `edit` calls
    `gather`.
    """
    by_site = {id(delta.site): delta for delta in deltas}
    first = True

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        nonlocal first
        if first:
            first = False
            return by_site[id(site)].output(values, x, y, 1, gathered)
        x, y = (t.dense() if isinstance(t, CandidateTensor) else t for t in (x, y))
        return by_site[id(site)].output(values, x, y, len(values))

    return edit


def make_layer_deltas(space: ParameterSpace, where: Tensor) -> tuple[LayerDelta, ...]:
    """Builds one `LayerDelta` per site. `where`, `K` int64, are the flat positions of the changed
    weights.
    """
    original, where = space.flat()[where.to(space.device)], where.cpu()
    return tuple(_layer_delta(site, where - site.offset, original) for site in space.sites)


def _layer_delta(site: LayerRef, where: Tensor, original: Tensor) -> LayerDelta:
    """Groups the changed weights of a layer. `where`, `K` on the CPU, may have positions of weights
    of other layers.
    """
    k, out = len(where), site.weight_shape[0]
    size, per_unit = site.weight_shape.numel(), site.weight_shape[1:].numel()
    is_weight, is_bias = (where >= 0) & (where < size), (where >= size) & (where < site.size)
    unit, index, column = (
        where[is_weight] // per_unit,
        where[is_weight] % per_unit,
        is_weight.nonzero().flatten(),
    )
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
            F.pad(x[by_unit], (0, 1))[own].masked_fill(stays, fill)
            for x, fill in ((column, k), (index, 0))
        )
        group = units[slots] // (out // groups)
        met = group.unsqueeze(1) * site.weight_shape[1] + kernel_index // kernel
        buckets.append(
            UnitBucket(columns, kernel_index, *met.unique(return_inverse=True)).to(original.device)
        )
        order.append(slots)
    if order:
        units, bias = units[torch.cat(order)], bias[torch.cat(order)]
    return LayerDelta(
        site, original, units.to(original.device), tuple(buckets), bias.to(original.device)
    )
