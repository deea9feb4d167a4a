"""Backward and forward impacts of weights (paper, section II.1, step i), and the localizer `ByGradient`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import no_autocast, none_if_out_of_memory, repeatable_gradients, widest
from lightning_nrl.errors import EvaluationError, ReplayError, check_choice
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layer_gradients import (
    LayerCall,
    OutputProbe,
    absolute_input,
    as_rows,
    bias_gradient,
    is_by_sample,
    sample_gradients,
    uses_per_weight,
    weight_gradient,
)
from lightning_nrl.evaluation.layers import LayerRef, ParameterSpace
from lightning_nrl.localization.localizer import (
    LOCALIZERS,
    Localization,
    Replay,
    check_numbers,
    default_n_weights,
    localized,
)

Aggregation = Literal["mean_gradient", "per_sample"]
"""How gradients are combined to a backward impact: |their mean|, or the mean of each sample's |gradient|."""

SAMPLES_PER_PASS = 64
"""Most samples that run forward and backward at once, as few as in a small training step; halved where memory ends."""


@dataclass(frozen=True)
class Impact:
    """How much each weight matters for some data (paper, section II.1, step i)."""

    backward: Tensor  # W, the loss gradient's size for each weight, never negative
    forward: Tensor  # W, the size of what each weight passes on, never negative
    n_samples: int  # how many samples it was measured on


def measure(
    recording: Replay,
    evaluator: Evaluator,
    rows_mask: Tensor,
    *,
    aggregation: Aggregation = "mean_gradient",
    weight: Tensor | None = None,
) -> Impact:
    """Measures the backward and forward impact of every weight on the marked samples (paper, section II.1, step i).

    Backward is `dL/dw_ij = dL/do_j * do_j/dw_ij`: the absolute value of its mean over samples, or the mean of its
    absolute value. Forward is `o_i * w_ij`: the mean of its absolute value. A convolution's weight meets many inputs:
    its gradient is the sum over positions, its forward impact the mean over samples and positions, padding included.
    A bias passes on itself. Ranks add up their sums.

    Args:
        recording: the model on the known data of this rank.
        evaluator: what gives each sample's loss, and the ranks that share the data.
        rows_mask: `N` bool, the samples to measure on, by row of the results.
        aggregation: how the gradients of many samples become one number.
        weight: `N`, above 0 at marked rows, what each sample counts in the means; None: all alike.

    Returns:
        In the order of the weight space, on its device, in float64 (float32 where the device has no float64).

    Raises:
        ConfigurationError: an unknown aggregation.
        EvaluationError: no sample is marked on any rank, or an impact is not finite.
        ReplayError: a layer is never called or its output detached; for `per_sample` or with weights, samples that are
            not the first dimension of its input.
    """
    check_choice("aggregation", aggregation, get_args(Aggregation))
    space, sites = recording.space, len(recording.space.sites)
    by_sample = aggregation == "per_sample"

    def add(sums: Sequence[Tensor], chunk: Any, first: bool) -> None:
        gradient, inputs, positions, strayed, samples = sums
        n = len(chunk.rows)
        own = None if weight is None else weight[chunk.rows.to(weight.device)].to(gradient)

        def losses(logits: Tensor) -> Tensor:
            each = evaluator.task.loss(logits, chunk.target)
            return each if own is None else each * own.to(each)

        calls, astray = _calls(recording, chunk, losses, check=first and (by_sample or own is not None))
        samples.add_(n if own is None else own.sum())
        strayed.add_(astray)
        with no_autocast(gradient.device):
            for i, site in enumerate(space.sites):
                here, layer = slice(site.offset, site.offset + site.size), site.module
                if (by_sample or own is not None) and calls[i] and not is_by_sample(calls[i], n):
                    strayed[i] += 1
                    continue
                for x, g in calls[i]:
                    count: float = uses_per_weight(layer, g)
                    if own is not None:
                        x, count = _scaled(x, own), count * float(own.mean())
                    inputs[here] += flat_part(site, absolute_input(layer, x), x.new_full((g.shape[1],), count))
                    positions[i] += count
                if by_sample:
                    gradient[here] += _absolute_gradients(site, calls[i], n)
                    continue
                for x, g in calls[i]:
                    gradient[here] += flat_part(site, weight_gradient(layer, x, g), bias_gradient(g))

    sizes = [space.size, space.size, sites, sites, 1]
    return _mean(space, *summed_up(recording, evaluator, rows_mask, sizes, add))


def summed_up(
    recording: Replay,
    evaluator: Evaluator,
    rows_mask: Tensor,
    sizes: Sequence[int],
    add: Callable[[Sequence[Tensor], Any, bool], None],
) -> tuple[Tensor, ...]:
    """Returns sums over the marked samples of all ranks, of such sizes.

    `add(sums, chunk, first)` adds a chunk; the `first` one has more than one sample. Chunks are of `SAMPLES_PER_PASS`
    samples, or of as many as memory allows.
    """
    space = recording.space

    def work(size: int) -> Tensor:
        flat, first = torch.zeros(sum(sizes), dtype=widest(space.device), device=space.device), True
        with repeatable_gradients():
            for chunk in recording.chunks(size, rows_mask):
                several = len(chunk.rows) > 1
                add(flat.split(sizes), chunk, first and several)
                first = first and not several
        return flat

    found, size = None, SAMPLES_PER_PASS
    while found is None:
        # Ranks exchange nothing here: each may do with fewer samples at once by itself.
        found = none_if_out_of_memory(partial(work, size), last_try=size == 1)
        size //= 2
    sums: tuple[Tensor, ...] = evaluator.collective.sum(found).split(sizes)
    if not sums[-1].item():
        raise EvaluationError(
            "`rows_mask` marks no sample to measure impacts on.", "mark at least one sample on one rank."
        )
    return sums


def _scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.to(x).repeat_interleave(len(x) // len(weight)).view(-1, *[1] * (x.ndim - 1))


def _calls(
    recording: Replay, chunk: Any, values: Callable[[Tensor], Tensor], *, check: bool
) -> tuple[list[list[LayerCall]], Tensor]:
    """Returns the calls of each site, with the gradients of `values` of the logits, one number a sample.

    If `check`, also at which sites the rows of a sample are not those where its gradient is.
    """
    sites = recording.space.sites
    probe, made = probed(recording, chunk, values)
    strayed = torch.zeros(len(sites), dtype=torch.bool, device=made.device)
    if check:
        half, order = len(made) // 2, {site.name: i for i, site in enumerate(sites)}
        first = (torch.arange(len(made), device=made.device) < half).to(made.dtype)
        for name, gradient in zip(probe.called, probe.gradients(made, first, retain_graph=True), strict=True):
            g = as_rows(sites[order[name]].module, gradient)
            strayed[order[name]] |= (g[len(g) * half // len(made) :].abs() > 0).any()
    calls = probe.calls(made)
    return [calls[site.name] for site in sites], strayed


def probed(recording: Replay, chunk: Any, values: Callable[[Tensor], Tensor]) -> tuple[OutputProbe, Tensor]:
    """Returns a probe at the outputs of all sites, and `values` of the logits, which must depend on these outputs."""
    probe = OutputProbe({site.name: site.module for site in recording.space.sites})
    with torch.enable_grad():
        logits = recording.replay(chunk, lambda site, x, output: probe.add_zero(site.name, x, output))
        with no_autocast(logits.device):
            made = values(logits)
    if probe.called and not made.requires_grad:
        raise ReplayError(
            f"`layer`: the loss has no gradient with respect to the outputs of {probe.called}.",
            "the model's forward must neither detach what these layers return nor run under `torch.no_grad()`.",
        )
    return probe, made


def _absolute_gradients(site: LayerRef, calls: Sequence[LayerCall], n: int) -> Tensor:
    layer = site.module
    if isinstance(layer, nn.Linear) and [len(call.input) for call in calls] == [n]:
        # Of one position, |g_j * x_i| = |g_j| * |x_i|: no sample needs a gradient of its own.
        x, g = calls[0].input.abs(), calls[0].gradient.abs()
        return flat_part(site, weight_gradient(layer, x, g), bias_gradient(g))
    total = torch.zeros(site.size, dtype=torch.float32, device=layer.weight.device)
    for weight, bias in sample_gradients(layer, calls, n):
        total = total + flat_part(site, weight.abs().sum(0), bias.abs().sum(0))
    return total


def check_called(site: LayerRef, count: float) -> None:
    """Refuses a layer that was called on nothing."""
    if not count:
        raise ReplayError(
            f"`layer={site.name!r}` is never called when the model runs.",
            "name a layer whose own forward is called; attention uses the weights of its `out_proj` directly.",
        )


def flat_part(site: LayerRef, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns a site's part of the flat vector."""
    return torch.cat([weight.flatten(), bias]) if len(site.parameters) > 1 else weight.flatten()


def _mean(
    space: ParameterSpace, gradient: Tensor, inputs: Tensor, positions: Tensor, strayed: Tensor, samples: Tensor
) -> Impact:
    for site, count, astray in zip(space.sites, positions.tolist(), strayed.tolist(), strict=True):
        if astray:
            raise ReplayError(
                f"`aggregation='per_sample'`: the rows of the input of `layer={site.name!r}` are not sample by sample.",
                "use `aggregation='mean_gradient'`; NeuRecover needs a layer with samples in the first dimension.",
            )
        check_called(site, count)
    size = torch.tensor([site.size for site in space.sites], device=gradient.device)
    backward = gradient.abs() / samples
    forward = inputs / positions.repeat_interleave(size) * space.flat().to(inputs).abs()
    if not bool((backward + forward).isfinite().all()):
        raise EvaluationError(
            "`layer`: impacts are not finite.",
            "look for samples with a NaN or infinite loss, or for gradients that overflow half precision.",
        )
    return Impact(backward, forward, int(samples))


@LOCALIZERS.register("gradient")
@dataclass(frozen=True)
class ByGradient:
    """Localises the weights with the largest mean loss gradient on the failed samples, whatever the passed ones say.

    Attributes:
        n_weights: how many; None: as many as `default_n_weights` says.
        include_bias: whether biases may be localised too.
    """

    n_weights: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Takes the largest gradients, of equal ones the first; weights without any are left out."""
        gradient = measure(recording, evaluator, failed).backward
        wanted = self.n_weights or default_n_weights(len(gradient))
        top = gradient.argsort(descending=True, stable=True)[:wanted]
        weights = top[gradient[top] > 0].sort().values
        return localized(weights, len(weights), wanted, len(gradient))
