"""Restoring of weights, flags, attributes and random states of a live model."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes, for bitwise comparisons
PRESERVED: set[int] = set()  # identities of parameters with a copy
MAX_ITEMS_KEPT = 10_000  # longer lists and dicts are data


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[Mapping[int, Tensor]]:
    """Sets evaluation mode like `eval_mode`, and restores random states too, since some models draw in it."""
    # Localisation needs gradients.
    with random_state(), torch.inference_mode(False), eval_mode(model) as rewritten:
        yield rewritten


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[Mapping[int, Tensor]]:
    """Sets evaluation mode; restores parameters, buffers and flags, bit by bit, on exit.

    Yields the earlier values of tensors that `eval()` wrote to, by identity.

    Models may write to their own weights: `Embedding(max_norm=)`, clamps in `forward`, adapters that `eval()` merges.
    So this calls the modules' own `train()`, compares every tensor with a copy (`_version` misses
    `weight.data.clamp_()`), and restores flags such as `merged`. Parameters keep identity and memory, which optimizers
    hold. Nested uses share one copy.
    """
    modules = [module for module in model.modules() if hasattr(module, "training")]  # a frozen scripted module has none
    flags = [module.training for module in modules]
    parameters = [_TensorSnapshot(module._parameters, _is_copied_once) for module in modules]
    snapshots = [*parameters, *(_TensorSnapshot(module._buffers, _has_values) for module in modules)]
    held = {id(value) for snapshot in parameters for value, *_ in snapshot.copied}
    own = module_flags(modules)
    PRESERVED.update(held)
    try:
        copied = []
        if any(flags):
            model.eval()
            copied = [one for snapshot in snapshots for one in snapshot.copied] if has_own_modes(model) else []
        yield {id(value): copy for value, at, copy in copied if not (_is_at(value, at) and _is_same(at, copy))}
    finally:
        PRESERVED.difference_update(held)
        try:
            set_modes(modules, flags)
        finally:
            for snapshot in snapshots:
                snapshot.restore()
            for module, values in zip(modules, own, strict=True):
                vars(module).update(values)


@contextmanager
def loading_mode(model: nn.Module) -> Iterator[None]:
    """Sets training mode, in which checkpoints are loaded, where modes do more than torch's; on exit the modes before.

    A trainer may leave an adapter merged in training, since it restores `training` without a call of `train()`.
    """
    modules = [module for module in model.modules() if hasattr(module, "training")]
    flags = [module.training for module in modules]
    if has_own_modes(model):
        model.train()
    try:
        yield
    finally:
        set_modes(modules, flags)


def module_flags(modules: Sequence[nn.Module]) -> list[dict[str, bool]]:
    """Returns the bools of each module, such as `training` and `merged`."""
    return [{name: value for name, value in vars(module).items() if isinstance(value, bool)} for module in modules]


def has_own_modes(model: nn.Module) -> bool:
    """True if a module overrides `train()` or `eval()`, for instance to merge an adapter."""
    return any(type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval for m in model.modules())


def set_modes(modules: Sequence[nn.Module], flags: Sequence[bool]) -> None:
    """Sets the modes of modules, outer ones first, each by its own `train()`."""
    for module, training in zip(modules, flags, strict=True):
        if module.training != training:
            module.train(training)
    # The second parent of a module may have changed it.
    for module, training in zip(modules, flags, strict=True):
        module.training = training


@contextmanager
def random_state() -> Iterator[None]:
    """Restores the random states of torch, numpy and Python on exit; unlike `isolate_rng`, also after an error."""
    cpu = CpuRandomState.current()
    states: list[tuple[Callable[[Any], None], Any]] = []
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        states.append((cuda.set_rng_state_all, cuda.get_rng_state_all()))
    elif cuda.is_available():
        # Reading its state would start CUDA, which takes the last seed of torch when it starts.
        states.append((cuda.manual_seed_all, torch.initial_seed()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        cpu.restore()
        for restore, state in states:
            restore(state)


@dataclass(frozen=True, eq=False)
class CpuRandomState:
    """The states of the global generators of torch on the CPU, numpy and Python."""

    torch: Tensor
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def current(cls) -> CpuRandomState:
        return cls(torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())

    def is_current(self) -> bool:
        """True if the generators are still in these states."""
        now = np.random.get_state(legacy=False)
        return (
            torch.equal(self.torch, torch.get_rng_state())
            and self.python == random.getstate()
            and self.numpy["has_gauss"] == now["has_gauss"]
            and all(np.array_equal(self.numpy["state"][name], now["state"][name]) for name in ("pos", "key"))
        )

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_all(seed: int) -> None:
    """Seeds torch on all devices, numpy and Python."""
    seed_cpu(seed)
    # Without a device, torch would keep the seed for later with a stack trace, which takes milliseconds.
    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seeds torch on the CPU, numpy and Python by 64 bits."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def mixed_seed(seed: int, i: int) -> int:
    """Returns a 64-bit seed for the i-th generator (splitmix64, Steele et al. 2014)."""
    z = (seed * 0xD1342543DE82EF95 + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


class _TensorSnapshot:
    def __init__(self, tensors: dict[str, Any], is_copied: Callable[[Tensor], bool]) -> None:
        self._tensors = tensors
        self._values: dict[str, Tensor | None] = dict(tensors.items())
        self.copied = [
            (value, value.data, _copy(value.data))
            for value in self._values.values()
            if value is not None and is_copied(value)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        tensors, values = self._tensors, self._values
        now = [name for name, _ in tensors.items()]  # scripted modules have no other iterator
        if [name for name in now if name in values] != list(values):
            # Optimizers rely on the order of parameters.
            later = {name: value for name, value in tensors.items() if name not in values}
            for name in now:
                del tensors[name]
            tensors.update({**values, **later})
        for name, value in values.items():
            if tensors[name] is not value:
                tensors[name] = value
        for value, memory, copy in self.copied:
            if not _is_at(value, memory):
                value.data = memory
            if not _is_same(memory, copy):
                value.copy_(copy)


def _has_values(value: Tensor) -> bool:
    return not value.is_meta and not nn.parameter.is_lazy(value)


def _is_copied_once(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) and id(value) not in PRESERVED and _has_values(value)


def _copy(value: Tensor) -> Tensor:
    try:
        return value.clone()
    except torch.OutOfMemoryError:
        return value.cpu()


def _is_at(value: Tensor, memory: Tensor) -> bool:
    if (value.device, value.dtype, value.layout) != (memory.device, memory.dtype, memory.layout):
        return False
    if value.layout != torch.strided:
        return True
    return (value.shape, value.stride(), value.data_ptr()) == (memory.shape, memory.stride(), memory.data_ptr())


def _is_same(value: Tensor, copy: Tensor) -> bool:
    # Sparse tensors are not compared but always copied.
    size = SAME_SIZE.get(value.element_size())
    if value.layout != torch.strided or size is None or value.is_quantized:
        return False
    return torch.equal(value.view(size), copy.to(value.device).view(size))


@contextmanager
def preserve_attributes(model: nn.Module) -> Iterator[None]:
    """Restores attributes of modules and the tensors, lists and dicts inside, such as states of metrics."""
    restores: list[Callable[[], None]] = []
    for module in model.modules():
        attributes = vars(module)
        restores.append(_restore(attributes))
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


def _restores(value: Any, depth: int = 3) -> list[Callable[[], None]]:
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return [partial(_write, value, copy)]
    if type(value) not in (list, dict, set, deque, OrderedDict) or len(value) > MAX_ITEMS_KEPT or not depth:
        return []
    inside = value.values() if isinstance(value, dict) else value
    return [_restore(value), *(undo for item in inside for undo in _restores(item, depth - 1))]


def _restore(value: Any) -> Callable[[], None]:
    items = value.copy()

    def restore() -> None:
        value.clear()
        value.extend(items) if isinstance(value, (list, deque)) else value.update(items)

    return restore
