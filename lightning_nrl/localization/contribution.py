"""Arachne's forward impact: the share that a weight has in its neuron, times what the neuron does to the outputs.

A neuron is one output of a Linear or one channel of a convolution, at every position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._model.layer_inputs import as_rows, pad_input, uses_per_weight
from lightning_nrl._model.layers import Layer, LayerRef, ParameterSpace
from lightning_nrl._model.per_sample_grad import bias_gradient, weight_gradient
from lightning_nrl._utils.precision import at_least_float32, no_autocast, repeatable_gradients, widest
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.localization.impact import (
    Replay,
    as_many_as_fit,
    check_called,
    check_marked,
    check_reached,
    flat_part,
    probed,
)

__all__ = ["contribution"]

MOST_OUTPUTS = 32
"""How many outputs of a sample, the largest ones, a neuron's influence is measured on: each takes a backward pass."""

CONVOLUTION: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""torch's convolutions by dimensions of the weight."""


def contribution(recording: Replay, evaluator: Evaluator, rows_mask: Tensor) -> Tensor:
    r"""Forward impact of every weight on the marked samples (Sohn, Kang, Yoo 2022), `W`, never negative.

    .. math:: \overline{\frac{|o_i w_{ij}|}{\sum_k |o_k w_{kj}|}} \cdot \overline{\sum_c |\partial z_c / \partial o_j|}

    with the mean over samples and positions above each factor, and z a sample's outputs, of which the `MOST_OUTPUTS`
    largest count. The gradient of their sum would not do: softmax makes that direction one without any effect.

    Args:
        recording: the model on the known data of this rank.
        evaluator: the ranks that share the data.
        rows_mask: `N` bool, the samples to measure on, by row of the results.

    Raises:
        EvaluationError: no sample is marked on any rank.
        ReplayError: a layer is never called, or its output is detached.
    """
    space = recording.space
    sums = as_many_as_fit(partial(_sum_up, recording, rows_mask))
    sums = _ContributionSums.of(space, evaluator.collective.sum(sums.flat))
    check_marked(sums.samples)
    impact = torch.zeros_like(sums.share)
    for site, uses, start in zip(space.sites, sums.positions.tolist(), _starts(space)[:-1], strict=True):
        check_called(site, uses)
        influence = sums.influence[start : start + len(site.module.weight)] / uses
        here = slice(site.offset, site.offset + site.size)
        each = influence.view(-1, *[1] * (site.module.weight.ndim - 1)).expand_as(site.module.weight)
        impact[here] = sums.share[here] / uses * flat_part(site, each, influence)
    return impact


class _ContributionSums(NamedTuple):
    """Sums over samples and positions as views of one flat tensor."""

    flat: Tensor
    share: Tensor  # W, of each weight in its neuron
    influence: Tensor  # one a neuron, on the outputs
    positions: Tensor  # one a site: how many values a weight was multiplied with
    samples: Tensor  # 1

    @classmethod
    def of(cls, space: ParameterSpace, flat: Tensor) -> _ContributionSums:
        return cls(flat, *torch.split(flat, [space.size, _starts(space)[-1], len(space.sites), 1]))

    @classmethod
    def zeros(cls, space: ParameterSpace) -> _ContributionSums:
        size = space.size + _starts(space)[-1] + len(space.sites) + 1
        return cls.of(space, torch.zeros(size, dtype=widest(space.device), device=space.device))


def _starts(space: ParameterSpace) -> list[int]:
    """Where the neurons of each site begin, and how many there are."""
    starts = [0]
    for site in space.sites:
        starts.append(starts[-1] + len(site.module.weight))
    return starts


def _sum_up(recording: Replay, rows_mask: Tensor, size: int) -> _ContributionSums:
    """Sums over this rank's marked samples, so many at once."""
    sums = _ContributionSums.zeros(recording.space)
    with repeatable_gradients():
        for chunk in recording.chunks(size, rows_mask):
            _add(sums, recording, chunk)
    return sums


def _add(sums: _ContributionSums, recording: Replay, chunk: Any) -> None:
    """Adds the samples of one chunk to the sums."""
    probe, logits = probed(recording, chunk)
    with torch.enable_grad(), no_autocast(logits.device):
        outputs = logits.flatten(1)
        outputs = outputs.topk(min(MOST_OUTPUTS, outputs.shape[1]), 1).values
    check_reached(probe, outputs)
    sites = {site.name: i for i, site in enumerate(recording.space.sites)}
    starts = _starts(recording.space)
    sums.samples.add_(len(chunk.rows))
    with no_autocast(sums.flat.device):
        for column in outputs.unbind(1):
            gradients = probe.gradients(column, torch.ones_like(column), retain_graph=True)
            for name, gradient in zip(probe.called, gradients, strict=True):
                site = recording.space.sites[sites[name]]
                rows = at_least_float32(as_rows(site.module, gradient)).abs()
                here = slice(starts[sites[name]], starts[sites[name] + 1])
                sums.influence[here] += bias_gradient(rows)
        for name, x, output in probe.seen:
            site = recording.space.sites[sites[name]]
            rows = at_least_float32(as_rows(site.module, x)).abs()
            sums.share[site.offset : site.offset + site.size] += _share(site, rows)
            sums.positions[sites[name]] += uses_per_weight(site.module, output)


def _share(site: LayerRef, x: Tensor) -> Tensor:
    """Sum over rows and positions of each weight's share in its neuron, of absolute inputs `r x ...`."""
    layer = site.module
    weight = layer.weight.detach().abs().to(x)
    bias = layer.bias.detach().abs().to(x) if site.include_bias and layer.bias is not None else None
    total = _weighted_sum(layer, x, weight, bias)
    one_over = torch.where(total > 0, 1 / total, 0.0)
    own = bias_gradient(one_over) if bias is None else bias_gradient(one_over) * bias
    return flat_part(site, weight_gradient(layer, x, one_over) * weight, own)


def _weighted_sum(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output for inputs `r x ...`, with other weights."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    convolve = CONVOLUTION[weight.ndim]
    return convolve(
        pad_input(layer, x), weight, bias, stride=layer.stride, dilation=layer.dilation, groups=layer.groups
    )
