"""The model under repair: its passes are traced, resumed, or run with other weights.

When the first repaired layer is called, some modules have finished, and their outputs do not depend
on the repaired weights. Of these modules, those that are not part of another finished module are
the *frontier*, in the order of their calls. In a resumed pass the frontier returns stored outputs;
only code between its modules and after the layer runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_nrl._utils.state import plain_copy, temporary_weights
from lightning_nrl.data.batch import Batch, run_model
from lightning_nrl.errors import ReplayError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import LayerRef, ParameterSpace, force_eager
from lightning_nrl.evaluation.recurrent import patched_forward, unroll

# Positional and keyword arguments of a model.
Inputs = tuple[tuple[object, ...], Mapping[str, object]]

# Maps a site, its input and its output to a new output.
LayerEdit = Callable[[LayerRef, Tensor, Tensor], Tensor]


@runtime_checkable
class _Clonable(Protocol):
    def clone(self) -> object: ...


@dataclass
class ForwardTrace:
    """Record of a forward pass up to its first call of a repaired layer.

    All calls of repaired layers are in `layer_order` and `layer_shapes`.
    """

    calls: list[str] = field(default_factory=list)  # names of the frontier's modules, one per call
    outputs: list[object] = field(default_factory=list)  # outputs of these calls
    layer_order: list[str] = field(default_factory=list)  # names of the layers, one per call
    layer_shapes: list[torch.Size] = field(default_factory=list)  # output shapes of these calls
    input: Tensor | None = None  # input of the first repaired layer
    output: Tensor | None = None  # output of the first repaired layer, before the user's hooks


@dataclass(frozen=True)
class EditableModel:
    """The model under repair, in evaluation mode and in the precision of the evaluator."""

    evaluator: Evaluator  # the model, its task and precision
    space: ParameterSpace  # the repaired layers (sites)

    @property
    def model(self) -> nn.Module:
        return self.evaluator.model

    @property
    def sites(self) -> dict[str, LayerRef]:
        return {site.name: site for site in self.space.sites}

    def trace(
        self, inputs: Inputs, keep: Callable[[str], bool] = lambda name: True
    ) -> tuple[ForwardTrace, Tensor]:
        """Runs a pass. Returns its trace and the logits.

        If `keep` is False for the name of a module, only the shapes of its outputs are recorded, as
        meta tensors. Raises a `ReplayError` if the model never calls one of the sites.
        """
        traced = trace_forward(self.model, self.space.sites, keep)
        with unroll(self.space.gates), traced as trace, self.evaluator.context():
            args, kwargs = _cloned(inputs)
            output = run_model(self.model, args, kwargs)
            logits = self.evaluator.task.logits(output)
        for name in self.sites:
            if name not in trace.layer_order:
                raise ReplayError(
                    f"`layer={name!r}` is never called in the model's forward pass, so it has no "
                    "input to measure.",
                    "name a layer that is called as a module; parts of fused modules, such as "
                    "`MultiheadAttention.out_proj`, are not.",
                )
        self.evaluator.visit(len(logits))
        return trace, logits

    def forward(self, inputs: Inputs) -> Tensor:
        """Returns the logits of a pass. The model may change the inputs in place."""
        args, kwargs = inputs
        with unroll(self.space.gates), self.evaluator.context():
            return self.evaluator.task.logits(run_model(self.model, args, kwargs))

    def logits(self, inputs: Inputs, parameters: Mapping[str, Tensor]) -> Tensor:
        with temporary_weights(self.model, parameters):
            logits = self.forward(_cloned(inputs))
        self.evaluator.visit(len(logits))
        return logits


def inputs_of(batch: Batch) -> Inputs:
    """Returns the arguments of the model's forward."""
    return tuple(batch.args), dict(batch.kwargs)


@contextmanager
def trace_forward(
    model: nn.Module, sites: Sequence[LayerRef], keep: Callable[[str], bool]
) -> Iterator[ForwardTrace]:
    """Records the passes in this context. `keep` is as in `EditableModel.trace`."""
    trace = ForwardTrace()
    open_calls: list[list[tuple[str, object]]] = [[]]

    def enter(module: nn.Module, args: object) -> None:
        if not trace.layer_order:
            open_calls.append([])

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not trace.layer_order:
                open_calls.pop()
                # A packed sequence contains indices, whose values are needed.
                copy = plain_copy if keep(name) or is_packed(output) else _shape_only
                open_calls[-1].append((name, pytree.tree_map_only(Tensor, copy, output)))

        return hook

    def note(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
        if not trace.layer_order:
            for calls in open_calls:
                for name, output in calls:
                    trace.calls.append(name)
                    trace.outputs.append(output)
            trace.input, trace.output = plain_copy(x), plain_copy(y)
        trace.layer_order.append(site.name)
        trace.layer_shapes.append(y.shape)
        return y

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # has no hooks; runs like code between modules
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave(name)).remove)
        stack.enter_context(edit_outputs(sites, note))
        stack.enter_context(force_eager())
        yield trace


def is_packed(output: object) -> bool:
    """True if an output contains a packed sequence."""

    def is_sequence(x: object) -> bool:
        return isinstance(x, PackedSequence)

    return any(map(is_sequence, pytree.tree_leaves(output, is_leaf=is_sequence)))


@contextmanager
def edit_outputs(sites: Sequence[LayerRef], edit: LayerEdit) -> Iterator[None]:
    """Replaces each site's output by `edit(site, input, output)` in this context.

    Forward hooks get the new output.
    """

    def edited(site: LayerRef, forward: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda input: edit(site, input, forward(input))

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(patched_forward(site.module, edited(site, site.module.forward)))
        yield


@contextmanager
def with_cached_outputs(
    calls: Sequence[str],
    modules: Mapping[str, nn.Module],
    outputs: Sequence[object],
    first: nn.Module,
    result: Callable[[], Tensor],
) -> Iterator[None]:
    """Makes call i of the frontier return `outputs[i]`, and the layer `first` return `result()`.

    Raises a `ReplayError` if the pass calls the frontier's modules in another order than `calls`.
    """
    n_open = Counter(calls)
    patches: dict[str, ExitStack] = {}
    position = 0

    def recorded(name: str) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            nonlocal position
            if position >= len(calls) or calls[position] != name:
                raise _out_of_order(name)
            n_open[name] -= 1
            if not n_open[name]:
                patches[name].close()
            position += 1
            return outputs[position - 1]

        return forward

    def live(*args: object, **kwargs: object) -> Tensor:
        if position != len(calls):
            raise _out_of_order(calls[position])
        return result()

    with ExitStack() as stack:
        for name in n_open:
            patches[name] = stack.enter_context(ExitStack())
            patches[name].enter_context(patched_forward(modules[name], recorded(name), hooks=False))
        stack.enter_context(patched_forward(first, live))
        stack.enter_context(force_eager())
        yield


def _cloned(inputs: Inputs) -> Inputs:
    """Copies tensors and graph objects in the inputs, since a model may change them in place."""
    args, kwargs = pytree.tree_map_only((Tensor, _Clonable), lambda x: x.clone(), inputs)
    return args, kwargs


def _shape_only(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="meta")


def _out_of_order(name: str) -> ReplayError:
    return ReplayError(
        f"`layer`: the model called {name!r} in another order than when it was recorded.",
        "please report this model.",
    )
