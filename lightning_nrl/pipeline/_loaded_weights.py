"""Weights to be saved for a model that writes to its own whenever it goes to evaluation, such as adapters merged there.

A repair runs on the model in evaluation mode. What is saved is loaded in training mode, and `eval()` comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_nrl._utils.preserve import has_own_modes
from lightning_nrl._utils.state import State, changed, live_tensors, snapshot, write


def to_be_loaded(
    model: nn.Module, patch: dict[str, Tensor], rewritten: Mapping[int, Tensor]
) -> tuple[State, dict[str, Tensor]]:
    """What to save so that `eval()` makes of it what is wanted, as nearly as the module lets it.

    Args:
        model: in evaluation mode, inside of `preserve`, which brings it back afterwards.
        patch: whole tensors by name, as they should be in evaluation mode.
        rewritten: the tensors to which `eval()` wrote, as they were before (see `preserve`).

    Returns:
        The tensors to save, and those that the model then has in evaluation mode, as far as either differs from what it
        has now. Where `train()` and `eval()` are torch's own, both are the patch.
    """
    if not patch or not has_own_modes(model):
        return patch, patch
    evaluated = snapshot(model)
    trained = {name: rewritten.get(id(x), evaluated[name]).to(x.device) for name, x in live_tensors(model).items()}
    wanted = {**evaluated, **patch}
    best: tuple[float, State, State] | None = None
    for saved in _candidates(model, evaluated, trained, wanted):
        _reload(model, saved)
        found = snapshot(model)
        gap = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
        if best is None or gap < best[0]:
            best = gap, {name: x for name, x in saved.items() if not torch.equal(x, trained[name])}, found
        if not gap:
            break
    assert best is not None
    _reload(model, trained)
    write(model, evaluated)
    return best[1], changed(model, best[2])


def _candidates(model: nn.Module, evaluated: State, trained: State, wanted: State) -> Iterator[State]:
    """The module's own way back by `train()`, the same change before `eval()`, and the weights wanted."""
    write(model, wanted)
    model.train()
    yield snapshot(model)
    yield {
        name: wanted[name] if torch.equal(x, trained[name]) else (trained[name] + (wanted[name] - x)).to(x.dtype)
        for name, x in evaluated.items()
    }
    yield wanted


def _reload(model: nn.Module, saved: State) -> None:
    model.train()
    write(model, saved)
    model.eval()
