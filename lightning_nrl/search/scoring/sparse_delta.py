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

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lightning_nrl._utils.device import no_autocast
from lightning_nrl.evaluation.layer_gradients import as_rows, unfolded
from lightning_nrl.evaluation.layers import Layer, LayerRef, ParameterSpace, layer_output
from lightning_nrl.search.scoring.candidate_tensor import CandidateTensor, as_dense

HALF_PRECISIONS = (torch.float16, torch.bfloat16)
# Above this share of changed units, all units count as changed, which saves a copy.
MIN_SHARE_OF_ALL_UNITS = 0.9


@dataclass(frozen=True)
class UnitBucket:
    """Group of u output units with up to m changed weights each, padded with unchanged weights."""

    columns: Tensor  # u x m int64, position of each weight among the K values; K: unchanged
    # u x m int64 each: the weights' input channel and, in a convolution, place in the kernel
    at: tuple[Tensor, ...]

    def inputs(self, layer: Layer, x: Tensor, copies: int) -> Tensor:
        """Returns the input of each weight, `u x copies x m x R`, from the layer's input `x`.

        In one copy, a Linear has R rows, and a convolution R output positions of all samples.
        """
        x = as_rows(layer, x)
        if not isinstance(layer, nn.Linear):
            x = unfolded(layer, x)
        n = len(self.at)
        inputs: Tensor = x.movedim((1, *range(1 - n, 0)), tuple(range(n)))[self.at]
        return torch.unflatten(inputs, 2, (copies, -1)).transpose(1, 2).flatten(3)


@dataclass(frozen=True)
class GatheredInputs:
    """Inputs of changed weights, and original outputs of their U output units, for n samples.

    In the shapes, B is 1 if all P candidates have the same layer input, else P.
    """

    # Per bucket: u x B x m x R, inputs of changed weights at R output positions of all samples.
    x: tuple[Tensor, ...]
    base: Tensor  # B x n x U x ..., original outputs; in float32 if the layer has half precision
    rounded: Tensor  # B x n x U x ..., original outputs in the layer's dtype

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.x) + self.base.nbytes


@dataclass(frozen=True)
class LayerDelta:
    """Computes a layer's output for any values of K weights, from its original output."""

    site: LayerRef
    original: Tensor  # K, original values, in the deployed dtype
    units: Tensor  # U int64, changed output units, bucket by bucket
    buckets: tuple[UnitBucket, ...]
    bias: Tensor  # U int64, position of each unit's bias among the K values; K: unchanged

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
        """Returns the layer's output under candidates `P x K`: `P * n` samples, in turn.

        `x` is the layer's input and `y` is its output under the original weights, for `copies * n`
        samples. `copies` is 1 if all candidates share the input, else P. `gathered` may be an
        earlier result of `gather(x, y, copies)`.
        """
        n_candidates, dim = len(values), self.unit_dim % y.ndim
        if not len(self.units):
            return CandidateTensor.repeated(y, n_candidates) if copies != n_candidates else y
        with no_autocast(y.device):
            if gathered is None:
                gathered = self.gather(x, y, copies)
            units = self.unit_outputs(values, gathered).movedim(2, dim + 1)
            if copies == 1:
                return CandidateTensor(y, n_candidates, dim, self.units, units)
            y = y.unflatten(0, (n_candidates, -1))
            return y.index_copy(dim + 1, self.units, units).flatten(0, 1)

    def gather(self, x: Tensor, y: Tensor, copies: int = 1) -> GatheredInputs:
        """Selects the inputs of changed weights, and the outputs of changed units, see `output`."""
        module = self.site.module
        rounded = base = self._units_of(y, copies)
        compute = torch.promote_types(y.dtype, torch.float32)
        if y.dtype in HALF_PRECISIONS:
            weight = module.weight.detach().to(y.dtype).float()
            bias = None if module.bias is None else module.bias.detach().to(y.dtype).float()
            with no_autocast(x.device):
                base = layer_output(module, x.to(y.dtype).float(), weight, bias)
            base = self._units_of(base, copies)
        rounded_inputs = tuple(
            bucket.inputs(module, x, copies).to(y.dtype).to(compute) for bucket in self.buckets
        )
        return GatheredInputs(rounded_inputs, base, rounded)

    def _units_of(self, y: Tensor, copies: int) -> Tensor:
        units: Tensor = y.index_select(self.unit_dim, self.units).unflatten(0, (copies, -1))
        return units.movedim(-1, 2) if self.unit_dim == -1 else units

    def unit_outputs(self, values: Tensor, gathered: GatheredInputs) -> Tensor:
        """Returns the outputs of the changed units, `P x n x U x ...`, in the layer's dtype."""
        change = self.weight_delta(values, gathered.rounded.dtype)
        _, n, n_units, *spatial = gathered.base.shape
        shape = (len(values), n, n_units, *spatial)
        delta = self._products(change, gathered).view(n_units, len(values), n, *spatial)
        delta = delta.movedim(0, 2)
        outputs = torch.add(gathered.base, delta, out=gathered.base.new_empty(shape))
        if gathered.rounded.dtype not in HALF_PRECISIONS:
            return outputs
        # Unchanged candidates keep the recorded output to the bit.
        is_unchanged = (change == 0).all(1).view(-1, *[1] * (outputs.ndim - 1))
        return torch.where(is_unchanged, gathered.rounded, outputs.to(gathered.rounded.dtype))

    def weight_delta(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the weight changes of candidates `P x K` and a zero column, `P x (K + 1)`.

        They are rounded like a layer of `dtype` rounds them, and are in float32 or float64.
        """
        compute = torch.promote_types(dtype, torch.float32)
        deployed = values.to(self.original.dtype).to(dtype).to(compute)
        return F.pad(deployed - self.original.to(dtype).to(compute), (0, 1))

    def output_delta(self, values: Tensor, gathered: GatheredInputs) -> Tensor:
        """Returns the output changes of U units under candidates `P x K`, as `U x P x R`."""
        with no_autocast(values.device):
            return self._products(self.weight_delta(values, gathered.rounded.dtype), gathered)

    def _products(self, change: Tensor, gathered: GatheredInputs) -> Tensor:
        n_rows = gathered.base[0, :, 0].numel()
        outputs = change.new_empty(len(self.units), len(change), n_rows)
        start = 0
        for bucket, x in zip(self.buckets, gathered.x, strict=True):
            weights = change[:, bucket.columns].transpose(0, 1)  # u x P x m
            out = outputs[start : start + len(weights)]
            start += len(weights)
            if x.shape[1] == 1:
                torch.bmm(weights, x[:, 0], out=out)
            else:  # each candidate has its own inputs
                torch.matmul(weights.unsqueeze(2), x, out=out.unsqueeze(2))
        if self.site.include_bias:
            outputs += change[:, self.bias].t().unsqueeze(2)
        return outputs


def output_under(parameters: Mapping[str, Tensor], site: LayerRef, x: Tensor) -> Tensor:
    """Computes the output of a site (repaired layer) under parameters by dotted name."""
    weight, *bias = (parameters[name] for name in site.parameters)
    return layer_output(site.module, x, weight, bias[0] if bias else site.module.bias)


def edit_layers(
    deltas: Sequence[LayerDelta], values: Tensor, gathered: GatheredInputs | None = None
) -> Callable[[LayerRef, Tensor, Tensor], Tensor]:
    """Returns an `edit` that applies candidates `P x K` in one call of `ReplayPlan.resume`.

    `gathered` is the result of `LayerDelta.gather` for the first site. Without it, `edit` calls
    `gather`.
    """
    by_site = {id(delta.site): delta for delta in deltas}
    is_first = True

    def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        nonlocal is_first
        delta = by_site[id(site)]
        if is_first:
            is_first = False
            return delta.output(values, x, y, 1, gathered)
        return delta.output(values, as_dense(x), as_dense(y), len(values))

    return edit


def make_layer_deltas(space: ParameterSpace, where: Tensor) -> tuple[LayerDelta, ...]:
    """Builds one `LayerDelta` per site. `where`, `K` int64, are positions of changed weights."""
    original, where = space.flat()[where.to(space.device)], where.cpu()
    return tuple(_layer_delta(site, where - site.offset, original) for site in space.sites)


def _layer_delta(site: LayerRef, where: Tensor, original: Tensor) -> LayerDelta:
    """Groups the changed weights of a layer.

    `where`, `K` on the CPU, are positions in the layer; those outside belong to other layers.
    """
    n_units, size = len(site.module.weight), site.weight_shape.numel()
    unit_size = size // n_units
    is_weight = (where >= 0) & (where < size)
    is_bias = (where >= size) & (where < site.size)
    unit, bias_unit = where[is_weight] // unit_size, where[is_bias] - size
    units = torch.cat([unit, bias_unit]).unique()
    if len(units) > MIN_SHARE_OF_ALL_UNITS * n_units:
        units = torch.arange(n_units, device=where.device)
    bias = torch.full((len(units),), len(where), device=where.device)
    bias[torch.searchsorted(units, bias_unit)] = is_bias.nonzero().flatten()

    slot = torch.searchsorted(units, unit)
    counts = torch.bincount(slot, minlength=len(units))
    columns = is_weight.nonzero().flatten()[slot.argsort(stable=True)].split(counts.tolist())
    size_class = counts.clamp_min(1).double().log2().ceil()
    order = size_class.argsort(stable=True)
    buckets = []
    for slots in order.split(size_class.unique(return_counts=True)[1].tolist()):
        of_bucket = [columns[i] for i in slots.tolist()]
        padded = pad_sequence(of_bucket, batch_first=True, padding_value=len(where))
        kernel_index = F.pad(where % unit_size, (0, 1))[padded]
        buckets.append(_unit_bucket(site, units[slots], padded, kernel_index))
    device = original.device
    return LayerDelta(
        site, original, units[order].to(device), tuple(buckets), bias[order].to(device)
    )


def _unit_bucket(
    site: LayerRef, units: Tensor, columns: Tensor, kernel_index: Tensor
) -> UnitBucket:
    module, device = site.module, site.module.weight.device
    n_units, group_channels, *kernel = site.weight_shape
    at: list[Tensor] = []
    groups = 1
    if not isinstance(module, nn.Linear):
        groups = module.groups
        at += torch.unravel_index(kernel_index % math.prod(kernel), kernel)
    group = units // (n_units // groups)
    channel = group.unsqueeze(1) * group_channels + kernel_index // math.prod(kernel)
    return UnitBucket(columns.to(device), tuple(x.to(device) for x in (channel, *at)))
