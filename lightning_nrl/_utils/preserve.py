"""Context managers that restore a model's weights, flags and attributes, and random states."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lightning_nrl._utils.sharded import own_part, reshard
from lightning_nrl._utils.state import memory_of, parked, plain_copy, plain_tensor

# By size in bytes, to compare bits.
SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PRESERVED: set[int] = set()  # `id` of each parameter that an outer `eval_mode` has copied
Value: TypeAlias = Any  # of a module's attribute
MAX_ITEMS_KEPT = 10_000  # longer lists and dicts are taken for data and not restored


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[Mapping[int, Tensor]]:
    """Does what `eval_mode` does, and restores random states, which `forward` may advance.

    Leaves inference mode, but switches no gradients on.
    """
    with random_state(), outside_inference_mode(), eval_mode(model) as rewritten:
        yield rewritten


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves inference mode, whose tensors autograd cannot use, for a block."""
    has_gradients = torch.is_grad_enabled()
    # Leaving inference mode would switch gradients on.
    with torch.inference_mode(False), torch.set_grad_enabled(has_gradients):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[Mapping[int, Tensor]]:
    """Sets evaluation mode for a block, then restores parameters, buffers and flags exactly.

    Yields a mapping from the `id` of each tensor that `eval()` has overwritten to the tensor's
    earlier value.

    Models may write to their own weights: by `Embedding(max_norm=)`, by clamps in `forward`, or by
    merging LoRA weights in `eval()`. So on exit, `eval_mode` calls `train()` of the modules,
    compares each tensor with a copy and restores flags such as `merged`. (A tensor's `_version`
    would miss `weight.data.clamp_()`.) Parameters keep their identity and memory, since optimizers
    refer to them. Nested calls of `eval_mode` copy each parameter only once.
    """
    reshard(model)
    modules = _modules_with_modes(model)
    modes = [module.training for module in modules]
    flags = module_flags(modules)
    parameters = [_TensorSnapshot(module._parameters) for module in modules]
    buffers = [_TensorSnapshot(module._buffers) for module in modules]
    snapshots = [*parameters, *buffers]
    copied = {id(tensor) for snapshot in parameters for tensor, _, _ in snapshot.copies}
    PRESERVED.update(copied)
    try:
        overwritten = {}
        if any(modes):
            model.eval()
            if has_own_modes(model):
                for snapshot in snapshots:
                    overwritten.update(snapshot.overwritten())
        yield overwritten
    finally:
        PRESERVED.difference_update(copied)
        try:
            set_modes(modules, modes)
        finally:
            reshard(model)
            for snapshot in snapshots:
                snapshot.restore()
            for module, values in zip(modules, flags, strict=True):
                vars(module).update(values)


@contextmanager
def loading_mode(model: nn.Module) -> Iterator[None]:
    """Sets training mode for a block if a module overrides `train()` or `eval()`.

    A checkpoint has the weights of training mode; `eval()` may merge LoRA weights into them. A
    trainer may restore the flag `training` without a call of `train()`, so that LoRA weights stay
    merged in training mode.
    """
    modules = _modules_with_modes(model)
    modes = [module.training for module in modules]
    if has_own_modes(model):
        model.train()
    try:
        yield
    finally:
        set_modes(modules, modes)


def _modules_with_modes(model: nn.Module) -> list[nn.Module]:
    # A frozen scripted module has no mode.
    return [module for module in model.modules() if hasattr(module, "training")]


def module_flags(modules: Sequence[nn.Module]) -> list[dict[str, bool]]:
    """Returns the bool attributes of each module, such as `training` and `merged`."""
    flags = []
    for module in modules:
        attributes = vars(module).items()
        flags.append({name: value for name, value in attributes if isinstance(value, bool)})
    return flags


def has_own_modes(model: nn.Module) -> bool:
    """True if a module overrides `train()` or `eval()`, for instance to merge LoRA weights."""
    for kind in {type(module) for module in model.modules()}:
        if kind.train is not nn.Module.train or kind.eval is not nn.Module.eval:
            return True
    return False


def set_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    """Sets the training flag of each module by the module's own `train()`, outer modules first."""
    for module, training in zip(modules, modes, strict=True):
        if module.training != training:
            module.train(training)
    # A module with two parents may have been changed again by the second parent.
    for module, training in zip(modules, modes, strict=True):
        module.training = training


@contextmanager
def random_state() -> Iterator[None]:
    """Restores the random states of torch, numpy and Python on exit, even after an exception."""
    restores = [CpuRandomState.current().restore]
    cuda = torch.cuda
    if cuda.is_initialized():
        restores.append(partial(cuda.set_rng_state_all, cuda.get_rng_state_all()))
    elif cuda.is_available():
        # Reading the state would initialise CUDA. If CUDA is initialised later, it takes torch's
        # last seed.
        restores.append(partial(cuda.manual_seed_all, torch.initial_seed()))
    if torch.backends.mps.is_available():
        restores.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for restore in restores:
            restore()


@dataclass(frozen=True, eq=False)
class CpuRandomState:
    torch: Tensor
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def current(cls) -> CpuRandomState:
        return cls(torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())

    def is_current(self) -> bool:
        numpy = np.random.get_state(legacy=False)
        return (
            torch.equal(self.torch, torch.get_rng_state())
            and self.python == random.getstate()
            and self.numpy["has_gauss"] == numpy["has_gauss"]
            and self.numpy["state"]["pos"] == numpy["state"]["pos"]
            and np.array_equal(self.numpy["state"]["key"], numpy["state"]["key"])
        )

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_all(seed: int) -> None:
    """Seeds torch on all devices, numpy and Python."""
    torch.manual_seed(seed)
    seed_cpu(seed)


def seed_cpu(seed: int) -> None:
    """Seeds torch on the CPU, numpy and Python; numpy gets the lower 32 bits of the seed."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def mixed_seed(seed: int, i: int) -> int:
    """Returns the `i`-th 64-bit seed that follows from a seed (splitmix64, Steele et al. 2014)."""
    z = (seed * 0xD1342543DE82EF95 + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a tensor with its rows in random order."""
    return x[torch.randperm(len(x), generator=generator)]


@contextmanager
def replaced(owner: object, **attributes: object) -> Iterator[None]:
    """Replaces attributes of an object for a block."""
    members = vars(owner)
    earlier = {name: members[name] for name in attributes if name in members}
    members.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            members.pop(name, None)
        members.update(earlier)


class _TensorSnapshot:
    """Copies of the parameters or the buffers of one module."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors
        # The mapping of a scripted module has no other iterator than `items()`.
        self._earlier: dict[str, Tensor | None] = dict(tensors.items())
        # `memory` refers to the tensor's storage, even if `tensor.data` is set later.
        self.copies = []
        for tensor in self._earlier.values():
            if tensor is not None and id(tensor) not in PRESERVED and _has_values(tensor):
                memory = own_part(tensor.data)
                self.copies.append((tensor, memory, parked(plain_tensor(memory))))

    def overwritten(self) -> dict[int, Tensor]:
        """Maps the `id` of each changed tensor to its earlier values."""
        overwritten = {}
        for tensor, memory, values in self.copies:
            if not (memory_of(tensor) == memory_of(memory) and _is_same(memory, values)):
                overwritten[id(tensor)] = values
        return overwritten

    @torch.no_grad()
    def restore(self) -> None:
        tensors = self._tensors
        current = dict(tensors.items())
        if [name for name in current if name in self._earlier] != list(self._earlier):
            # Optimizers rely on the order of parameters.
            for name in current:
                del tensors[name]
            tensors.update({**self._earlier, **current})
        for name, tensor in self._earlier.items():
            if tensors[name] is not tensor:
                tensors[name] = tensor
        for tensor, memory, values in self.copies:
            if memory_of(tensor) != memory_of(memory):
                tensor.data = memory
            if not _is_same(memory, values):
                own_part(tensor).copy_(values)


def _has_values(value: Tensor) -> bool:
    return not value.is_meta and not nn.parameter.is_lazy(value)


def _is_same(value: Tensor, copy: Tensor) -> bool:
    # Sparse tensors cannot be compared bit for bit, and count as changed.
    size = SAME_SIZE.get(value.element_size())
    if value.layout != torch.strided or size is None or value.is_quantized:
        return False
    return torch.equal(value.view(size), copy.to(value.device).view(size))


@contextmanager
def preserve_attributes(model: nn.Module) -> Iterator[None]:
    """Restores on exit all modules' attributes, and tensors, lists and dicts in them."""
    restores: list[Callable[[], None]] = []
    for module in model.modules():
        attributes = vars(module)
        restores.append(partial(_set_items, attributes, attributes.copy()))
        for name, value in attributes.items():
            if name not in ("_parameters", "_buffers"):
                restores += _restores(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for undo in restores:
                undo()


def _write(value: Tensor, copy: Tensor) -> None:
    if not torch.equal(value, copy):
        value.data.copy_(copy)


def _restores(value: Value, depth: int = 3) -> list[Callable[[], None]]:
    if isinstance(value, Tensor):
        return [partial(_write, plain_tensor(value), plain_copy(value))]
    is_container = type(value) in (list, dict, set, deque, OrderedDict)
    if not depth or not is_container or len(value) > MAX_ITEMS_KEPT:
        return []
    restores: list[Callable[[], None]] = [partial(_set_items, value, value.copy())]
    items = value.values() if isinstance(value, dict) else value
    for item in items:
        restores += _restores(item, depth - 1)
    return restores


def _set_items(value: Value, items: Value) -> None:
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(items)
    else:
        value.update(items)
