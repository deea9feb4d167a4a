"""What a model gives while it validates, taken down as it is made: no second forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_nrl._lightning.private_parts import is_compiled, original_module
from lightning_nrl.data.batch import run_model
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks import Task

Call = tuple[tuple[Any, ...], Mapping[str, Any], Any]
"""Arguments, keyword arguments and what came of them."""


@dataclass
class _RecordedCalls:
    """All that hooks hold, so that a copy of the model copies little more than itself."""

    active: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)


def _record_call(recorded: _RecordedCalls, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if recorded.active:
        recorded.calls[name].append((args, kwargs, output))


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """Inside, `hook(name, args, output)` is called after each call of a layer, and what it returns is the output."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(_call, hook, name)).remove)
        yield


def _call(hook: Callable[[str, Any, Any], Any], name: str, module: nn.Module, args: Any, output: Any) -> Any:
    return hook(name, args, output)


class OutputCapture:
    """Listens to a module and to parts of it, between `begin` and `end`.

    The module is listened to all the time, since code that `torch.compile` has made does not see hooks that come later.
    """

    def __init__(self) -> None:
        self._recorded = _RecordedCalls()
        self._handles: dict[str, RemovableHandle] = {}

    def attach(self, model: nn.Module, names: Iterable[str] = ("",)) -> None:
        """Listens to parts by their dotted names; an empty one is the module itself. Earlier names go first."""
        for name in names:
            if name not in self._handles:
                self._recorded.calls[name] = []
                hook = partial(_record_call, self._recorded, name)
                self._handles[name] = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    def detach(self) -> None:
        """Listens no more."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._recorded = {}, _RecordedCalls()

    def begin(self) -> None:
        """A batch begins."""
        for calls in self._recorded.calls.values():
            calls.clear()
        self._recorded.active = True

    def end(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, redirected: bool) -> Any:
        """A batch ends: what the module returned for these arguments, else what its first call returned.

        None where neither it nor a part was called. `redirected` is as for `calls`.
        """
        _, made = self.calls(redirected=redirected)
        same = (output for given, named, output in made if same_objects(given, args) and same_objects(named, kwargs))
        return next(same, made[0][2] if made else None)

    def calls(self, *, redirected: bool = False) -> tuple[str, list[Call]]:
        """A batch ends: the calls of the first that was called at all, and its name.

        `redirected`: the whole step ran inside a call of the module that has ended too, as under `ddp`.
        """
        self._recorded.active = False
        found: tuple[str, list[Call]] = "", []
        for name, calls in self._recorded.calls.items():
            # The call around the step ends last, with what the step returned.
            made = calls[:-1] if redirected and not name else list(calls)
            calls.clear()
            found = found if found[1] else (name, made)
        return found


class Probe:
    """Calls a model, and finds out at the first call which part of it gives what it returns.

    `parts` has the outermost such part by its dotted name; none where the model goes on after its parts, or was
    compiled as a whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts: tuple[str, ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.parts is not None:
            return run_model(self.model, args, kwargs)
        last: dict[str, Any] = {}
        with hooked(dict(_parts(self.model)), lambda name, args, output: last.update({name: output})):
            output = run_model(self.model, args, kwargs)
        self.parts = tuple(name for name, _ in _parts(self.model) if last.get(name) is output)[:1]
        return output


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All parts by name, outer ones first, without those whose calls were compiled, and what is inside of these."""
    if is_compiled(model):
        return
    for name, part in model.named_children():
        if not is_compiled(part) and not isinstance(part, torch.jit.ScriptModule):
            yield prefix + name, part
            if original_module(part) is part:
                yield from _parts(part, f"{prefix}{name}.")


def same_objects(a: Any, b: Any) -> bool:
    """True if two sequences or mappings hold the very same objects."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def logits_of(output: Any, n: int, task: Task) -> Tensor | None:
    """Returns the logits of `n` samples in an output; None where it holds none."""
    with suppress(ConfigurationError):
        logits = task.logits(output)
        if logits.ndim and len(logits) == n:
            return logits
    return None
