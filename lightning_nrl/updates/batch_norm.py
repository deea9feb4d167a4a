"""The statistics that batch norm layers normalise with, estimated anew: those of other weights do not fit new ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.state import device_of
from lightning_nrl.data.adapters import bind_adapter, unpack
from lightning_nrl.data.batch import Adapter, Source, run_model, unpacked
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import Evaluator

DEFAULT_BATCH_SIZE = 256
"""Samples at once from a source that does not say how many."""
FEWEST_SAMPLES_AT_ONCE = 4
"""Samples at once at least: with fewer, a batch of one could be left on some rank, which batch norm refuses."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norm layers whose statistics follow the training, by name.

    Not those that do not track statistics, as Lightning leaves a frozen one, and those in evaluation mode while the
    model trains, which is how one freezes them by hand.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.track_running_stats
        and layer.running_mean is not None
        and (layer.training or not model.training)
    }


@torch.no_grad()
def estimate_statistics(
    model: nn.Module | Evaluator,
    data: Source | Iterable[Any],
    *,
    batches: int | None = None,
    seed: int = 0,
    adapter: Adapter = unpack,
) -> dict[str, Tensor]:
    """Means and variances of the inputs of all batch norm layers, averaged over batches, in one pass over data.

    What Izmailov et al. 2018 (Averaging weights leads to wider optima and better generalization) do after averaging
    weights. Only batch norm layers are in training mode meanwhile: dropout drops nothing. The model is left as found.

    Args:
        model: with the weights that the statistics are to fit, on its device. An `Evaluator` says in which precision it
            runs, and which ranks share the data: their averages are averaged, each with the weight of its batches.
        data: a source, read in random order, since batches of sorted data would be unlike each other; or batches as a
            data loader gives them, read as they come, the last few not too small.
        batches: how many of them; None: all.
        seed: of the random order.
        adapter: takes raw batches apart.

    Returns:
        `running_mean`, `running_var` and `num_batches_tracked` of each layer that was called, as in the state dict.
    """
    evaluator = Evaluator.of(model)
    layers, collective = batch_norms(evaluator.model), evaluator.collective
    if not layers:
        return {}
    chosen = _drawn(data, batches, seed, collective) if isinstance(data, Source) else islice(data, batches)

    def run() -> int:
        n, bound = 0, bind_adapter(adapter, evaluator.model)
        for args, kwargs, _ in unpacked(chosen, bound, device_of(evaluator.model)):
            with evaluator.context():
                run_model(evaluator.model, args, kwargs)
            n += 1
        return n

    with preserve(evaluator.model), _averaging(layers):
        n = collective.all_or_none(run, "the data for batch norm statistics could not be read on another rank.")
        if not int(collective.sum(torch.tensor(n))):
            raise ConfigurationError("`data`: no batch came for batch norm statistics.", "give data with samples.")
        return _averaged(layers, collective)


def _drawn(source: Source, batches: int | None, seed: int, collective: Collective) -> Iterator[Any]:
    """This rank's samples in random order, in batches of about one size, as many as on every other rank."""
    mine = source.positions
    size = max(int(getattr(source, "batch_size", 0) or DEFAULT_BATCH_SIZE), FEWEST_SAMPLES_AT_ONCE)
    most = int(torch.cat(collective.gather(torch.tensor([len(mine)]))).max())
    order = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(seed))]
    parts = [part for part in order.tensor_split(max(-(-most // size), 1)) if len(part)]
    return iter(source.draw(parts[:batches]))


@contextmanager
def _averaging(layers: dict[str, _BatchNorm]) -> Iterator[None]:
    """The layers forget what they know, and give every batch the same weight; to be used inside of `preserve`."""
    momenta = [layer.momentum for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None
            layer.training = True
        yield
    finally:
        for layer, momentum in zip(layers.values(), momenta, strict=True):
            layer.momentum = momentum


def _averaged(layers: dict[str, _BatchNorm], collective: Collective) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
        assert mean is not None
        assert var is not None
        assert count is not None
        both = torch.stack([mean, var])
        if collective.world_size > 1:
            total = collective.sum(count)
            wide = at_least_float32(both)
            both = (collective.sum(wide * count) / total.clamp_min(1)).to(both.dtype)
            count = total
        if int(count):
            names = [".".join(filter(None, (name, kind))) for kind in ("running_mean", "running_var")]
            found |= dict(zip(names, both.clone().unbind(), strict=True))
            found[".".join(filter(None, (name, "num_batches_tracked")))] = count.clone()
    return found
