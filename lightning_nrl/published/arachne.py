"""Arachne's localisation: weights on the Pareto front of two impacts (Sohn et al. 2019, 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._utils.device import at_least_float32, no_autocast
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layer_gradients import (
    as_rows,
    bias_gradient,
    uses_per_weight,
    weight_gradient,
)
from lightning_nrl.evaluation.layers import LayerRef, layer_output
from lightning_nrl.localization.impact import (
    accumulate,
    flat_part,
    measure,
    replay_with_probe,
)
from lightning_nrl.localization.localizer import (
    Localization,
    Localizer,
    Replay,
    check_numbers,
    make_localization,
)
from lightning_nrl.localization.neurecover_lite import rank_impacts
from lightning_nrl.search.scoring.activation_cache import Chunk

TOP_PER_FAILURE = 20  # weights per failed sample from which Arachne chooses


@dataclass(frozen=True)
class Arachne(Localizer):
    """Localises weights with a large gradient and forward impact on failed samples (Arachne, 2019).

    The gradient of a weight w_ij is |dL/dw_ij| of the mean loss L. Its forward impact is the mean
    of |o_i w_ij|, where o_i is the input that the weight is multiplied with. Of the `n_g` weights
    with the largest gradients, the weights on the Pareto front of gradient and forward impact (see
    `pareto_front`) are localised. Passed samples are not used.

    Attributes:
        n_weights: number of weights to localise. If the front has fewer weights, weights on the
            front of the remaining weights are added, and so on. None: only the first front, as
            published.
        n_g: number of weights to compare. None: 20 per failed sample, as published, but at least
            `n_weights`.
        include_bias: True to localise biases too.
    """

    n_weights: int | None = None
    n_g: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights, n_g=self.n_g)

    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        impact = measure(recording, evaluator, failed)
        total = len(impact.backward)
        n_g = self.n_g or max(TOP_PER_FAILURE * int(failed.sum()), self.n_weights or 0)
        top = impact.backward.argsort(descending=True, stable=True)[:n_g].sort().values
        weights = top[first_fronts(impact.backward[top], impact.forward[top], self.n_weights)]
        return make_localization(weights, len(top), self.n_weights, total)


@dataclass(frozen=True)
class ArachneV2(Localizer):
    r"""Localises weights with more impact on failed than on passed samples (Arachne, TOSEM 2022).

    The result is the Pareto front of two scores, `impact on failed / (1 + impact on passed)`. The
    impact is the summed gradient :math:`|\sum dL/dw|` in one score and the forward impact (see
    `contribution`) in the other. The published method draws as many passed as failed samples,
    stratified by label. Here all passed samples are used, and the sum of their gradients is scaled
    to the number of failed samples.

    Attributes:
        n_weights: as in `Arachne`.
        include_bias: True to localise biases too.
    """

    n_weights: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)

    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        n_failed = int(failed.sum())
        gradients = []
        contributions = []
        for rows in (failed, passed):
            gradients.append(measure(recording, evaluator, rows).backward * n_failed)
            contributions.append(contribution(recording, evaluator, rows))
        gradient = gradients[0] / (1 + gradients[1])
        forward = contributions[0] / (1 + contributions[1])
        weights = first_fronts(gradient, forward, self.n_weights)
        return make_localization(weights, len(gradient), self.n_weights, len(gradient))


MAX_OUTPUTS = 32
"""Number of a sample's largest logits on which a neuron's influence is measured.

Each needs a backward pass.
"""


def contribution(recording: Replay, evaluator: Evaluator, rows_mask: Tensor) -> Tensor:
    r"""Measures the forward impact of every weight on the marked samples (Sohn, Kang, Yoo 2022).

    For the weight :math:`w_{ij}` from input :math:`o_i` to the neuron with output :math:`o_j` it is

    .. math:: \overline{\frac{|o_i w_{ij}|}{\sum_k |o_k w_{kj}|}}
        \cdot \overline{\sum_c |\partial z_c / \partial o_j|}

    The first mean is the weight's share of its neuron's input. The second mean is the neuron's
    influence on z, the `MAX_OUTPUTS` largest logits of a sample. The means are over samples and, in
    a convolution, over positions. The result has one number per weight, in the order of
    `ParameterSpace.flat`. The arguments are those of `measure`. Raises an `EvaluationError` if no
    sample is marked, and a `ReplayError` if a layer has no gradient.
    """
    space = recording.space
    sites = {site.name: site for site in space.sites}
    n_weights = [site.size for site in space.sites]
    n_neurons = [len(site.module.weight) for site in space.sites]

    def add(sums: Sequence[Tensor], chunk: Chunk, first: bool) -> None:
        share, influence, positions, samples = sums
        probe, outputs = replay_with_probe(recording, chunk, _largest)
        samples.add_(len(chunk.rows))
        shares = dict(zip(sites, share.split(n_weights), strict=True))
        influences = dict(zip(sites, influence.split(n_neurons), strict=True))
        uses = dict(zip(sites, positions.unbind(), strict=True))
        with no_autocast(share.device):
            for column in outputs.unbind(1):
                gradients = probe.gradients(column, torch.ones_like(column), retain_graph=True)
                for name, gradient in zip(probe.called, gradients, strict=True):
                    rows = at_least_float32(as_rows(sites[name].module, gradient)).abs()
                    influences[name].add_(bias_gradient(rows))
            for name, x, output in probe.seen:
                site = sites[name]
                rows = at_least_float32(as_rows(site.module, x)).abs()
                shares[name].add_(_share(site, rows))
                uses[name].add_(uses_per_weight(site.module, output))

    sizes = [space.size, sum(n_neurons), len(space.sites), 1]
    share, influence, positions, _ = accumulate(recording, evaluator, rows_mask, sizes, add)
    columns = (space.sites, share.split(n_weights), influence.split(n_neurons), positions.tolist())
    impacts = []
    for site, shares, influences, uses in zip(*columns, strict=True):
        weight = site.module.weight
        mean = influences / uses
        by_weight = mean.view(-1, *[1] * (weight.ndim - 1)).expand_as(weight)
        impacts.append(shares / uses * flat_part(site, by_weight, mean))
    return torch.cat(impacts)


def _largest(logits: Tensor) -> Tensor:
    outputs = logits.flatten(1)
    return outputs.topk(min(MAX_OUTPUTS, outputs.shape[1]), 1).values


def _share(site: LayerRef, x: Tensor) -> Tensor:
    """Sums |o_i w_ij| / sum_k |o_k w_kj| of each weight over rows and positions; `x` has |o_i|."""
    layer = site.module
    weight = layer.weight.detach().abs().to(x)
    bias = None
    if site.include_bias and layer.bias is not None:
        bias = layer.bias.detach().abs().to(x)
    total = layer_output(layer, x, weight, bias)
    inverse = torch.where(total > 0, 1 / total, 0.0)
    of_bias = bias_gradient(inverse)
    if bias is not None:
        of_bias = of_bias * bias
    return flat_part(site, weight_gradient(layer, x, inverse) * weight, of_bias)


def pareto_front(one: Tensor, other: Tensor) -> Tensor:
    """Marks the weights on the Pareto front of two scores; larger values are better.

    A weight is on the front unless another weight is better in one score and not worse in the
    other.

    Example:
        >>> pareto_front(torch.tensor([3.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 2.0]))
        tensor([ True,  True,  True, False])
    """
    pairs, numbers = torch.stack([one, other], 1).unique(dim=0, return_inverse=True)
    # From the largest score `one`, and of equal ones from the largest `other`.
    descending = pairs[:, 1].flip(0)
    best_before = descending.cummax(0).values.roll(1)
    best_before[:1] = -torch.inf
    front: Tensor = (descending > best_before).flip(0)[numbers]
    return front


def first_fronts(one: Tensor, other: Tensor, n_weights: int | None) -> Tensor:
    """Returns the positions of the weights on the Pareto front of two scores, in ascending order.

    If `n_weights` is given, that many positions are returned: weights are taken from the front,
    then from the front of the remaining weights, and so on. On the last front, the best weights are
    taken, judged by the worse of their ranks in the two scores. Weights whose two scores are 0 are
    never taken, so fewer than `n_weights` may be returned.
    """
    left = ((one > 0) | (other > 0)).nonzero().squeeze(1)
    if n_weights is None:
        return left[pareto_front(one[left], other[left])]
    worse_rank = torch.maximum(rank_impacts(one), rank_impacts(other))
    taken = left[:0]
    while len(taken) < n_weights and len(left):
        is_on_front = pareto_front(one[left], other[left])
        front = left[is_on_front]
        taken = torch.cat([taken, front[worse_rank[front].argsort(stable=True)]])
        left = left[~is_on_front]
    return taken[:n_weights].sort().values
