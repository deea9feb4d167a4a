"""Hooks on a module's own steps: record logits, add to the loss, follow a hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_nrl._trainer.lightning.packages import LightningModule
from lightning_nrl._trainer.lightning.private_parts import is_compiled, original_module
from lightning_nrl.data.batch import run_model
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks import Task

Call = tuple[tuple[Any, ...], Mapping[str, Any], Any]
"""Arguments, keyword arguments and output."""
ONE_LINE = (
    "add `loss = loss + regression_loss(self, batch, logits)` to `training_step` "
    "(`from lightning_nrl.callbacks import regression_loss`)."
)
"""Advice for steps to which the term cannot be added from outside."""


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """Inside, `hook(name, args, output)` is called after each call of a layer, and what it returns is the output."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(lambda module, args, output, name=name: hook(name, args, output))
            stack.callback(handle.remove)
        yield


@dataclass
class _RecordedCalls:
    """State of the hooks, kept small so that copies of the model stay small."""

    active: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)


def _record_call(recorded: _RecordedCalls, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if recorded.active:
        recorded.calls[name].append((args, kwargs, output))


class OutputCapture:
    """Records calls of a module and of parts of it, between `begin` and `end`.

    Hooks stay all the time, since code that `torch.compile` has made does not see hooks that come later.
    """

    def __init__(self) -> None:
        self._recorded = _RecordedCalls()
        self._handles: dict[str, RemovableHandle] = {}

    def attach(self, model: nn.Module, names: Iterable[str] = ("",)) -> None:
        """Records parts by their dotted names; an empty one is the module itself. Earlier names go first."""
        for name in names:
            if name not in self._handles:
                self._recorded.calls[name] = []
                hook = partial(_record_call, self._recorded, name)
                self._handles[name] = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    def detach(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._recorded = {}, _RecordedCalls()

    def begin(self) -> None:
        for calls in self._recorded.calls.values():
            calls.clear()
        self._recorded.active = True

    def end(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, redirected: bool) -> Any:
        """Returns what the module returned for these arguments in the batch, else in its first call, else None."""
        _, made = self.calls(redirected=redirected)
        same = (output for given, named, output in made if same_objects(given, args) and same_objects(named, kwargs))
        return next(same, made[0][2] if made else None)

    def calls(self, *, redirected: bool = False) -> tuple[str, list[Call]]:
        """Ends a batch; returns the first part that was called and its calls, but for that of a `redirected` step."""
        self._recorded.active = False
        found: tuple[str, list[Call]] = "", []
        for name, calls in self._recorded.calls.items():
            # The call around the step ends last, with what the step returned.
            made = calls[:-1] if redirected and not name else list(calls)
            calls.clear()
            found = found if found[1] else (name, made)
        return found


class Probe:
    """Calls a model, and finds out at the first call the outermost part that returns what the model does, if any."""

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
    """All parts by name, outer ones first; of those whose calls are compiled neither they nor their insides."""
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


class ForwardPass(NamedTuple):
    """The forward pass of a training step: what went in, and the logits that came out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    logits: Tensor


def find_forward_pass(
    name: str, calls: Sequence[Call], args: Sequence[Any], kwargs: Mapping[str, Any], n: int, task: Task
) -> ForwardPass:
    """The one call of a step that is about its batch; refuses none, and several that could be it.

    `args` and `kwargs` are what the model would be called with for this batch of `n` samples.
    """
    found = []
    for given, named, output in calls:
        logits = logits_of(output, n, task)
        if logits is not None:
            same = same_objects(given, args) and same_objects(named, kwargs)
            found.append((ForwardPass(tuple(given), named, logits), same))
    plain = [call for call, same in found if same]
    if len(plain) == 1:
        return plain[0]
    # What goes into a part need not be what goes into the model.
    if len(found) == 1 and not name:
        return found[0][0]
    if not found:
        what = f"`training_step` does not call `self(x)` on the {n} samples of a batch"
    elif len(found) == 1:
        what = f"`training_step` calls `self.{name}` with other inputs than those of the batch"
    else:
        what = f"`training_step` calls the model {len(found)} times"
    raise ConfigurationError(f"{what}, so it is not known which output the term is for.", ONE_LINE)


def add_to_loss(result: Any, term: Tensor) -> Any:
    """Adds a scalar to what a training step returned: a loss, a mapping with a `loss`, or None for no step."""
    if result is None:
        return None
    if isinstance(result, Tensor):
        return result + term.to(result.device)
    if isinstance(result, Mapping) and isinstance(result.get("loss"), Tensor):
        return {**result, "loss": result["loss"] + term.to(result["loss"].device)}
    raise ConfigurationError(
        f"`training_step` returned a {type(result).__name__} without a loss.",
        "return the loss, or a dict with the key 'loss'.",
    )


@contextmanager
def replaced(module: LightningModule, **methods: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module has other methods; afterwards its own again."""
    own = {name: vars(module)[name] for name in methods if name in vars(module)}
    vars(module).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(module).pop(name, None)
        vars(module).update(own)


def nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a method that is left out."""


class _FollowedHook:
    """In place of a hook for one call; Lightning calls the hooks of most callbacks before that of the module."""

    def __init__(self, module: LightningModule, name: str) -> None:
        self.module, self.name = module, name
        self.own = {key: value for key, value in vars(module).items() if key == name}
        self.followers: list[Callable[[], None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.release()
        result = getattr(self.module, self.name)(*args, **kwargs)
        for follower in self.followers:
            follower()
        return result

    def __getstate__(self) -> dict[str, Any]:
        # What follows the module's hook does not follow that of a copy.
        return {**vars(self), "followers": []}

    def release(self) -> None:
        vars(self.module).pop(self.name, None)
        vars(self.module).update(self.own)


def follow_hook(module: LightningModule, name: str, follower: Callable[[], None]) -> None:
    """Runs something after the next call of a module's hook, and after earlier followers."""
    found = vars(module).get(name)
    if not isinstance(found, _FollowedHook):
        found = _FollowedHook(module, name)
        setattr(module, name, found)
    found.followers.append(follower)


def release_hook(module: LightningModule, name: str) -> None:
    """Gives the module its own hook again, without followers."""
    found = vars(module).get(name)
    if isinstance(found, _FollowedHook):
        found.release()
