"""Weights of a model as tensors by name: copies, interpolation, hashes, temporary and permanent
writing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import widest
from lightning_nrl.errors import ConfigurationError

State = Mapping[str, Tensor]  # parameters and buffers by their names in the module tree


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Returns detached copies of all parameters and persistent buffers, on their devices."""
    return {name: value.detach().clone() for name, value in live_tensors(model).items()}


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter or buffer, or the CPU if the model has neither."""
    held = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if held is None else held.device


@torch.no_grad()
def changed(model: nn.Module, state: State) -> dict[str, Tensor]:
    """Returns the tensors of `state` that differ from the model's. A shared tensor is returned
    under
    each of its names.

    `state` may be on another device, since Lightning moves the model to the CPU after a fit on a
    GPU.

    Raises:
        ConfigurationError: a name is not in the model, or its tensor has another shape there.
    """
    live = _checked(model, state)
    pairs = ((live[name], value) for name, value in state.items())
    new = {id(own): value for own, value in pairs if not torch.equal(own, value.to(own.device))}
    return {name: new[id(value)] for name, value in live.items() if id(value) in new}


@contextmanager
def temporary_weights(model: nn.Module, state: State) -> Iterator[None]:
    """Replaces tensors of the model for a block, then puts the original tensor objects back. Raises
    like `changed`.

    A shared tensor is replaced in all its modules (`torch.func.functional_call` would leave some
    modules changed).
    """
    live = _checked(model, state)
    new = {id(live[name]): value for name, value in state.items()}
    own: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in slots:
                for kind, value in held.items():
                    if id(value) in new:
                        own.append((held, kind, value))
                        held[kind] = new[id(value)]
        yield
    finally:
        for held, kind, value in own:
            held[kind] = value


@torch.no_grad()
def write(model: nn.Module, state: State) -> None:
    """Copies the tensors of `state` into the model. Raises like `changed`, before anything is
    copied.
    """
    live = _checked(model, state)
    for name, value in state.items():
        live[name].copy_(value)


@torch.no_grad()
def between(old: State, new: State, strength: float) -> dict[str, Tensor]:
    """Returns old + strength * (new - old) for each name in `new`. The result is exact for the
    strengths 0 and 1.

    Integer tensors, such as batch counts, are taken from `new` if the strength is at least 1/2, and
    otherwise from `old`. Variances of batch norm are clamped to 0 or more.
    """
    if strength in (0.0, 1.0):
        return {name: (new if strength else old)[name] for name in new}
    mixed = {}
    for name, value in new.items():
        if not value.is_floating_point():
            mixed[name] = value if strength >= 0.5 else old[name]
            continue
        dtype = torch.promote_types(value.dtype, torch.float32)
        start = old[name].to(dtype)
        mixed[name] = (start + strength * (value.to(dtype) - start)).to(value.dtype)
        if strength > 1 and name.rpartition(".")[2] == "running_var":
            mixed[name] = mixed[name].clamp_min(0)
    return mixed


@torch.no_grad()
def combined(base: State, states: Sequence[State], factors: Tensor) -> dict[str, Tensor]:
    """Returns base + sum_i factors[i] * (states[i] - base) for each floating-point tensor in any of
    the states.

    A state that lacks a tensor adds nothing to it. Variances of batch norm are clamped to 0 or
    more.
    """
    new: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        value = base[name]
        if not value.is_floating_point():
            continue
        start = value.to(widest(value.device))
        found = start.clone()
        for factor, state in zip(factors.tolist(), states, strict=True):
            if name in state:
                found += factor * (state[name].to(start) - start)
        if name.rpartition(".")[2] == "running_var":
            found.clamp_(min=0)
        new[name] = found.to(value.dtype)
    return new


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's parameters and persistent buffers, even if a custom `state_dict` omits or
    renames them.
    """
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        kept = {
            name: x
            for name, x in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for name, value in (*module._parameters.items(), *kept.items()):
            if value is not None:
                found[f"{prefix}.{name}" if prefix else name] = value
    return found


def current_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the `live_tensors`, detached but not copied."""
    return {name: value.detach() for name, value in live_tensors(model).items()}


@torch.no_grad()
def saved_names(model: nn.Module) -> dict[str, str]:
    """Maps each name in `model.state_dict()` to the name of the same tensor in `live_tensors`.

    A custom `state_dict` may rename tensors. Names of values that are not in `live_tensors`, such
    as moving averages, are left out.
    """
    live, state = live_tensors(model), model.state_dict()
    places = {_place(value): name for name, value in live.items()}
    names: dict[str, str] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel():
            found = (
                key
                if key in live and _place(live[key]) == _place(value)
                else places.get(_place(value))
            )
            names |= {} if found is None else {key: found}
        elif key in live:
            names[key] = key
    left = set(live) - set(names.values())
    other = {
        name: live[name].detach() + 1
        for name in left
        if name in state and live[name].is_floating_point()
    }
    if other:
        with temporary_weights(model, other):
            state = model.state_dict()
        copied = (
            n
            for n, x in other.items()
            if x.shape == state[n].shape and torch.allclose(state[n].to(x), x, 1e-2)
        )
        names |= {name: name for name in copied}
    return names


def check_saved(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses a model whose state dict omits one of the live tensors `names`, or has other values
    for one of them.
    """
    saved = set(saved_names(model).values())
    missing = [name for name in names if name not in saved]
    if missing:
        problem = f"its `state_dict` does not save {missing[0]!r} as it is, so loading it would undo the repair."
        hint = (
            "put the weights that it saves, such as a moving average, into the model before the repair, name a "
            "`layer` that is saved, or save all that is trained."
        )
        raise ConfigurationError(f"`model`: {problem}", hint)


def _place(value: Tensor) -> tuple[int, torch.Size, torch.device]:
    return value.data_ptr(), value.shape, value.device


def _checked(model: nn.Module, state: State) -> dict[str, Tensor]:
    live = live_tensors(model)
    for name, value in state.items():
        if name not in live or live[name].shape != value.shape:
            found = f"has the shape {list(live[name].shape)}" if name in live else "is missing"
            raise ConfigurationError(
                f"`model`: its tensor {name!r} {found}.", "give the model that was repaired."
            )
    return live


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and bytes of a state dict's tensors, in
    hexadecimal digits.

    The hash does not depend on devices, strides or the order of names.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not isinstance(tensors[name], Tensor):
            continue
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        parts: tuple[Tensor, ...] = (tensor,)
        if tensor.layout != torch.strided:
            entries = tensor.to_sparse_coo().coalesce()
            parts = (entries.indices(), entries.values())
        for part in parts:
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
