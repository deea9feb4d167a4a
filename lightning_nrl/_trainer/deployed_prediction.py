"""What a module predicts once it is deployed: its own `predict_step` where it has one, else its `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._lightning.packages import LightningModule, rank_zero_warn
from lightning_nrl._lightning.private_parts import overrides
from lightning_nrl._model.layer_gradients import OutputProbe
from lightning_nrl._model.layers import layers_of
from lightning_nrl._scoring.traced_model import force_eager
from lightning_nrl._trainer.output_capture import hooked
from lightning_nrl._utils.attributes import attributes_kept
from lightning_nrl._utils.preserve import preserve, seed_all
from lightning_nrl.data.adapters import ADAPTER_HINT, ModelAdapter
from lightning_nrl.data.batch import Adapter, ModelCall, run_model, tensors_in
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Task

SAME_OUTPUT_TOLERANCE = 1e-3
"""Two ways to the same outputs differ by less than this part of the largest one."""

OUTPUT_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x.roll(1, 0), lambda x: 0.5 * x)
"""What is done to a layer's outputs to see whether logits depend on them: those of other samples, smaller ones. A model
knows their kind; a NaN that becomes an index would end the work of a GPU."""


@dataclass(frozen=True)
class PredictStep(ModelCall):
    """The prediction by a module's own `predict_step`; of a model without one by its forward."""

    adapter: Adapter  # for a model without a `predict_step`
    task: Task
    on_inputs: bool = False  # whether it takes the inputs alone, as data for prediction have them
    gives_probabilities: bool = False

    def __call__(self, model: nn.Module, raw: Any) -> Any:
        if not isinstance(model, LightningModule) or not overrides(model, "predict_step"):
            args, kwargs, _ = self.adapter(raw)
            return run_model(model, args, kwargs)
        batch = self.adapter(raw)[0][0] if self.on_inputs else raw
        n = len(inspect.signature(model.predict_step).parameters)
        output = model.predict_step(*(batch, 0, 0)[:n])
        if not self.gives_probabilities:
            return output
        probabilities = self.task.logits(output)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


@dataclass(frozen=True)
class _CalledOnRaw:
    """An adapter whose inputs are the raw batch itself, for a call that takes it."""

    call: ModelCall
    adapter: Adapter

    def __call__(self, raw: Any) -> Any:
        return (self.call, raw), {}, self.adapter(raw)[2]


@torch.no_grad()
def deployed_adapter(model: LightningModule, evaluator: Evaluator, adapter: Adapter, raw: Any) -> Adapter:
    """The adapter with which batches are run as the module is deployed.

    It is the given one where that runs the module itself, or where `forward` gives what `predict_step` does. All is
    left as found.

    Raises:
        ConfigurationError: there is neither `forward` nor `predict_step`, or the latter gives what cannot be repaired
            by, and `forward` predicts otherwise.

    Warns:
        DataWarning: `predict_step` gives no logits, or cannot be run, so that `forward` stands for it.
    """
    if isinstance(adapter, ModelAdapter):
        return adapter
    task, name = evaluator.task, type(model).__name__
    args, kwargs, target = adapter(raw)

    def tried(call: Callable[[], Any]) -> Any:
        try:
            with _as_evaluated(model, evaluator):
                return call()
        except Exception as error:
            return error

    forward = tried(partial(run_model, model, args, kwargs))
    if not overrides(model, "predict_step"):
        if isinstance(forward, NotImplementedError) and 'required "forward"' in str(forward):
            raise ConfigurationError(
                f"`model`: {name} has no `forward` and no `predict_step`, so it is not known what it predicts.",
                ADAPTER_HINT,
            ) from forward
        return adapter  # whatever else is wrong is said when the model is evaluated
    calls = [PredictStep(adapter, task, on_inputs) for on_inputs in (False, True)[: 1 + (len(args) == 1)]]
    results = ((call, tried(partial(call, model, raw))) for call in calls)
    call, output = next(((c, found) for c, found in results if not isinstance(found, Exception)), (None, None))
    logits = None if isinstance(forward, Exception) else _logits(task, forward, target)
    if call is None:
        if logits is None:
            raise ConfigurationError(f"`model`: {name} can run neither `forward` nor `predict_step`.", ADAPTER_HINT)
        _warn("raises on these batches")
        return adapter
    own = _logits(task, output, target)
    if own is None:
        if logits is None or not _predicts_same(output, task.prediction(logits)):
            raise ConfigurationError(
                f"`model`: `predict_step` of {name} gives {_described(output)}, no logits, and `forward` does not "
                "predict the same.",
                ADAPTER_HINT,
            )
        _warn(f"gives {_described(output)}, no logits")
        return adapter
    probable = _are_probabilities(own)
    if logits is not None and logits.shape == own.shape:
        same = (logits, logits.softmax(1)) if probable else (logits,)
        if any(_is_close(x, own) for x in same):
            return adapter
    call = replace(call, gives_probabilities=probable)
    _check_gradients(model, evaluator, call, raw)
    return _CalledOnRaw(call, adapter)


@torch.no_grad()
def called_layers(model: nn.Module, evaluator: Evaluator, adapter: Adapter, raw: Any) -> list[str] | None:
    """The layers that could be repaired and that the prediction calls, by dotted name in the order of last calls.

    The last Linear layers of a network are left out if they have no part in the logits, such as a second head. None
    where the prediction cannot be run, which is said when the model is evaluated.
    """
    args, kwargs, _ = adapter(raw)
    run = partial(run_model, model, args, kwargs)
    try:
        with _as_evaluated(model, evaluator):
            called = _called(model, run)
    except Exception:
        return None
    linear = {name: x for name, x in layers_of(model).items() if isinstance(x, nn.Linear) and name in called}
    if len(linear) > 1:
        with _as_evaluated(model, evaluator):
            idle = _idle_at_end(linear, partial(_logits_with, model, lambda: evaluator.task.logits(run())))
        called = [name for name in called if name not in idle]
    return called


def _idle_at_end(linear: dict[str, nn.Linear], run: Callable[..., Tensor | None]) -> set[str]:
    """The last layers that the logits do not need, up to the first that they do; likewise of those not frozen."""
    logits = run()
    needed, idle = set[str](), set[str]()
    # `auto` takes the last one that is not frozen, others the last one.
    for order in (list(linear), sorted(linear, key=lambda name: linear[name].weight.requires_grad)):
        left = [name for name in order if name not in idle]
        while logits is not None and len(left) > 1 and left[-1] not in needed:
            last = left[-1]
            if all(_is_same(run(linear[last], change), logits) for change in OUTPUT_CHANGES):
                idle.add(left.pop())
            else:
                needed.add(last)
    return idle


def _logits_with(
    model: nn.Module,
    run: Callable[[], Tensor],
    layer: nn.Module | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """The logits, where a layer's output is changed; None where that raises. States stay as they were."""
    layers = {} if layer is None else {"": layer}
    with attributes_kept(model), hooked(layers, lambda name, args, output: change and change(output)):
        seed_all(0)
        try:
            return run().clone()  # a model may write the next ones into the same memory
        except Exception:
            return None


def _is_same(logits: Tensor | None, others: Tensor) -> bool:
    return logits is not None and logits.shape == others.shape and torch.allclose(logits, others)


def _called(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Layers in the order of their last calls."""
    calls: list[str] = []
    with hooked(layers_of(model), lambda name, args, output: calls.append(name)):
        run()
    return list(dict.fromkeys(reversed(calls)))[::-1]


def _check_gradients(model: nn.Module, evaluator: Evaluator, call: PredictStep, raw: Any) -> None:
    with _as_evaluated(model, evaluator):
        called = _called(model, partial(call, model, raw))
        layers = layers_of(model)
        probe = OutputProbe({name: layers[name] for name in called[-1:]})
        with torch.enable_grad(), probe.hooked():
            reached = evaluator.task.logits(call(model, raw)).requires_grad
    if called and not reached:
        raise ConfigurationError(
            "`model`: no gradients come through `predict_step` (`torch.no_grad` or `inference_mode` around it), and "
            "`forward` gives something else.",
            "leave that to the trainer, which predicts without gradients anyway; or " + ADAPTER_HINT,
        )


@contextmanager
def _as_evaluated(model: nn.Module, evaluator: Evaluator) -> Iterator[None]:
    """As in an evaluation, with the same random numbers each time; all is left as found."""
    with preserve(model), evaluator.context(), force_eager():
        seed_all(0)
        yield


def _logits(task: Task, output: Any, target: Any) -> Tensor | None:
    """The logits in an output, None where it holds none that fit the task."""
    try:
        logits = task.logits(output)
        task.check(logits, target)
        passed, loss = task.passed(logits, target), task.loss(logits, target)
    except Exception:
        return None
    return logits if logits.is_floating_point() and passed.shape == loss.shape == (len(logits),) else None


def _is_close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= SAME_OUTPUT_TOLERANCE * b.abs().max())


def _are_probabilities(x: Tensor) -> bool:
    x = x.float()
    return x.ndim > 1 and bool((x >= 0).all()) and bool(((x.sum(1) - 1).abs() < 1e-2).all())


def _predicts_same(output: Any, prediction: Tensor | None) -> bool:
    """Whether an output holds the predicted classes, as whole numbers or as floating-point ones."""
    found = [x for x in tensors_in(output) if prediction is not None and x.shape == prediction.shape]
    return any(torch.equal(x.to(prediction), prediction) for x in found if prediction is not None)


def _described(output: Any) -> str:
    return f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def _warn(problem: str) -> None:
    text = f"`model`: its `predict_step` {problem}, so `forward` stands for it"
    rank_zero_warn(DataWarning(f"{text}.", "to have it judged otherwise, " + ADAPTER_HINT))
