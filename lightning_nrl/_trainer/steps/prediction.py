"""Finds how a module predicts when it is deployed: by `predict_step` or by `forward`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import overrides
from lightning_nrl._trainer.lightning.step_outputs import call_step
from lightning_nrl._trainer.reading.loaders import LoaderSource, length_of
from lightning_nrl._trainer.steps.called_layers import call_order, called_layers, evaluation_context
from lightning_nrl._trainer.steps.proof import (
    FEWEST_PROBABILITIES,
    Evidence,
    has_labels,
    is_close,
)
from lightning_nrl._trainer.steps.step_check import check_step
from lightning_nrl._trainer.trainer_state import make_evaluator
from lightning_nrl._utils.preserve import outside_inference_mode, seed_all
from lightning_nrl._utils.sharded import is_sharded
from lightning_nrl.data.adapters import ADAPTER_HINT, ModelAdapter, outputs_in
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
RESET_LINE = "module.reset()  # whatever resets the state\n        logits ="


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
    call = DeployedCall(adapter, task, choice)
    if choice.by_predict_step:
        adapter = call.adapt
        if needs_gradients:
            ranks.all_or_none(partial(_check_gradients, evaluator, call, raw), failed)
    layers = ranks.of_first(called_layers(evaluator, adapter, raw))
    evaluator = replace(evaluator, called=layers)
    if is_sharded(model):
        evaluator = replace(evaluator, spare_batch=partial(_spare_batch, adapter, raw))

    def check() -> Evidence:
        instability = _instability(evaluator, adapter, raw)
        if instability is not None:
            rank_zero_warn(instability)
        known = [replace(source, adapter=adapter) for source in splits[0]]
        is_stable, is_shown = instability is None, choice.is_shown
        return check_step(trainer, model, evaluator, known, is_stable=is_stable, is_shown=is_shown)

    evidence = ranks.of_first(ranks.all_or_none(check, failed))
    evaluator = replace(evaluator, is_proven=evidence.is_proven)
    if evidence.are_probabilities and not choice.gives_probabilities:
        adapter = replace(call, choice=replace(choice, gives_probabilities=True)).adapt
    opened = tuple([replace(source, adapter=adapter) for source in part] for part in splits)
    return evaluator, opened


def _spare_batch(adapter: Adapter, raw: RawBatch) -> Batch:
    raw = copy.deepcopy(raw)  # a forward may write into it
    args, kwargs, target = adapter(raw)
    return Batch(args, target, torch.arange(length_of(target)), kwargs, raw)


@torch.no_grad()
def _instability(evaluator: Evaluator, adapter: Adapter, raw: RawBatch) -> DataWarning | None:
    """Returns a warning if predictions of one batch differ."""
    outputs = []
    with suppress(Exception), evaluation_context(evaluator):
        for seed in (0, 0, 1):
            seed_all(seed)
            args, kwargs, target = adapter(copy.deepcopy(raw))  # a forward may write into it
            logits = _logits(evaluator.task, run_model(evaluator.model, args, kwargs), target)
            assert not isinstance(logits, Exception)
            outputs.append(logits.nan_to_num())
    if len(outputs) < 3:
        return None
    first, second, reseeded = outputs
    if not is_close(first, second, SAME_OUTPUT_TOLERANCE):
        return DataWarning(
            "`model`: it keeps a state from batch to batch (two predictions of the same batch "
            "differ), so all counts depend on the order and the size of the batches.",
            "reset the state before each prediction, as your steps do: "
            + ADAPTER_HINT.replace("logits =", RESET_LINE),
        )
    if not is_close(first, reseeded, SAME_OUTPUT_TOLERANCE):
        return DataWarning(
            "`model`: its predictions are random in evaluation mode, for instance by dropout that "
            "stays on.",
            "all counts hold for one fixed draw; draw only `if self.training`, or " + ADAPTER_HINT,
        )
    return None


@torch.no_grad()
def describe_uncounted_outputs(evaluator: Evaluator, source: LoaderSource) -> str:
    """Returns a sentence on the outputs besides the one that `NamedHead` names, if any."""
    model, task = evaluator.model, evaluator.task
    if not isinstance(task, NamedHead):
        return ""
    args, kwargs, _ = source.adapter(source.first_batch())
    with evaluation_context(evaluator):
        output = run_model(model, args, kwargs)
    counted = task.logits(output)
    uncounted = [f"output `{name}`" for name, x in outputs_in(output).items() if x is not counted]
    if not uncounted:
        return ""
    return f"Not counted, so it is unknown what breaks in them: {', '.join(uncounted)}."


@dataclass(frozen=True)
class Choice:
    """How a module predicts.

    Attributes:
        by_predict_step: True to call `predict_step`, of modules that have one, not `forward`.
        on_inputs: True if `predict_step` takes the inputs without targets.
        gives_probabilities: True if the output has probabilities, to be converted to logits.
        is_shown: True if `predict_step` shows that the logits are right, by classes or
            probabilities that agree with them.
    """

    by_predict_step: bool = False
    on_inputs: bool = False
    gives_probabilities: bool = False
    is_shown: bool = False


@dataclass(frozen=True)
class DeployedCall(ModelCall):
    """Prediction as the deployed module makes it, by its own `predict_step` or by `forward`.

    Attributes:
        adapter: separates inputs from targets.
        task: converts outputs to logits.
        choice: how the module predicts.
    """

    adapter: Adapter
    task: Task
    choice: Choice

    def adapt(self, raw: RawBatch) -> Unpacked:
        """Adapter for a batch that the call takes as a whole."""
        return (self, raw), {}, self.adapter(raw)[2]

    def __call__(self, model: nn.Module, raw: RawBatch) -> ModelOutput:
        output = self._output(model, raw)
        if not self.choice.gives_probabilities:
            return output
        probabilities = self.task.logits(output)
        limits = torch.finfo(probabilities.dtype)
        if has_labels(probabilities, self.task):
            return probabilities.logit(limits.eps)
        return probabilities.clamp_min(limits.tiny).log()

    def _output(self, model: nn.Module, raw: RawBatch) -> ModelOutput:
        args, kwargs, _ = self.adapter(raw)
        # An old model may lack the step.
        if (
            self.choice.by_predict_step
            and isinstance(model, LightningModule)
            and overrides(model, "predict_step")
        ):
            batch = raw
            if self.choice.on_inputs:
                batch = args[0] if len(args) == 1 else args
            return call_step(model.predict_step, batch)
        return run_model(model, args, kwargs)


@torch.no_grad()
def choose_prediction(
    model: LightningModule, evaluator: Evaluator, adapter: Adapter, raw: RawBatch
) -> Choice:
    """Chooses between `predict_step` and `forward`.

    `forward` is chosen if it predicts the same as `predict_step`, or if `predict_step` is missing
    or fails. If the adapter runs the module itself, the adapter predicts.
    """
    if isinstance(adapter, ModelAdapter):
        return Choice()
    args, kwargs, target = adapter(raw)
    forward = _output_or_error(evaluator, partial(run_model, model, args, kwargs))
    name = type(model).__name__
    if not overrides(model, "predict_step"):
        if isinstance(forward, NotImplementedError) and 'required "forward"' in str(forward):
            raise ConfigurationError(
                f"`model`: {name} has no `forward` and no `predict_step`, so it is not known what "
                "it predicts.",
                ADAPTER_HINT,
            ) from forward
        return Choice()  # the evaluation reports any other problem
    for on_inputs in (False, True):
        choice = Choice(by_predict_step=True, on_inputs=on_inputs)
        call = DeployedCall(adapter, evaluator.task, choice)
        output = _output_or_error(evaluator, partial(call, model, raw))
        if not isinstance(output, Exception):
            return _compare_with_forward(name, evaluator.task, choice, output, forward, target)
    if isinstance(forward, Exception):
        error = f"{type(forward).__name__}: {first_line(forward)}"
        raise ConfigurationError(
            f"`model`: {name} can run neither `predict_step` nor `forward` ({error}).",
            ADAPTER_HINT,
        ) from forward
    _warn("raises an error on these batches")
    return Choice()


def _output_or_error(evaluator: Evaluator, call: Callable[[], ModelOutput]) -> ModelOutput:
    try:
        with evaluation_context(evaluator):
            return call()
    except Exception as error:
        return error


def _compare_with_forward(
    name: str,
    task: Task,
    by_predict_step: Choice,
    output: ModelOutput,
    forward: ModelOutput,
    target: Any,
) -> Choice:
    """Chooses between the output of a module's `predict_step` and the result of its `forward`."""
    forward_logits = _logits(task, forward, target)
    logits = _logits(task, output, target)
    if isinstance(logits, Exception):
        _check_same_prediction(name, task, output, logits, forward_logits)
        return Choice(is_shown=True)
    are_probabilities = _are_probabilities(logits, task)
    if not isinstance(forward_logits, Exception) and forward_logits.shape == logits.shape:
        if is_close(forward_logits, logits, SAME_OUTPUT_TOLERANCE):
            return Choice()
        if are_probabilities:
            probabilities = class_logits(forward_logits).softmax(1)[:, -logits.shape[1] :]
            if is_close(probabilities, logits, SAME_OUTPUT_TOLERANCE):
                return Choice(is_shown=True)
    return replace(
        by_predict_step, gives_probabilities=are_probabilities, is_shown=are_probabilities
    )


def _check_same_prediction(
    name: str, task: Task, output: ModelOutput, error: Exception, forward_logits: Tensor | Exception
) -> None:
    """Refuses an output without logits, by the task's error, unless `forward` predicts the same."""
    kind = type(output).__name__
    if isinstance(output, Tensor):
        kind = f"{output.dtype} {list(output.shape)}"
    elif outputs_in(output):
        kind += f" that the task refuses ({first_line(error)})"
    if isinstance(forward_logits, Exception) or not _predicts(
        output, task.prediction(forward_logits)
    ):
        raise ConfigurationError(
            f"`model`: `predict_step` of {name} returns {kind}, no logits, and nothing shows "
            "that `forward` predicts the same.",
            ADAPTER_HINT,
        )
    _warn(f"returns {kind}, no logits")


def _logits(task: Task, output: ModelOutput, target: Any) -> Tensor | Exception:
    """Returns the logits in an output, or the error if the task cannot judge the output."""
    try:
        logits = task.logits(output)
        task.check(logits, target)
        shapes = {task.passed(logits, target).shape, task.loss(logits, target).shape}
        if shapes == {(len(logits),)} and logits.is_floating_point():
            return logits
    except Exception as error:
        return error
    return TypeError(f"{logits.dtype} {list(logits.shape)} has no logits")


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
def _check_gradients(evaluator: Evaluator, call: DeployedCall, raw: RawBatch) -> None:
    model = evaluator.model
    with evaluation_context(evaluator):
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
