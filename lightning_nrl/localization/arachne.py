"""Arachne's localisation: the Pareto front of gradient and forward impact (Sohn, Kang, Yoo 2019, 2022).

`Arachne` looks at the failed data alone. `ArachneV2` looks for what matters for the failed and little for the passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.device import at_least_float32, no_autocast, repeatable_gradients, widest
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layer_gradients import as_rows, bias_gradient, uses_per_weight, weight_gradient
from lightning_nrl.evaluation.layers import LayerRef, ParameterSpace, layer_output
from lightning_nrl.localization.impact import (
    as_many_as_fit,
    check_called,
    check_marked,
    check_reached,
    flat_part,
    measure,
    probed,
)
from lightning_nrl.localization.localizer import LOCALIZERS, Localization, Replay, check_numbers, localized
from lightning_nrl.localization.neurecover_lite import places

TOP_PER_FAILURE = 20
"""Weights that Arachne looks at for each failed sample."""


@LOCALIZERS.register("arachne")
@dataclass(frozen=True)
class Arachne:
    """Localises the weights on the Pareto front of |dL/dw| and mean |o_i w_ij| on the failed samples (Arachne, 2019).

    Of all weights the `n_g` with the largest gradient come into question; passed samples are not looked at.

    Attributes:
        n_weights: how many weights to localise: further fronts follow the first one until there are so many. None: the
            first front, as published.
        n_g: how many weights of largest gradient come into question; None: 20 for each failed sample, as published, and
            no fewer than `n_weights`.
        include_bias: whether biases may be localised too.

    Raises:
        ConfigurationError: a number below 1 or not whole.
    """

    n_weights: int | None = None
    n_g: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights, n_g=self.n_g)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Measures both impacts on the failed samples and takes the front."""
        impact = measure(recording, evaluator, failed)
        total = len(impact.backward)
        n_g = self.n_g or max(TOP_PER_FAILURE * int(failed.sum()), self.n_weights or 0)
        top = impact.backward.argsort(descending=True, stable=True)[:n_g].sort().values
        weights = top[first_fronts(impact.backward[top], impact.forward[top], self.n_weights)]
        return localized(weights, len(top), self.n_weights, total)


@LOCALIZERS.register("arachne-v2")
@dataclass(frozen=True)
class ArachneV2:
    r"""Localises the weights that matter for the failed samples and little for the passed (Arachne, TOSEM 2022).

    The Pareto front of two costs of all weights, each `cost(failed) / (1 + cost(passed))`: the gradient loss
    :math:`|\sum dL/dw|` and the forward impact (`contribution`). Where the published method draws as many passed
    samples as there are failed ones, stratified by label, all are measured here and their sum counts as if they were so
    many: the same on average, and nothing is drawn.

    Attributes:
        n_weights: how many weights to localise: further fronts follow the first one until there are so many. None: the
            first front, as published.
        include_bias: whether biases may be localised too.

    Raises:
        ConfigurationError: a number below 1 or not whole.
    """

    n_weights: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Measures both costs on failed and passed samples and takes the front."""
        n_failed = int(failed.sum())
        costs = []
        for rows in (failed, passed):
            gradient = measure(recording, evaluator, rows).backward * n_failed
            costs.append((gradient, contribution(recording, evaluator, rows)))
        gradient, forward = (of_failed / (1 + of_passed) for of_failed, of_passed in zip(*costs, strict=True))
        weights = first_fronts(gradient, forward, self.n_weights)
        return localized(weights, len(gradient), self.n_weights, len(gradient))


MOST_OUTPUTS = 32
"""How many outputs of a sample, the largest ones, a neuron's influence is measured on: each takes a backward pass."""


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
    sums = _ContributionSums.zeros(recording.space)
    with repeatable_gradients():
        for chunk in recording.chunks(size, rows_mask):
            _add(sums, recording, chunk)
    return sums


def _add(sums: _ContributionSums, recording: Replay, chunk: Any) -> None:
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
    total = layer_output(layer, x, weight, bias)
    one_over = torch.where(total > 0, 1 / total, 0.0)
    own = bias_gradient(one_over) if bias is None else bias_gradient(one_over) * bias
    return flat_part(site, weight_gradient(layer, x, one_over) * weight, own)


def pareto_front(one: Tensor, other: Tensor) -> Tensor:
    """`W` bool, the weights that no other one dominates; larger is better in both of `one` and `other`, `W` each.

    A weight dominates another if it is at least as good in both and better in one, so equal ones are in it together.

    Example:
        >>> pareto_front(torch.tensor([3.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 2.0]))
        tensor([ True,  True,  True, False])
    """
    by_other = other.argsort(descending=True, stable=True)
    order = by_other[one[by_other].argsort(descending=True, stable=True)]
    a, b = one[order], other[order]
    before = torch.cat([b.new_full((1,), -torch.inf), b.cummax(0).values[:-1]])
    leads = b > before
    # Of equal weights the first one leads; the others are where its place is the last that led.
    rows = torch.arange(len(order), device=order.device)
    leader = torch.where(leads, rows, 0).cummax(0).values
    front = leads | ((a == a[leader]) & (b == b[leader]))
    return torch.zeros_like(front).scatter_(0, order, front)


def first_fronts(one: Tensor, other: Tensor, n_weights: int | None) -> Tensor:
    """Positions of weights, ascending: those of the Pareto front, or as many as asked for, front after front.

    The first front, then that of the rest, and so on. Of the last one as many as are lacking are taken, first those
    whose worse rank of the two is best, and of equal ones the first. Weights that are 0 in both are never taken.
    """
    left = ((one > 0) | (other > 0)).nonzero().squeeze(1)
    if n_weights is None:
        return left[pareto_front(one[left], other[left])]
    worse_rank = torch.maximum(places(one), places(other))
    taken = left[:0]
    while len(taken) < n_weights and len(left):
        front = pareto_front(one[left], other[left])
        new = left[front]
        new = new[worse_rank[new].argsort(stable=True)][: n_weights - len(taken)]
        taken, left = torch.cat([taken, new]), left[~front]
    return taken.sort().values
