"""Impacts of weights (paper, section II.1, step i), and the localizer `ByGradient`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_nrl._utils.device import (
    at_least_float32,
    no_autocast,
    none_if_out_of_memory,
    repeatable_gradients,
    widest,
)
from lightning_nrl.errors import DataWarning, EvaluationError, ReplayError, check_choice
from lightning_nrl.evaluation import Evaluator
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
    Chunk,
    Localization,
    Localizer,
    Replay,
    check_numbers,
    default_n_weights,
    make_localization,
)

Aggregation = Literal["mean_gradient", "per_sample"]
"""Backward impact as the absolute mean gradient of samples, or the mean of absolute gradients."""

# Number of samples in a forward and backward pass; it is halved if memory runs out.
SAMPLES_PER_PASS = 64

# Adds the values of a chunk to sums, in place. The last argument is True only for the first chunk
# of more than one sample.
AddChunk = Callable[[Sequence[Tensor], Chunk, bool], None]


@dataclass(frozen=True)
class Impact:
    """Impacts of each of `W` weights on some samples (paper, section II.1, step i)."""

    backward: Tensor  # W: absolute gradient of the loss with respect to each weight
    forward: Tensor  # W: mean absolute product of each weight with its inputs


def measure(
    recording: Replay,
    evaluator: Evaluator,
    rows_mask: Tensor,
    *,
    aggregation: Aggregation = "mean_gradient",
    weight: Tensor | None = None,
) -> Impact:
    """Measures the backward and forward impact of every weight (paper, section II.1, step i).

    Only the marked samples count. The weight w_ij leads from a layer's input o_i to its output o_j.
    L is the loss of a sample. The backward impact is |dL/dw_ij| = |dL/do_j * do_j/dw_ij|, combined
    over samples as `aggregation` says. The forward impact is the mean of |o_i * w_ij| over samples.
    A convolution uses a weight at many positions: the gradient is summed over them, and |o_i *
    w_ij| is averaged over them, padding included. The forward impact of a bias is its absolute
    value.

    Args:
        recording: recording of the model on the known data of this rank.
        evaluator: supplies the task's losses and combines the impacts of all ranks.
        rows_mask: mask of the samples to measure, `N` bool, with one entry per row of the results.
        aggregation: `mean_gradient` for the absolute mean gradient, `per_sample` for the mean
            absolute gradient.
        weight: `N`, weights of the samples in the means, above 0 for measured samples; None: equal
            weights.

    Returns:
        Impacts in the order of `ParameterSpace.flat`, on the device of the weights, in float64, or
        float32 on MPS.

    Raises:
        ConfigurationError: the aggregation is unknown.
        EvaluationError: no sample is marked on any rank, or an impact is not finite.
        ReplayError: a layer's output is detached. With `per_sample` or `weight`, also if the size
            of the first dimension of a layer's input is not the number of samples.
    """
    check_choice("aggregation", aggregation, get_args(Aggregation))
    space = recording.space
    n_sites = len(space.sites)
    add = partial(_add_impacts, recording, evaluator, aggregation == "per_sample", weight)
    sizes = [space.size, space.size, n_sites, n_sites, 1]
    return _mean(space, *accumulate(recording, evaluator, rows_mask, sizes, add))


def _add_impacts(
    recording: Replay,
    evaluator: Evaluator,
    by_sample: bool,
    weights: Tensor | None,
    sums: Sequence[Tensor],
    chunk: Chunk,
    first: bool,
) -> None:
    gradient, inputs, positions, mixed, samples = sums
    n = len(chunk.rows)
    weight = None
    if weights is not None:
        weight = weights[chunk.rows.to(weights.device)].to(gradient)

    def losses(logits: Tensor) -> Tensor:
        loss = _differentiable(evaluator, logits, chunk.target)
        return loss if weight is None else loss * weight.to(loss)

    needs_samples = by_sample or weight is not None
    calls_by_site, is_mixed = _calls(recording, chunk, losses, check=first and needs_samples)
    samples.add_(n if weight is None else weight.sum())
    mixed.add_(is_mixed)
    with no_autocast(gradient.device):
        for i, site in enumerate(recording.space.sites):
            calls = calls_by_site[i]
            if needs_samples and calls and not is_by_sample(calls, n):
                mixed[i] += 1
                continue
            part = slice(site.offset, site.offset + site.size)
            for call in calls:
                absolute_inputs, n_uses = _forward_impact(site, call, weight)
                inputs[part] += absolute_inputs
                positions[i] += n_uses
            if by_sample:
                for of_weight, of_bias in sample_gradients(site.module, calls, n):
                    absolute = of_weight.abs().sum(0), of_bias.abs().sum(0)
                    gradient[part] += flat_part(site, *absolute)
                continue
            for x, g in calls:
                gradient[part] += flat_part(
                    site, weight_gradient(site.module, x, g), bias_gradient(g)
                )


def _forward_impact(site: LayerRef, call: LayerCall, weight: Tensor | None) -> tuple[Tensor, float]:
    """Sums the absolute inputs of a site's weights over a call; also returns the number of uses."""
    x, g = call
    n_uses: float = uses_per_weight(site.module, g)
    if weight is not None:
        of_rows = weight.to(x).repeat_interleave(len(x) // len(weight))
        x = x * of_rows.view(-1, *[1] * (x.ndim - 1))
        n_uses *= float(weight.mean())
    of_bias = x.new_full((g.shape[1],), n_uses)
    return flat_part(site, absolute_input(site.module, x, g), of_bias), n_uses


def accumulate(
    recording: Replay,
    evaluator: Evaluator,
    rows_mask: Tensor,
    sizes: Sequence[int],
    add: AddChunk,
) -> tuple[Tensor, ...]:
    """Sums vectors, whose lengths are `sizes`, over the marked samples of all ranks.

    `add(sums, chunk, first)` is called for each chunk of at most `SAMPLES_PER_PASS` samples. The
    last vector must count the samples; an `EvaluationError` is raised if it stays 0.
    """
    device = recording.space.device

    def sum_chunks(size: int) -> Tensor:
        flat = torch.zeros(sum(sizes), dtype=widest(device), device=device)
        first = True
        with repeatable_gradients():
            for chunk in recording.chunks(size, rows_mask):
                several = len(chunk.rows) > 1
                add(flat.split(sizes), chunk, first and several)
                first = first and not several
        return flat

    of_rank = None
    size = SAMPLES_PER_PASS
    while of_rank is None:
        # Ranks do not communicate here, so each may reduce its own pass size.
        of_rank = none_if_out_of_memory(partial(sum_chunks, size), last_try=size == 1)
        size //= 2
    sums: tuple[Tensor, ...] = evaluator.collective.sum(of_rank).split(sizes)
    if not sums[-1].item():
        raise EvaluationError(
            "`rows_mask` marks no sample.", "mark at least one sample on one rank."
        )
    return sums


def _calls(
    recording: Replay, chunk: Chunk, values_of: Callable[[Tensor], Tensor], *, check: bool
) -> tuple[list[list[LayerCall]], Tensor]:
    """Returns the calls of each site, with gradients of the values, and a mask of sites.

    The mask marks sites that mix samples: the value of one sample has a gradient at the rows of
    another. With `check` this is tested.
    """
    sites = recording.space.sites
    probe, values = replay_with_probe(recording, chunk, values_of)
    mixed = torch.zeros(len(sites), dtype=torch.bool, device=values.device)
    if check:
        half = len(values) // 2
        in_first_half = torch.arange(len(values), device=values.device) < half
        gradients = probe.gradients(values, in_first_half.to(values.dtype), retain_graph=True)
        names = [site.name for site in sites]
        for name, gradient in zip(probe.called, gradients, strict=True):
            i = names.index(name)
            rows = as_rows(sites[i].module, gradient)
            in_second_half = rows[len(rows) * half // len(values) :]
            mixed[i] |= (in_second_half.abs() > 0).any()
    calls = probe.calls(values)
    return [calls[site.name] for site in sites], mixed


def replay_with_probe(
    recording: Replay, chunk: Chunk, values_of: Callable[[Tensor], Tensor]
) -> tuple[OutputProbe, Tensor]:
    """Returns `values_of(logits)` of a chunk, and a probe for their gradients at all sites."""
    probe = OutputProbe({site.name: site.module for site in recording.space.sites})
    with torch.enable_grad():
        logits = recording.replay(
            chunk, lambda site, x, output: probe.add_zero(site.name, x, output)
        )
        with no_autocast(logits.device):
            values = values_of(logits)
    if probe.called and not values.requires_grad:
        raise ReplayError(
            f"`layer`: the loss has no gradient with respect to the outputs of {probe.called}.",
            "the model's forward must neither detach what these layers return "
            "nor run under `torch.no_grad()`.",
        )
    return probe, values


def _differentiable(evaluator: Evaluator, logits: Tensor, target: object) -> Tensor:
    """Returns the losses, `n`, or other values if these have no gradient.

    The other values are the negative margins, or else the mean squared logits.
    """
    task = evaluator.task
    loss = task.loss(logits, target)
    if loss.requires_grad or not logits.requires_grad:
        return loss
    margin = task.margin(logits, target)
    substitute = "mean squared output"
    values = at_least_float32(logits.flatten(1)).square().mean(1)
    if margin is not None and margin.requires_grad:
        substitute = "margin"
        values = -margin
    warnings.warn(
        DataWarning(
            "`task`: its loss has no gradient, "
            f"so weights are localised by the gradient of the {substitute}.",
            "give a differentiable loss to localise by it.",
        ),
        stacklevel=2,
    )
    return values


def flat_part(site: LayerRef, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns a site's part of a flat vector: values for its weight and, if searched, its bias."""
    return torch.cat([weight.flatten(), bias]) if len(site.parameters) > 1 else weight.flatten()


def _mean(
    space: ParameterSpace,
    gradient: Tensor,
    inputs: Tensor,
    positions: Tensor,
    mixed: Tensor,
    samples: Tensor,
) -> Impact:
    for site, is_mixed in zip(space.sites, mixed.tolist(), strict=True):
        if is_mixed:
            raise ReplayError(
                f"`aggregation='per_sample'`: input rows of `layer={site.name!r}` "
                "do not belong to one sample each.",
                "use `aggregation='mean_gradient'`; "
                "NeuRecover needs a layer with samples in the first dimension.",
            )
    size = torch.tensor([site.size for site in space.sites], device=gradient.device)
    backward = gradient.abs() / samples
    forward = inputs / positions.repeat_interleave(size) * space.flat().to(inputs).abs()
    if not bool((backward + forward).isfinite().all()):
        raise EvaluationError(
            "`layer`: impacts are not finite.",
            "look for samples with a NaN or infinite loss, "
            "or for gradients that overflow half precision.",
        )
    return Impact(backward, forward)


@LOCALIZERS.register("gradient")
@dataclass(frozen=True)
class ByGradient(Localizer):
    """Localises the weights with the largest gradient of the mean loss on the failed samples.

    Attributes:
        n_weights: number of weights to localise; None: `default_n_weights`.
        include_bias: True to localise biases too.
    """

    n_weights: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)

    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        """Returns the weights with the largest nonzero gradients.

        Weights with equal gradients keep their order.
        """
        gradient = measure(recording, evaluator, failed).backward
        wanted = self.n_weights or default_n_weights(len(gradient))
        top = gradient.argsort(descending=True, stable=True)[:wanted]
        weights = top[gradient[top] > 0].sort().values
        return make_localization(weights, len(weights), wanted, len(gradient))
