"""Weights to load into a model whose `train()` or `eval()` rewrites its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_nrl._utils.preserve import has_own_modes
from lightning_nrl._utils.state import State, changed, live_tensors, snapshot, write


def to_be_loaded(
    model: nn.Module, patch: dict[str, Tensor], rewritten: Mapping[int, Tensor]
) -> tuple[State, dict[str, Tensor]]:
    """Returns the tensors to load in training mode, and their values after the next `eval()`.

    Both are the patch, unless a module overrides `train()` or `eval()`, for instance to merge LoRA
    weights. Then `eval()` rewrites loaded tensors, so the state to load is chosen that `eval()`
    brings closest to the patch. Tensors that do not change are left out. Call this in evaluation
    mode inside `preserve_state`, which yields `rewritten`.
    """
    if not patch or not has_own_modes(model):
        return patch, patch
    evaluated, live = snapshot(model), live_tensors(model)
    model.train()
    # A tensor that `eval()` left alone may have been merged earlier; `train()` has then restored
    # it.
    trained = _earlier(live, snapshot(model), rewritten)
    _reload(model, trained)
    wanted = {**evaluated, **patch}
    best_gap = math.inf
    to_load: State = {}
    after_eval: State = {}
    for loaded in _candidates(model, snapshot(model), trained, wanted):
        _reload(model, loaded)
        result = snapshot(model)
        gap = sum(
            float((result[name].double() - value.double()).square().sum())
            for name, value in wanted.items()
        )
        if gap < best_gap:
            best_gap, to_load, after_eval = gap, loaded, result
        if not gap:
            break
    _reload(model, trained)
    write(model, evaluated)
    held = _earlier(live, evaluated, rewritten)
    new = {name: value for name, value in to_load.items() if not torch.equal(value, held[name])}
    return new, changed(model, after_eval)


def _earlier(live: State, state: State, rewritten: Mapping[int, Tensor]) -> State:
    """Returns `state` with the earlier values of the tensors that `eval()` has rewritten."""
    return {
        name: rewritten.get(id(live[name]), value).to(value.device) for name, value in state.items()
    }


def _candidates(
    model: nn.Module, evaluated: State, trained: State, wanted: State
) -> Iterator[State]:
    """Yields states to load.

    They are `wanted` as `train()` rewrites it, `trained` plus the wanted change, and `wanted`.
    """
    write(model, wanted)
    model.train()
    yield snapshot(model)
    moved = dict(wanted)
    for name, value in evaluated.items():
        if not torch.equal(value, trained[name]):
            moved[name] = (trained[name] + (wanted[name] - value)).to(value.dtype)
    yield moved
    yield wanted


def _reload(model: nn.Module, saved: State) -> None:
    model.train()
    write(model, saved)
    model.eval()
