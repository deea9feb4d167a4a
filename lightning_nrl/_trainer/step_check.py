"""Compares a module's own steps with the prediction that is repaired."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_nrl._trainer.called_layers import evaluation_context
from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import overrides
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.loss_check import (
    Calls,
    Comparison,
    LossRecorder,
    Prediction,
    check_loss,
    check_unambiguous,
)
from lightning_nrl._trainer.step_outputs import forward_hooks
from lightning_nrl._trainer.trainer_state import untracked
from lightning_nrl._utils.preserve import preserve_attributes, seed_all
from lightning_nrl._utils.state import plain_copy
from lightning_nrl.data.adapters import ADAPTER_HINT, ModelAdapter
from lightning_nrl.data.batch import run_model
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation import Evaluator

# Largest relative distance at which two inputs or outputs of a layer count as equal.
LAYER_TOLERANCE = 1e-3
SEEDS_OF_AUGMENTATION = 4  # number of runs of a step with different seeds, to see if it augments
# Augmentation explains a distance to our inputs up to this multiple of that between two runs.
SPREAD_FACTOR = 3.0


def check_step(
    trainer: Trainer, model: LightningModule, evaluator: Evaluator, known: Sequence[LoaderSource]
) -> None:
    """Refuses logits and labels that the losses of the module's own steps contradict.

    If no loss compares our logits with our labels, refuses a module whose step gives the last layer
    other inputs than the prediction does. The step is `validation_step`, or `training_step` if
    `validation_step` is missing or does not call the last layer. If the adapter runs the module
    itself, the module is not refused, but a warning is shown.
    """
    if not known or evaluator.called is None:
        return
    layers = {name: model.get_submodule(name) for name in evaluator.called[-1:]}
    steps = _Steps(trainer, model, evaluator, layers)
    own_steps = []
    if overrides(model, "validation_step"):
        own_steps.append((model.validation_step, known[-1]))
    if overrides(model, "training_step") and model.automatic_optimization:
        own_steps.append((model.training_step, known[0]))
    has_own_prediction = isinstance(known[0].adapter, ModelAdapter)
    is_compared = False
    for step, source in own_steps:
        result = steps.run(step, source, seed=0)
        if result is None:
            continue
        prediction = steps.predict(source)
        if not has_own_prediction and check_loss(
            step.__name__, result.comparisons, prediction, evaluator.task, source.adapter
        ):
            return
        is_compared = is_compared or steps.compare(step, source, result, prediction)
    if not has_own_prediction:
        check_unambiguous(steps.predict(known[0]), evaluator.task)


class _StepRun(NamedTuple):
    """Calls of the layers in a step, its loss, which may be NaN, and what its losses compare."""

    calls: Calls
    loss: float
    comparisons: list[Comparison]


@dataclass(frozen=True)
class _Steps:
    """Runs steps of the model and records calls of the `layers`, which has the last layer."""

    trainer: Trainer
    model: LightningModule
    evaluator: Evaluator
    layers: Mapping[str, nn.Module]

    def predict(self, source: LoaderSource) -> Prediction:
        raw = source.first_batch()
        args, kwargs, target = source.adapter(raw)
        output = None
        with self._recording() as calls, suppress(Exception):  # the evaluation reports an error
            output = run_model(self.model, args, kwargs)
        return Prediction(raw, args, target, output, calls)

    def compare(
        self,
        step: Callable[..., object],
        source: LoaderSource,
        result: _StepRun,
        prediction: Prediction,
    ) -> bool:
        """Compares a step with the prediction on a known batch; False if this shows nothing."""
        task = self.evaluator.task
        try:
            logits = task.logits(prediction.output)
            task.check(logits, prediction.target)
            loss = float(task.loss(logits, prediction.target).mean())
        except Exception:
            return True  # the evaluation reports the error
        apart = min(_distances(result.calls, prediction.calls), default=math.nan)
        if math.isnan(apart):
            return False
        run = partial(self.run, step, source)
        if apart <= LAYER_TOLERANCE or _is_augmented(result.calls, prediction.calls, run):
            return True
        problem = (
            f"`model`: `{step.__name__}` gives the layer {next(iter(self.layers))!r} other inputs "
            f"than the prediction that would be repaired (relative distance {apart:.2g}); the loss "
            f"of its own step is {result.loss:.3g}, that of the prediction {loss:.3g} on the same "
            "batch."
        )
        if not isinstance(source.adapter, ModelAdapter):
            hint = f"move what the step does to a batch into `forward`, or {ADAPTER_HINT}"
            raise ConfigurationError(problem, hint)
        rank_zero_warn(
            DataWarning(problem, "make sure that the adapter predicts as the deployed model does.")
        )
        return True

    def run(
        self, step: Callable[..., object], source: LoaderSource, *, seed: int
    ) -> _StepRun | None:
        raw = source.first_batch()
        n_parameters = len(inspect.signature(step).parameters)
        with untracked(self.trainer), preserve_attributes(self.model), self._recording() as calls:
            seed_all(seed)
            try:
                with LossRecorder() as recorder:
                    loss = step(*(raw, 0, 0)[:n_parameters])
            except Exception:
                return None
        if isinstance(loss, Mapping):
            loss = loss.get("loss")
        value = math.nan
        if isinstance(loss, Tensor) and loss.numel() == 1:
            value = float(loss)
        return _StepRun(calls, value, recorder.comparisons)

    @contextmanager
    def _recording(self) -> Iterator[Calls]:
        calls = []

        def record(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((plain_copy(args[0]).float(), plain_copy(output).float()))

        context = evaluation_context(self.model, self.evaluator)
        with context, torch.no_grad(), forward_hooks(self.layers, record):
            yield calls


def _is_augmented(calls: Calls, expected: Calls, run: Callable[..., _StepRun | None]) -> bool:
    # If the step augments, its inputs differ from the prediction's about as much as from its own
    # with another seed.
    runs = [calls]
    for seed in range(1, SEEDS_OF_AUGMENTATION):
        result = run(seed=seed)
        if result is None:
            return True
        runs.append(result.calls)
    from_ours = [min(_distances(calls, expected), default=math.inf) for calls in runs]
    spread = [min(_distances(a, b), default=0.0) for a, b in combinations(runs, 2)]
    return sum(from_ours) / len(from_ours) <= SPREAD_FACTOR * sum(spread) / len(spread)


def _distances(calls: Calls, expected: Calls) -> Iterator[float]:
    for x, y in calls:
        for expected_x, expected_y in expected:
            if not len(expected_x) or not len(expected_y):
                continue
            # A step may concatenate several views of a batch.
            views = zip(x.split(len(expected_x)), y.split(len(expected_y)), strict=False)
            for view_x, view_y in views:
                if view_x.shape == expected_x.shape and view_y.shape == expected_y.shape:
                    yield max(_distance(view_x, expected_x), _distance(view_y, expected_y))


def _distance(x: Tensor, y: Tensor) -> float:
    # Relative to the smaller norm, so that a distance is large whichever of the two tensors is
    # scaled.
    return float((x - y).norm() / torch.minimum(x.norm(), y.norm()).clamp_min(1e-12))
