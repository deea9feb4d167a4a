"""Records outputs in a module's steps, adds to the loss of a step, and runs code after a hook."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_nrl._trainer.lightning.packages import LightningModule
from lightning_nrl._trainer.lightning.private_parts import is_compiled, original_module, overrides
from lightning_nrl.data.batch import Args, Kwargs, ModelOutput, RawBatch, run_model
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks import Task


class Call(NamedTuple):
    """Arguments and output of a call of a module."""

    args: Args
    kwargs: Kwargs
    output: object

    def takes(self, args: Args, kwargs: Kwargs) -> bool:
        """True if the arguments of the call are identical to these."""
        if len(self.args) != len(args) or self.kwargs.keys() != kwargs.keys():
            return False
        has_args = all(map(operator.is_, self.args, args))
        return has_args and all(value is kwargs[name] for name, value in self.kwargs.items())


Step = Callable[..., object]
"""A step of a LightningModule."""
ONE_LINE = (
    "add `loss = loss + regression_loss(self, batch, logits)` to `training_step` "
    "(`from lightning_nrl.callbacks import regression_loss`)."
)
"""Hint if a callback cannot add its loss term to the loss of a `training_step`."""


@contextmanager
def forward_hooks(
    layers: Mapping[str, nn.Module], hook: Callable[[str, Args, ModelOutput], object]
) -> Iterator[None]:
    """Runs `hook(name, args, output)` after each call of a layer.

    A result other than None replaces the output.
    """

    def run_hook(name: str, layer: nn.Module, args: Args, output: object) -> object:
        return hook(name, args, output)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(run_hook, name)).remove)
        yield


@dataclass
class _RecordedCalls:
    # An object of its own, since a copy of the model copies it together with the hooks.
    active: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)

    def add(self, name: str, module: nn.Module, *call: Any) -> None:
        if self.active:
            self.calls[name].append(Call(*call))

    def take(self) -> dict[str, list[Call]]:
        calls = self.calls
        self.calls = {name: [] for name in calls}
        return calls


class OutputCapture:
    """Recorder for the calls of a module and of some submodules between `begin` and `end`.

    The hooks stay registered all the time, since code compiled by `torch.compile` ignores hooks
    registered later.
    """

    def __init__(self) -> None:
        self._recorded = _RecordedCalls()
        self._handles: dict[str, RemovableHandle] = {}

    def attach(self, model: nn.Module, names: Iterable[str] = ("",)) -> None:
        """Registers hooks on submodules by dotted name; an empty name is the module itself.

        `calls` prefers earlier names.
        """
        for name in names:
            if name not in self._handles:
                self._recorded.calls[name] = []
                submodule = model.get_submodule(name)
                hook = partial(self._recorded.add, name)
                self._handles[name] = submodule.register_forward_hook(hook, with_kwargs=True)

    def detach(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
        self._recorded = _RecordedCalls()

    def begin(self) -> None:
        self._recorded.take()
        self._recorded.active = True

    def end(self, args: Args, kwargs: Kwargs, *, redirected: bool) -> object:
        """Ends recording. Returns the output of the call with these arguments, or of the first.

        Returns None if there was no call. `redirected` has the same meaning as in `calls`.
        """
        _, calls = self.calls(redirected=redirected)
        for call in calls:
            if call.takes(args, kwargs):
                return call.output
        return calls[0].output if calls else None

    def calls(self, *, redirected: bool = False) -> tuple[str, list[Call]]:
        """Ends recording. Returns the first submodule that was called, and its calls.

        First is meant in the order of `attach`. If nothing was called, the list of calls is empty.
        If a strategy such as DDP runs the step itself as a call of the module (`redirected`), that
        call is left out.
        """
        self._recorded.active = False
        for name, calls in self._recorded.take().items():
            if redirected and not name:
                calls = calls[:-1]  # the call of the step itself ends last
            if calls:
                return name, calls
        return "", []


class Probe:
    """Calls a model. The first call sets `parts`: the submodule that returned the output.

    `parts` is a tuple with its name. If several submodules returned the output, it has only the
    outermost. If no submodule did, it is empty.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts: tuple[str, ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        if self.parts is not None:
            return run_model(self.model, args, kwargs)
        outputs: dict[str, object] = {}
        parts = dict(_parts(self.model))
        with forward_hooks(parts, lambda name, _, output: outputs.update({name: output})):
            output = run_model(self.model, args, kwargs)
        self.parts = tuple(name for name in parts if outputs.get(name) is output)[:1]
        return output


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # Hooks do not run inside of compiled modules.
    if is_compiled(model):
        return
    for name, part in model.named_children():
        if not is_compiled(part) and not isinstance(part, torch.jit.ScriptModule):
            yield prefix + name, part
            if original_module(part) is part:
                yield from _parts(part, f"{prefix}{name}.")


def logits_of(output: object, n: int, task: Task) -> Tensor | None:
    """Returns the logits in a model's output, or None without logits for exactly `n` samples."""
    with suppress(ConfigurationError):
        logits = task.logits(output)
        if logits.ndim and len(logits) == n:
            return logits
    return None


class ForwardPass(NamedTuple):
    args: Args
    kwargs: Kwargs
    logits: Tensor


def find_forward_pass(
    name: str,
    calls: Sequence[Call],
    args: Args,
    kwargs: Kwargs,
    n: int,
    task: Task,
) -> ForwardPass:
    """Finds the only call that takes the whole batch of a step, `n` samples.

    The batch has the inputs `args` and `kwargs`. `calls` are the calls of the submodule `name`, or
    of the module itself if `name` is empty. If the module itself was called only once, the call may
    have other inputs. Raises `ConfigurationError` if no call or several calls fit.
    """
    passes, exact = [], []
    for call in calls:
        logits = logits_of(call.output, n, task)
        if logits is not None:
            passes.append(ForwardPass(call.args, call.kwargs, logits))
            if call.takes(args, kwargs):
                exact.append(passes[-1])
    if len(exact) == 1:
        return exact[0]
    # Other inputs are accepted for the module itself only, since a submodule may get something else
    # than the batch.
    if len(passes) == 1 and not name:
        return passes[0]
    if not passes:
        problem = f"does not call `self(x)` on the {n} samples of a batch"
    elif len(passes) == 1:
        problem = f"calls `self.{name}` with other inputs than those of the batch"
    else:
        problem = f"calls the model {len(passes)} times"
    raise ConfigurationError(
        f"`training_step` {problem}, so the logits for the loss term are ambiguous.", ONE_LINE
    )


def call_step(step: Step, batch: RawBatch) -> object:
    """Calls a step with a batch and, if it takes them, the batch's and the data loader's number."""
    n_parameters = len(inspect.signature(step).parameters)
    return step(*(batch, 0, 0)[:n_parameters])


def loss_in(result: object) -> Tensor | None:
    """Returns the loss in the result of a training step, if it has one."""
    if isinstance(result, Mapping):
        result = result.get("loss")
    return result if isinstance(result, Tensor) else None


def add_to_loss(result: object, term: Tensor) -> object:
    """Adds a scalar to the loss that a training step returned. None, a skipped step, stays None."""
    if result is None:
        return None
    loss = loss_in(result)
    if loss is None:
        raise ConfigurationError(
            f"`training_step` returned a {type(result).__name__} without a loss.",
            "return the loss, or a dict with the key 'loss'.",
        )
    total = loss + term.to(loss.device)
    if isinstance(result, Mapping):
        return {**result, "loss": total}
    return total


def no_op(*args: Any, **kwargs: Any) -> None:
    """Does nothing, in place of a method that must not run."""


class _FollowedHook:
    # Lightning calls the hooks of most callbacks before that of the module.
    def __init__(self, module: LightningModule, name: str) -> None:
        self.module, self.name = module, name
        self.before = {key: value for key, value in vars(module).items() if key == name}
        self.followers: list[Callable[[], object]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.release()
        result = getattr(self.module, self.name)(*args, **kwargs)
        for follower in self.followers:
            follower()
        return result

    def __getstate__(self) -> dict[str, object]:
        # A copy of the module has no followers.
        return {**vars(self), "followers": []}

    def release(self) -> None:
        vars(self.module).pop(self.name, None)
        vars(self.module).update(self.before)


def follow_hook(module: LightningModule, name: str, follower: Callable[[], object]) -> None:
    """Calls `follower` once, after the next run of the module's hook and earlier followers."""
    hook = vars(module).get(name)
    if not isinstance(hook, _FollowedHook):
        hook = _FollowedHook(module, name)
        setattr(module, name, hook)
    hook.followers.append(follower)


def follow_own_hook(module: LightningModule, name: str, follower: Callable[[], object]) -> None:
    """Calls `follower` after the module's own hook, which may change weights, or at once."""
    if overrides(module, name):
        follow_hook(module, name, follower)
    else:
        follower()


def release_hook(module: LightningModule, name: str) -> None:
    """Restores the module's own hook `name`, and drops the followers given to `follow_hook`."""
    hook = vars(module).get(name)
    if isinstance(hook, _FollowedHook):
        hook.release()
