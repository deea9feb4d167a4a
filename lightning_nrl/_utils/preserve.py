"""Context managers that restore a model's weights, flags and attributes, and random states."""

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

SAME_SIZE = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # by size in bytes, to compare bits
PRESERVED: set[int] = set()  # `id` of each parameter that an outer `eval_mode` has copied
MAX_ITEMS_KEPT = 10_000  # longer lists and dicts are taken for data and not restored


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[Mapping[int, Tensor]]:
    """Does what `eval_mode` does, and restores random states, since models may draw random numbers
    in evaluation.
    """
    # Localisation needs gradients, which inference mode excludes.
    with random_state(), torch.inference_mode(False), eval_mode(model) as rewritten:
        yield rewritten


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
    modules = [
        module for module in model.modules() if hasattr(module, "training")
    ]  # a frozen scripted module has none
    flags = [module.training for module in modules]
    parameters = [_TensorSnapshot(module._parameters, _is_copied_once) for module in modules]
    snapshots = [
        *parameters,
        *(_TensorSnapshot(module._buffers, _has_values) for module in modules),
    ]
    held = {id(value) for snapshot in parameters for value, *_ in snapshot.copied}
    own = module_flags(modules)
    PRESERVED.update(held)
    try:
        copied = []
        if any(flags):
            model.eval()
            copied = (
                [one for snapshot in snapshots for one in snapshot.copied]
                if has_own_modes(model)
                else []
            )
        yield {
            id(value): copy
            for value, at, copy in copied
            if not (_is_at(value, at) and _is_same(at, copy))
        }
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
    """Sets training mode for a block if a module overrides `train()` or `eval()`, then restores the
    modes.

    A checkpoint has the weights of training mode; `eval()` may merge LoRA weights into them. A
    trainer may restore the flag `training` without a call of `train()`, so that LoRA weights stay
    merged in training mode.
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
    """Returns the bool attributes of each module, such as `training` and `merged`."""
    return [
        {name: value for name, value in vars(module).items() if isinstance(value, bool)}
        for module in modules
    ]


def has_own_modes(model: nn.Module) -> bool:
    """True if a module overrides `train()` or `eval()`, for instance to merge LoRA weights."""
    return any(
        type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval
        for m in model.modules()
    )


def set_modes(modules: Sequence[nn.Module], flags: Sequence[bool]) -> None:
    """Sets the training flag of each module by the module's own `train()`, outer modules first."""
    for module, training in zip(modules, flags, strict=True):
        if module.training != training:
            module.train(training)
    # A module with two parents may have been changed again by the second parent.
    for module, training in zip(modules, flags, strict=True):
        module.training = training


@contextmanager
def random_state() -> Iterator[None]:
    """Restores the random states of torch, numpy and Python on exit, even after an exception."""
    cpu = CpuRandomState.current()
    states: list[tuple[Callable[[Any], None], Any]] = []
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        states.append((cuda.set_rng_state_all, cuda.get_rng_state_all()))
    elif cuda.is_available():
        # Reading the state would initialise CUDA. If CUDA is initialised later, it takes torch's
        # last seed.
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
    torch: Tensor
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def current(cls) -> CpuRandomState:
        return cls(torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())

    def is_current(self) -> bool:
        now = np.random.get_state(legacy=False)
        return (
            torch.equal(self.torch, torch.get_rng_state())
            and self.python == random.getstate()
            and self.numpy["has_gauss"] == now["has_gauss"]
            and all(
                np.array_equal(self.numpy["state"][name], now["state"][name])
                for name in ("pos", "key")
            )
        )

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_all(seed: int) -> None:
    """Seeds torch on all devices, numpy and Python."""
    seed_cpu(seed)
    # Without such a device, torch would store the seed for later with a stack trace, which takes
    # milliseconds.
    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seeds torch on the CPU, numpy and Python; numpy gets the lower 32 bits of the seed."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def mixed_seed(seed: int, i: int) -> int:
    """Returns the `i`-th of the 64-bit seeds that follow from one seed (splitmix64, Steele et al.
    2014).
    """
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
        now = [
            name for name, _ in tensors.items()
        ]  # the mapping of a scripted module has no other iterator
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
    return (value.shape, value.stride(), value.data_ptr()) == (
        memory.shape,
        memory.stride(),
        memory.data_ptr(),
    )


def _is_same(value: Tensor, copy: Tensor) -> bool:
    # Sparse tensors cannot be compared bit for bit, and count as changed.
    size = SAME_SIZE.get(value.element_size())
    if value.layout != torch.strided or size is None or value.is_quantized:
        return False
    return torch.equal(value.view(size), copy.to(value.device).view(size))


@contextmanager
def preserve_attributes(model: nn.Module) -> Iterator[None]:
    """Restores on exit all modules' attributes, and the tensors, lists and dicts in them, such as
    metric states.
    """
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
    if (
        type(value) not in (list, dict, set, deque, OrderedDict)
        or len(value) > MAX_ITEMS_KEPT
        or not depth
    ):
        return []
    inside = value.values() if isinstance(value, dict) else value
    return [_restore(value), *(undo for item in inside for undo in _restores(item, depth - 1))]


def _restore(value: Any) -> Callable[[], None]:
    items = value.copy()

    def restore() -> None:
        value.clear()
        value.extend(items) if isinstance(value, (list, deque)) else value.update(items)

    return restore
