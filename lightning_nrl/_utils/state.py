"""Weights of a model as tensors by name: copies, interpolation, hashes, writing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import none_if_out_of_memory, widest
from lightning_nrl._utils.sharded import is_split, own_part, reshard
from lightning_nrl.errors import ConfigurationError

LEAST_PARKED = 2**20  # bytes

State = Mapping[str, Tensor]  # parameters and buffers by their names in the module tree


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Returns detached copies of all parameters and persistent buffers, on their devices."""
    return {name: value.clone() for name, value in current_state(model).items()}


def parked(x: Tensor) -> Tensor:
    """Copies a tensor that is rarely read. Large ones go to the CPU, and from there to a file.

    The file is mapped into memory, and is deleted with the copy.
    """
    if x.nbytes < LEAST_PARKED or x.layout != torch.strided:
        copy = none_if_out_of_memory(x.clone)
        return x.cpu() if copy is None else copy
    if x.device.type != "cpu":
        return x.cpu()
    with suppress(OSError, RuntimeError), NamedTemporaryFile() as file:
        file.write(x.detach().flatten().view(torch.uint8).numpy().data)
        file.flush()
        return torch.from_file(file.name, size=x.numel(), dtype=x.dtype).view(x.shape)
    return x.clone()


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter or buffer, or the CPU if the model has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@torch.no_grad()
def changed(model: nn.Module, state: State) -> dict[str, Tensor]:
    """Returns the tensors of `state` that differ from the model's.

    A shared tensor is returned under each of its names. `state` may be on another device, since
    Lightning moves the model to the CPU after a fit on a GPU.

    Raises:
        ConfigurationError: a name is not in the model, or its tensor has another shape there.
    """
    live = _checked(model, state)
    new = {}
    for name, value in state.items():
        old = live[name]
        if not torch.equal(old, value.to(old.device)):
            new[id(old)] = value
    return {name: new[id(old)] for name, old in live.items() if id(old) in new}


def shared_tensors(model: nn.Module, state: State) -> dict[str, Tensor]:
    """Returns the tensors of `state` that the model has in the same shape.

    It may lack buffers that a training registers or lets grow.
    """
    shapes = {name: value.shape for name, value in live_tensors(model).items()}
    return {name: value for name, value in state.items() if shapes.get(name) == value.shape}


@contextmanager
def temporary_weights(model: nn.Module, state: State) -> Iterator[None]:
    """Replaces tensors of the model for a block, then puts the original tensor objects back.

    A split tensor only gets other values, since `fully_shard` reads layers from its memory.
    A shared tensor is replaced in all its modules (`torch.func.functional_call` would leave some
    modules changed). Raises like `changed`.
    """
    live = _checked(model, state)
    split = {name: value for name, value in state.items() if is_split(live[name])}
    earlier = {name: live[name].detach().clone() for name in split}
    new = {id(live[name]): value for name, value in state.items() if name not in split}
    replaced = []
    try:
        if split:
            write(model, split)
        for module in model.modules():
            slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in slots:
                for name, value in tensors.items():
                    if id(value) in new:
                        replaced.append((tensors, name, value))
                        tensors[name] = new[id(value)]
        yield
    finally:
        for tensors, name, value in replaced:
            tensors[name] = value
        if split:
            write(model, earlier)


@torch.no_grad()
def write(model: nn.Module, state: State) -> None:
    """Copies the tensors of `state` into the model; raises like `changed`, before any copy."""
    live = _checked(model, state)
    for name, value in state.items():
        own_part(live[name]).copy_(own_part(value))


@torch.no_grad()
def between(old: State, new: State, strength: float) -> dict[str, Tensor]:
    """Returns old + strength * (new - old) for each name in `new`, exact for strengths 0 and 1.

    Integer tensors, such as batch counts, are taken from `new` if the strength is at least 1/2, and
    otherwise from `old`. Variances of batch norm are clamped to 0 or more.
    """
    if strength == 0.0:
        return {name: old[name] for name in new}
    if strength == 1.0:
        return dict(new)
    mixed = {}
    for name, value in new.items():
        if not value.is_floating_point():
            mixed[name] = value if strength >= 0.5 else old[name]
            continue
        dtype = torch.promote_types(value.dtype, torch.float32)
        start = old[name].to(dtype)
        mixed[name] = (start + strength * (value.to(dtype) - start)).to(value.dtype)
        if strength > 1 and _is_variance(name):
            mixed[name] = mixed[name].clamp_min(0)
    return mixed


@torch.no_grad()
def combined(base: State, states: Sequence[State], factors: Tensor) -> dict[str, Tensor]:
    """Returns base + sum_i factors[i] * (states[i] - base) for the floating-point tensors.

    A state that lacks a tensor adds nothing to it. Variances of batch norm are clamped to 0 or
    more.
    """
    mixed = {}
    for name in dict.fromkeys(name for state in states for name in state):
        value = base[name]
        if not value.is_floating_point():
            continue
        start = value.to(widest(value.device))
        total = start.clone()
        for factor, state in zip(factors.tolist(), states, strict=True):
            if name in state:
                total += factor * (state[name].to(start) - start)
        if _is_variance(name):
            total.clamp_(min=0)
        mixed[name] = total.to(value.dtype)
    return mixed


def _is_variance(name: str) -> bool:
    return name.rpartition(".")[2] == "running_var"


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's parameters and persistent buffers by their names in the module tree.

    A custom `state_dict` may omit or rename some of them.
    """
    reshard(model)
    tensors = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = value
    return tensors


def current_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the `live_tensors`, detached but not copied."""
    return {name: plain_tensor(value.detach()) for name, value in live_tensors(model).items()}


def plain_tensor(x: Tensor) -> Tensor:
    """Returns a tensor subclass that only adds metadata as a tensor of the same memory."""
    # A subclass with a dispatch of its own, such as a nested tensor, is more than its metadata.
    has_own_dispatch = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if type(x) is Tensor or has_own_dispatch:
        return x
    return x.as_subclass(Tensor)


def plain_copy(x: Tensor) -> Tensor:
    return plain_tensor(x).detach().clone()


def completed(model: nn.Module, state: State) -> dict[str, Tensor]:
    """Returns the `live_tensors`, detached, with those of `state` under all their names."""
    live = live_tensors(model)
    new = {id(live[name]): value for name, value in state.items()}
    return {name: new.get(id(tensor), tensor).detach() for name, tensor in live.items()}


@torch.no_grad()
def saved_names(model: nn.Module) -> dict[str, str]:
    """Maps each name in `model.state_dict()` to the name of the same tensor in `live_tensors`.

    A custom `state_dict` may rename tensors. Names of values that are not in `live_tensors`, such
    as moving averages, are left out.
    """
    live = live_tensors(model)
    state = model.state_dict()
    name_at = {memory_of(value): name for name, value in live.items()}
    names = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.numel():
            if key in live:
                names[key] = key
        elif key in live and memory_of(live[key]) == memory_of(value):
            names[key] = key
        elif memory_of(value) in name_at:
            names[key] = name_at[memory_of(value)]
    names.update((name, name) for name in _copied_names(model, live.keys() - names.values()))
    return names


def _copied_names(model: nn.Module, names: Set[str]) -> list[str]:
    """Returns the live tensors among `names` that `state_dict` copies, as changed values show."""
    live = live_tensors(model)
    shifted = {}
    for name in names & model.state_dict().keys():
        if live[name].is_floating_point():
            shifted[name] = live[name].detach() + 1
    with temporary_weights(model, shifted):
        state = model.state_dict()
    copied = []
    for name, value in shifted.items():
        # Copies may be in half precision.
        if state[name].shape == value.shape and torch.allclose(state[name].to(value), value, 1e-2):
            copied.append(name)
    return copied


def check_saved(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses a model whose state dict omits or changes one of the live tensors `names`."""
    saved = set(saved_names(model).values())
    for name in names:
        if name not in saved:
            raise ConfigurationError(
                f"`model`: its `state_dict` does not save {name!r} as it is, "
                "so loading it would undo the repair.",
                "put the weights that it saves, such as a moving average, into the model before "
                "the repair, name a `layer` that is saved, or save all that is trained.",
            )


def memory_of(value: Tensor) -> tuple[object, ...]:
    """Returns what two tensors share if, and only if, they are the same part of the memory."""
    value = own_part(value)
    if value.layout != torch.strided:
        return value.device, value.dtype, value.layout
    return value.device, value.dtype, value.shape, value.stride(), value.data_ptr()


def _checked(model: nn.Module, state: State) -> dict[str, Tensor]:
    live = live_tensors(model)
    for name, value in state.items():
        if name not in live or live[name].shape != value.shape:
            fault = f"has the shape {list(live[name].shape)}" if name in live else "is missing"
            raise ConfigurationError(
                f"`model`: its tensor {name!r} {fault}.", "give the model that was repaired."
            )
    return live


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """Returns the SHA-256 of the dtype, shape and bytes of one tensor, see `hash_tensors`."""
    return hash_tensors({"": tensor})


def hash_tensors(state: Mapping[str, object]) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes of tensors, as hexadecimal digits.

    The hash does not depend on devices, strides or the order of names. All ranks must call it if
    tensors are split.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):
            continue
        if is_split(value):
            value = value.full_tensor()
        tensor = value.detach().cpu()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        parts: tuple[Tensor, ...] = (tensor,)
        if tensor.layout != torch.strided:
            entries = tensor.to_sparse_coo().coalesce()
            parts = (entries.indices(), entries.values())
        for part in parts:
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
