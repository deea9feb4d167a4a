"""Layer changes in whitened coordinates, where steps of equal length move the outputs equally.

A layer's output is a weighted sum of a window of its input. Let C be the second moment of these
windows on passed data. A change D of the weights of one output moves this output by D' C D in the
mean square. In coordinates x with D = C^(-1/2) x this is |x|^2. Gradients of margins use the same
coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._utils.device import at_least_float32, no_autocast, widest
from lightning_nrl._utils.state import State, temporary_weights
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.layer_gradients import (
    LayerCall,
    is_by_sample,
    margin_calls,
    sample_gradients,
    windows,
)
from lightning_nrl.evaluation.layers import LayerRef
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solvers.mini_batches import load_rows

# Share of the mean eigenvalue, added to each; limits changes where passed samples hardly vary.
MOMENT_RIDGE = 0.1
# Limits of the cost of a moment: passed samples, and positions of a convolution in a sample.
MAX_MOMENT_SAMPLES = 1024
MAX_MOMENT_POSITIONS = 128
MAX_FULL_MOMENT = 2048  # larger windows get a diagonal moment: a full root would take minutes


@dataclass(frozen=True)
class LayerCoordinates:
    """Whitened coordinates of one layer's changes: `d` for each output channel that may change.

    A channel has `d` weights, which include its bias if the bias may change.
    """

    site: LayerRef
    outputs: Tensor  # int64, the output channels that may change
    # C^(-1/2) for each group of channels, where C is the second moment of the inputs:
    # groups x d x d, or groups x d if only the diagonal of C is used.
    root: Tensor

    @property
    def size(self) -> int:
        return len(self.outputs) * self.root.shape[-1]

    def scaled(self, x: Tensor) -> Tensor:
        """Multiplies `n x outputs x d` by C^(-1/2): coordinates to weights, or gradients back."""
        root = self.root.to(x.dtype)
        group = self.outputs // (len(self.site.module.weight) // len(root))
        if root.ndim == 2:
            return x * root[group]
        if len(root) == 1:
            return x @ root[0]
        return torch.bmm(x.transpose(0, 1), root[group]).transpose(0, 1)

    def parameters(self, change: Tensor) -> dict[str, Tensor]:
        """Returns the layer's parameters plus `change`, given in this layer's coordinates."""
        columns = self.scaled(change.view(1, len(self.outputs), -1))[0]
        new = {}
        start = 0
        for name, parameter in self.site.parameters.items():
            end = start + parameter[0].numel()
            added = columns.new_zeros(len(parameter), end - start)
            added[self.outputs] = columns[:, start:end]
            old = at_least_float32(parameter.detach())
            new[name] = (old + added.view_as(old)).to(parameter.dtype)
            start = end
        return new

    def gradients(self, calls: Sequence[LayerCall], n: int) -> Tensor:
        """Returns the gradients of `n` samples, `n x outputs x d`, in whitened coordinates."""
        parts = []
        for weight, bias in sample_gradients(self.site.module, calls, n):
            gradient = weight.flatten(2)[:, self.outputs]
            if _has_bias(self.site):
                gradient = torch.cat([gradient, bias[:, self.outputs, None]], 2)
            parts.append(self.scaled(gradient))
        return torch.cat(parts)


@dataclass(frozen=True)
class Whitening:
    """`K` coordinates of changes of several layers, whose outputs move equally per unit step."""

    layers: tuple[LayerCoordinates, ...]

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)

    def state(self, change: Tensor) -> State:
        """Returns the layers' parameters: the model's values plus `change`, `K` coordinates."""
        state: dict[str, Tensor] = {}
        parts = change.split([layer.size for layer in self.layers])
        for layer, part in zip(self.layers, parts, strict=True):
            state |= layer.parameters(part)
        return state


@torch.no_grad()
def fit_whitening(problem: Problem, max_size: int) -> Whitening:
    """Computes at most about `max_size` coordinates of the problem's layers from passed samples.

    If the layers have more weights than `max_size`, only some output channels of each layer may
    change: the channels with the largest squared gradients of the targets' margins.
    """
    sites = problem.space.sites
    passed = problem.before.passed.nonzero().flatten()
    generator = torch.Generator().manual_seed(problem.seed)
    drawn = passed[torch.randperm(len(passed), generator=generator)[:MAX_MOMENT_SAMPLES]]
    moments = [_zero_moment(site) for site in sites]
    for _, calls in _traced(problem, drawn):
        for site, moment in zip(sites, moments, strict=True):
            for call in calls[site.name]:
                _add_to_moment(moment, site, call.input)
    layers = []
    for site, moment in zip(sites, moments, strict=True):
        channels = torch.arange(len(site.module.weight), device=problem.space.device)
        layers.append(
            LayerCoordinates(site, channels, _inverse_root(problem.collective.sum(moment)))
        )
    whitening = Whitening(tuple(layers))
    if whitening.size <= max_size:
        return whitening
    return _narrowed(problem, whitening, max_size / whitening.size)


def _narrowed(problem: Problem, whitening: Whitening, share: float) -> Whitening:
    """Keeps a share of each layer's channels: those with the largest gradients of the targets."""
    layers = whitening.layers
    usefulness = [torch.zeros(len(layer.outputs), device=problem.space.device) for layer in layers]
    for _, gradients in _gradients(problem, problem.before.targeted.nonzero().flatten(), whitening):
        for total, gradient in zip(usefulness, gradients, strict=True):
            total += gradient.square().sum((0, 2))
    kept = []
    for layer, total in zip(layers, usefulness, strict=True):
        n_kept = max(1, int(share * len(total)))
        order = problem.collective.sum(total).argsort(descending=True)
        chosen = problem.collective.agreed(order)[:n_kept].sort().values
        kept.append(replace(layer, outputs=layer.outputs[chosen]))
    return Whitening(tuple(kept))


@torch.no_grad()
def margin_gradients(
    problem: Problem, chosen: Tensor, whitening: Whitening, state: State
) -> tuple[Tensor, Tensor]:
    """Returns on all ranks the sorted rows `chosen`, `m`, and their margins' gradients, `m x K`.

    The gradients are taken at the weights `state`.
    """
    rows = []
    gradients = []
    with temporary_weights(problem.model, state):
        for batch_rows, by_layer in _gradients(problem, chosen, whitening):
            rows.append(batch_rows)
            gradients.append(torch.cat([part.flatten(1) for part in by_layer], 1))
    all_rows, all_gradients = problem.collective.gather_sorted(rows, gradients)
    return all_rows, all_gradients.to(problem.space.device)


def _traced(
    problem: Problem, chosen: Tensor
) -> Iterator[tuple[Tensor, dict[str, list[LayerCall]]]]:
    """Yields rows of this rank and their layer calls.

    Raises:
        ConfigurationError: on all ranks, if gradients do not reach a layer.
    """
    for site in problem.space.sites:
        if site.gates is not None:
            layer = site.name.rpartition(".")[0]
            raise ConfigurationError(
                f"`layer={layer!r}`: `method='linearized'` cannot repair a recurrent layer.",
                "use `method='swarm'` or `method='finetune-polish'`, or name another layer.",
            )
    modules = {site.name: site.module for site in problem.space.sites}
    missed: set[str] = set()
    for batch, rows in load_rows(problem, chosen):
        _, calls = margin_calls(problem.evaluator, modules, batch)
        missed.update(name for name in modules if not is_by_sample(calls[name], len(rows)))
        if not missed:
            yield rows, calls
    for name in modules:
        if problem.collective.any(name in missed):
            raise ConfigurationError(
                f"`layer={name!r}`: the gradients of the margins cannot be computed "
                "sample by sample in this layer.",
                "name a layer called as a module, batch first, without `torch.no_grad`; "
                "or use `method='swarm'`.",
            )


def _gradients(
    problem: Problem, chosen: Tensor, whitening: Whitening
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yields rows of this rank and gradients of their margins, `n x outputs x d` per layer."""
    for rows, calls in _traced(problem, chosen):
        with no_autocast(problem.space.device):
            gradients = []
            for layer in whitening.layers:
                gradients.append(layer.gradients(calls[layer.site.name], len(rows)))
            yield rows, gradients


def _has_bias(site: LayerRef) -> bool:
    return len(site.parameters) > 1


def _zero_moment(site: LayerRef) -> Tensor:
    layer = site.module
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    d = layer.weight[0].numel() + int(_has_bias(site))
    shape = [groups, d, d]
    if d > MAX_FULL_MOMENT:
        shape = [groups, d]
    return layer.weight.new_zeros(shape, dtype=widest(layer.weight.device))


def _add_to_moment(moment: Tensor, site: LayerRef, x: Tensor) -> None:
    with no_autocast(x.device):
        inputs = windows(site.module, x, MAX_MOMENT_POSITIONS).to(moment.dtype)
        if _has_bias(site):
            inputs = F.pad(inputs, (0, 1), value=1.0)
        moment += inputs.square().sum(1) if moment.ndim == 2 else inputs.mT @ inputs


def _inverse_root(moment: Tensor) -> Tensor:
    diagonal = moment if moment.ndim == 2 else moment.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1).clamp_min(1e-30)
    if moment.ndim == 2:
        return (moment / mean[:, None] + MOMENT_RIDGE).rsqrt()
    values, vectors = torch.linalg.eigh(moment / mean[:, None, None])
    scales = (values.clamp_min(0) + MOMENT_RIDGE).rsqrt()
    root: Tensor = (vectors * scales[:, None, :]) @ vectors.mT
    return root
