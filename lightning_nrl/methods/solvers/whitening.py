"""Changes of layers in whitened coordinates, in which steps of equal length move the layers'
outputs
equally.

A layer's output is a weighted sum of a window of its input. Let C be the second moment of these
windows on passed data. A change D of the weights of one output moves this output by D' C D in the
mean square. In coordinates x with D = C^(-1/2) x this is |x|^2. Gradients of margins use the same
coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
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
from lightning_nrl.methods.solvers.mini_batches import BATCH_SIZE, load_batches

MOMENT_RIDGE = (
    0.1  # of the mean eigenvalue, added to each; limits changes where passed samples hardly vary
)
MAX_MOMENT_SAMPLES, MAX_MOMENT_POSITIONS = (
    1024,
    128,
)  # passed samples, and positions of a convolution, per moment
MAX_FULL_MOMENT = 2048  # larger windows get a diagonal moment: a full root would take minutes


@dataclass(frozen=True)
class Whitening:
    """`K` coordinates of changes of several layers. Steps of equal length move the layers' outputs
    equally.

    `outputs` has for each layer the output channels that may change, int64. A channel has `d`
    weights, which include its bias if the bias may change. `roots` has for each layer the matrices
    C^(-1/2) of its groups of channels, where C is the second moment of the inputs: `groups x d x
    d`, or `groups x d` if only the diagonal of C is used.
    """

    sites: tuple[LayerRef, ...]
    outputs: tuple[Tensor, ...]
    roots: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return sum(
            len(outputs) * root.shape[-1]
            for outputs, root in zip(self.outputs, self.roots, strict=True)
        )

    def state(self, change: Tensor) -> State:
        """Returns the parameters of the layers: the model's values plus `change`, given in the `K`
        coordinates.
        """
        found, at = {}, 0
        for site, outputs, root in zip(self.sites, self.outputs, self.roots, strict=True):
            size = len(outputs) * root.shape[-1]
            columns = _scaled(
                site, outputs, root, change[at : at + size].view(1, len(outputs), -1)
            )[0]
            at, first = at + size, 0
            for name, parameter in site.parameters.items():
                last = first + parameter.numel() // len(parameter)
                added = columns.new_zeros(len(parameter), last - first)
                added[outputs], first = columns[:, first:last], last
                old = at_least_float32(parameter.detach())
                found[name] = (old + added.view_as(old)).to(parameter.dtype)
        return found


@torch.no_grad()
def fit_whitening(problem: Problem, max_size: int) -> Whitening:
    """Computes at most about `max_size` coordinates of the problem's layers from passed samples.

    If the layers have more weights than `max_size`, only some output channels of each layer may
    change: the channels with the largest squared gradients of the targets' margins.
    """
    space, before = problem.space, problem.before
    passed = before.passed.nonzero().flatten()
    generator = torch.Generator().manual_seed(problem.seed)
    drawn = passed[torch.randperm(len(passed), generator=generator)[:MAX_MOMENT_SAMPLES]]
    moments = [_zero_moment(site) for site in space.sites]
    for _, calls in _traced(problem, drawn):
        for site, moment in zip(space.sites, moments, strict=True):
            with no_autocast(space.device):
                for x, _ in calls[site.name]:
                    inputs = windows(site.module, x, MAX_MOMENT_POSITIONS).to(moment.dtype)
                    inputs = F.pad(inputs, (0, 1), value=1.0) if _has_bias(site) else inputs
                    moment += inputs.square().sum(1) if moment.ndim == 2 else inputs.mT @ inputs
    roots = tuple(_inverse_root(problem.collective.sum(moment)) for moment in moments)
    outputs = tuple(
        torch.arange(len(site.module.weight), device=space.device) for site in space.sites
    )
    whole = Whitening(space.sites, outputs, roots)
    if whole.size <= max_size:
        return whole
    useful = [torch.zeros(len(o), device=space.device) for o in outputs]
    for _, found in _gradients(problem, before.targeted.nonzero().flatten(), whole):
        for total, part in zip(useful, found, strict=True):
            total += part.square().sum((0, 2))
    kept = [max(1, int(max_size / whole.size * len(o))) for o in outputs]
    order = [
        problem.collective.agreed(problem.collective.sum(u).argsort(descending=True))
        for u in useful
    ]
    return Whitening(
        space.sites, tuple(o[:n].sort().values for o, n in zip(order, kept, strict=True)), roots
    )


@torch.no_grad()
def margin_gradients(
    problem: Problem, chosen: Tensor, whitening: Whitening, state: State
) -> tuple[Tensor, Tensor]:
    """Returns, on all ranks, the `m` rows `chosen`, sorted, and their margins' gradients at
    `state`, `m x K`.
    """
    rows, parts = [], []
    with temporary_weights(problem.model, state):
        for at, found in _gradients(problem, chosen, whitening):
            rows.append(at)
            parts.append(torch.cat([part.flatten(1) for part in found], 1))
    device = problem.space.device
    own = torch.cat(parts) if parts else torch.zeros(0, whitening.size, device=device)
    own_rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    all_rows = torch.cat(problem.collective.gather(own_rows))
    order = all_rows.argsort()
    return all_rows[order], torch.cat(problem.collective.gather(own))[order.to(device)]


def _traced(
    problem: Problem, chosen: Tensor
) -> Iterator[tuple[Tensor, dict[str, list[LayerCall]]]]:
    """Yields rows of this rank and their layer calls; raises on all ranks if gradients do not reach
    a layer.
    """
    if problem.space.gates:
        name = next(
            site.name.rpartition(".")[0] for site in problem.space.sites if site.gates is not None
        )
        raise ConfigurationError(
            f"`layer={name!r}`: `method='linearized'` cannot repair a recurrent layer.",
            "use `method='swarm'` or `method='finetune-polish'`, or name another layer.",
        )
    layers = {site.name: site.module for site in problem.space.sites}
    missed = dict.fromkeys(layers, False)
    for parts in load_batches(problem, chosen.split(BATCH_SIZE) if len(chosen) else ()):
        for batch, at in parts:
            _, calls = margin_calls(
                problem.model, layers, batch, problem.evaluator.task, problem.evaluator.context
            )
            missed |= {
                name: missed[name] or not is_by_sample(found, len(at))
                for name, found in calls.items()
            }
            if not any(missed.values()):
                yield at, calls
    for name, missing in missed.items():
        if problem.collective.any(missing):
            raise ConfigurationError(
                f"`layer={name!r}`: the gradients of the margins cannot be computed sample by sample in this layer.",
                "name a layer called as a module, batch first, without `torch.no_grad`; or use `method='swarm'`.",
            )


def _gradients(
    problem: Problem, chosen: Tensor, whitening: Whitening
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yields rows of this rank and, for each layer, the gradients of their margins, `n x outputs x
    d`.
    """
    for at, calls in _traced(problem, chosen):
        with no_autocast(problem.space.device):
            layers = zip(whitening.sites, whitening.outputs, whitening.roots, strict=True)
            yield (
                at,
                [_site_gradients(site, calls[site.name], len(at), *rest) for site, *rest in layers],
            )


def _site_gradients(
    site: LayerRef, calls: list[LayerCall], n: int, outputs: Tensor, root: Tensor
) -> Tensor:
    parts = []
    for weight, bias in sample_gradients(site.module, calls, n):
        gradient = weight.flatten(2)[:, outputs]
        if _has_bias(site):
            gradient = torch.cat([gradient, bias[:, outputs, None]], 2)
        parts.append(_scaled(site, outputs, root, gradient))
    return torch.cat(parts)


def _scaled(site: LayerRef, outputs: Tensor, root: Tensor, x: Tensor) -> Tensor:
    """Multiplies `n x outputs x d` by C^(-1/2): maps coordinates to weights, or gradients to
    coordinates.
    """
    root = root.to(x.dtype)
    group = outputs // (len(site.module.weight) // len(root))
    if root.ndim == 2:
        return x * root[group]
    if len(root) == 1:
        return x @ root[0]
    return torch.bmm(x.transpose(0, 1), root[group]).transpose(0, 1)


def _has_bias(site: LayerRef) -> bool:
    return len(site.parameters) > 1


def _zero_moment(site: LayerRef) -> Tensor:
    groups = getattr(site.module, "groups", 1)
    d = site.module.weight[0].numel() + _has_bias(site)
    shape = (groups, d) if d > MAX_FULL_MOMENT else (groups, d, d)
    return torch.zeros(
        shape, dtype=widest(site.module.weight.device), device=site.module.weight.device
    )


def _inverse_root(moment: Tensor) -> Tensor:
    diagonal = moment if moment.ndim == 2 else moment.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1).clamp_min(1e-30)
    if moment.ndim == 2:
        return (moment / mean[:, None] + MOMENT_RIDGE).rsqrt()
    values, vectors = torch.linalg.eigh(moment / mean[:, None, None])
    root: Tensor = (vectors * (values.clamp_min(0) + MOMENT_RIDGE).rsqrt()[:, None, :]) @ vectors.mT
    return root
