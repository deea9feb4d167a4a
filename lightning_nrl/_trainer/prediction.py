"""Finds how a module predicts when it is deployed: by `predict_step` or by `forward`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._trainer.called_layers import call_order, called_layers, evaluation_context
from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import overrides
from lightning_nrl._trainer.loaders import LoaderSource, length_of
from lightning_nrl._trainer.loss_check import outputs_in
from lightning_nrl._trainer.step_check import check_step
from lightning_nrl._trainer.trainer_state import make_evaluator
from lightning_nrl._utils.preserve import outside_inference_mode, seed_all
from lightning_nrl._utils.sharded import is_sharded
from lightning_nrl.data.adapters import ADAPTER_HINT, ModelAdapter
from lightning_nrl.data.batch import (
    Adapter,
    Batch,
    ModelCall,
    ModelOutput,
    RawBatch,
    Unpacked,
    run_model,
    tensors_in,
)
from lightning_nrl.errors import ConfigurationError, DataWarning, first_line
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layer_gradients import OutputProbe
from lightning_nrl.evaluation.layers import layers_of
from lightning_nrl.tasks import NamedHead, Task, class_logits

# Largest difference of outputs that count as equal, relative to the largest output.
SAME_OUTPUT_TOLERANCE = 1e-3
FEWEST_PROBABILITIES = 8  # number of samples; fewer logits may all lie between 0 and 1 by chance


@outside_inference_mode()
def open_sources(
    trainer: Trainer,
    model: LightningModule,
    task: Task,
    *splits: Sequence[LoaderSource],
    needs_gradients: bool = False,
) -> tuple[Evaluator, tuple[list[LoaderSource], ...]]:
    """Returns an evaluator, and sources with adapters that predict as the deployed module does.

    The first batch of the first source decides if `predict_step` or `forward` predicts, and which
    layers are called (`Evaluator.called`). On the sources in `splits[0]`, the module's own steps
    are compared with the prediction. With `needs_gradients`, a `predict_step` without gradients is
    refused.
    """
    evaluator = make_evaluator(trainer, model, task)
    ranks = evaluator.collective
    first = next(chain.from_iterable(splits), None)
    if first is None:
        return evaluator, tuple([] for _ in splits)
    failed = "the prediction could not be tried on another rank."
    raw = ranks.all_or_none(first.first_batch, failed)
    adapter = first.adapter
    choose = partial(choose_prediction, model, evaluator, adapter, raw)
    # The prediction may fail or differ on a single rank, so the first rank chooses for all.
    choice = ranks.of_first(ranks.all_or_none(choose, failed))
    if choice is not None:
        call = PredictStep(adapter, task, *choice)
        if needs_gradients:
            ranks.all_or_none(partial(_check_gradients, model, evaluator, call, raw), failed)
        adapter = partial(_adapt_raw, call, adapter)
    opened = tuple([replace(source, adapter=adapter) for source in part] for part in splits)
    layers = ranks.of_first(called_layers(model, evaluator, adapter, raw))
    evaluator = replace(evaluator, called=layers)
    if is_sharded(model):
        evaluator = replace(evaluator, spare_batch=partial(_spare_batch, adapter, raw))

    def check() -> None:
        if not _is_random(model, evaluator, adapter, raw):
            check_step(trainer, model, evaluator, opened[0])
            return
        rank_zero_warn(
            DataWarning(
                "`model`: its predictions are random in evaluation mode, for instance by dropout "
                "that stays on.",
                "all counts hold for one fixed draw; draw only `if self.training`, or "
                + ADAPTER_HINT,
            )
        )

    ranks.all_or_none(check, failed)
    return evaluator, opened


def _spare_batch(adapter: Adapter, raw: RawBatch) -> Batch:
    raw = copy.deepcopy(raw)  # a forward may write into it
    args, kwargs, target = adapter(raw)
    return Batch(args, target, torch.arange(length_of(target)), kwargs, raw)


@torch.no_grad()
def _is_random(model: nn.Module, evaluator: Evaluator, adapter: Adapter, raw: RawBatch) -> bool:
    outputs = []
    with suppress(Exception):
        for seed in (0, 1):
            args, kwargs, target = adapter(copy.deepcopy(raw))  # a forward may write into it
            with evaluation_context(model, evaluator):
                seed_all(seed)
                logits = _logits(evaluator.task, run_model(model, args, kwargs), target)
            if logits is not None:
                outputs.append(logits.nan_to_num())
    return len(outputs) == 2 and not _is_close(*outputs)


@torch.no_grad()
def describe_uncounted_outputs(evaluator: Evaluator, source: LoaderSource) -> str:
    """Returns a sentence on the outputs besides the one that `NamedHead` names, if any."""
    model, task = evaluator.model, evaluator.task
    if not isinstance(task, NamedHead):
        return ""
    args, kwargs, _ = source.adapter(source.first_batch())
    with evaluation_context(model, evaluator):
        names = outputs_in(run_model(model, args, kwargs))
    uncounted = [f"output `{name}`" for name in names if name != task.name]
    if not uncounted:
        return ""
    return f"Not counted, so it is unknown what breaks in them: {', '.join(uncounted)}."


@dataclass(frozen=True)
class PredictStep(ModelCall):
    """Prediction by a module's own `predict_step`, or by its `forward` if it has none.

    Attributes:
        adapter: separates inputs from targets.
        task: converts outputs to logits.
        on_inputs: True if `predict_step` takes the inputs without targets.
        gives_probabilities: True if `predict_step` returns probabilities, to be converted to
            logits.
    """

    adapter: Adapter
    task: Task
    on_inputs: bool = False
    gives_probabilities: bool = False

    def __call__(self, model: nn.Module, raw: RawBatch) -> ModelOutput:
        if not isinstance(model, LightningModule) or not overrides(model, "predict_step"):
            args, kwargs, _ = self.adapter(raw)
            return run_model(model, args, kwargs)
        inputs = self.adapter(raw)[0] if self.on_inputs else (raw,)
        batch = inputs[0] if len(inputs) == 1 else inputs
        n = len(inspect.signature(model.predict_step).parameters)
        output = model.predict_step(*(batch, 0, 0)[:n])
        if not self.gives_probabilities:
            return output
        probabilities = self.task.logits(output)
        limits = torch.finfo(probabilities.dtype)
        if probabilities.shape[1] == 1:
            return probabilities.logit(limits.eps)
        return probabilities.clamp_min(limits.tiny).log()


def _adapt_raw(call: ModelCall, adapter: Adapter, raw: RawBatch) -> Unpacked:
    return (call, raw), {}, adapter(raw)[2]


@torch.no_grad()
def choose_prediction(
    model: LightningModule, evaluator: Evaluator, adapter: Adapter, raw: RawBatch
) -> tuple[bool, bool] | None:
    """Returns the last two fields of a `PredictStep`, or None to predict by `forward`.

    `forward` is chosen if it predicts the same as `predict_step`, or if `predict_step` is missing
    or fails. If the adapter runs the module itself, the result is None, and the adapter predicts.
    """
    if isinstance(adapter, ModelAdapter):
        return None
    task = evaluator.task
    name = type(model).__name__
    args, kwargs, target = adapter(raw)

    def result_or_error(call: Callable[[], ModelOutput]) -> ModelOutput:
        try:
            with evaluation_context(model, evaluator):
                return call()
        except Exception as error:
            return error

    forward = result_or_error(partial(run_model, model, args, kwargs))
    if not overrides(model, "predict_step"):
        if isinstance(forward, NotImplementedError) and 'required "forward"' in str(forward):
            raise ConfigurationError(
                f"`model`: {name} has no `forward` and no `predict_step`, so it is not known what "
                "it predicts.",
                ADAPTER_HINT,
            ) from forward
        return None  # the evaluation reports any other problem
    call = PredictStep(adapter, task)
    output = result_or_error(partial(call, model, raw))
    if isinstance(output, Exception):
        call = PredictStep(adapter, task, on_inputs=True)
        output = result_or_error(partial(call, model, raw))
    if isinstance(output, Exception):
        if isinstance(forward, Exception):
            error = f"{type(forward).__name__}: {first_line(forward)}"
            raise ConfigurationError(
                f"`model`: {name} can run neither `predict_step` nor `forward` ({error}).",
                ADAPTER_HINT,
            ) from forward
        _warn("raises an error on these batches")
        return None
    forward_logits = _logits(task, forward, target)
    logits = _logits(task, output, target)
    if logits is None:
        kind = type(output).__name__
        if isinstance(output, Tensor):
            kind = f"{output.dtype} {list(output.shape)}"
        if forward_logits is None or not _predicts(output, task.prediction(forward_logits)):
            raise ConfigurationError(
                f"`model`: `predict_step` of {name} returns {kind}, no logits, and nothing shows "
                "that `forward` predicts the same.",
                ADAPTER_HINT,
            )
        _warn(f"returns {kind}, no logits")
        return None
    are_probabilities = _are_probabilities(logits, task)
    if forward_logits is not None and forward_logits.shape == logits.shape:
        if _is_close(forward_logits, logits):
            return None
        if are_probabilities:
            probabilities = class_logits(forward_logits).softmax(1)[:, -logits.shape[1] :]
            if _is_close(probabilities, logits):
                return None
    return call.on_inputs, are_probabilities


def _logits(task: Task, output: ModelOutput, target: Any) -> Tensor | None:
    """Returns the logits in an output, or None if the task cannot judge the output."""
    with suppress(Exception):
        logits = task.logits(output)
        task.check(logits, target)
        shapes = {task.passed(logits, target).shape, task.loss(logits, target).shape}
        if shapes == {(len(logits),)} and logits.is_floating_point():
            return logits
    return None


def _is_close(x: Tensor, expected: Tensor) -> bool:
    expected = expected.float()
    distance = (x.float() - expected).abs().max()
    return bool(distance <= SAME_OUTPUT_TOLERANCE * expected.abs().max())


def _are_probabilities(x: Tensor, task: Task) -> bool:
    x = x.float()
    if x.shape[1:] == (1,) and task.prediction(x) is not None:
        return len(x) >= FEWEST_PROBABILITIES and bool(((x >= 0) & (x <= 1)).all())
    return x.ndim > 1 and bool((x >= 0).all()) and bool(((x.sum(1) - 1).abs() < 1e-2).all())


def _predicts(output: ModelOutput, prediction: Tensor | None) -> bool:
    """True if a tensor in the output equals the prediction."""
    if prediction is None:
        return False
    return any(torch.equal(tensor.to(prediction), prediction) for tensor in tensors_in(output))


def _warn(problem: str) -> None:
    rank_zero_warn(
        DataWarning(
            f"`model`: its `predict_step` {problem}, so `forward` is used instead.",
            f"to have other outputs judged, {ADAPTER_HINT}",
        )
    )


@torch.no_grad()
def _check_gradients(
    model: nn.Module, evaluator: Evaluator, call: PredictStep, raw: RawBatch
) -> None:
    with evaluation_context(model, evaluator):
        called = call_order(model, partial(call, model, raw))
        probe = OutputProbe({name: layers_of(model)[name] for name in called[-1:]})
        with torch.enable_grad(), probe.hooked():
            is_reached = evaluator.task.logits(call(model, raw)).requires_grad
    if called and not is_reached:
        raise ConfigurationError(
            "`model`: no gradients come through `predict_step` (`torch.no_grad` or "
            "`inference_mode` around it), and `forward` predicts something else.",
            "remove it, since the trainer predicts without gradients anyway; or " + ADAPTER_HINT,
        )
