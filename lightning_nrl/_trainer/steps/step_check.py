"""Compares a module's own steps with the prediction that is repaired."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from textwrap import shorten
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import overrides
from lightning_nrl._trainer.lightning.step_outputs import (
    Probe,
    Step,
    call_step,
    forward_hooks,
    loss_in,
    no_op,
)
from lightning_nrl._trainer.reading.loaders import LoaderSource
from lightning_nrl._trainer.steps.called_layers import evaluation_context
from lightning_nrl._trainer.steps.proof import (
    Evidence,
    Prediction,
    ScoreUse,
    decide,
    recorded_uses,
    show_probabilities,
    weigh,
)
from lightning_nrl._trainer.trainer_state import untracked
from lightning_nrl._utils.preserve import preserve_attributes, replaced, seed_all
from lightning_nrl._utils.sharded import is_sharded
from lightning_nrl._utils.state import plain_copy, temporary_weights
from lightning_nrl.data.adapters import ADAPTER_HINT, ModelAdapter
from lightning_nrl.data.batch import Adapter, Args, ModelCall, ModelOutput, run_model
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import NamedHead, Task

Calls = list[tuple[Tensor, Tensor]]
"""Input and output of a layer in each of its calls."""
# Largest relative distance at which two inputs or outputs of a layer count as equal.
LAYER_TOLERANCE = 1e-3
MAX_NAMES_SHOWN = 120  # characters
SEEDS_OF_AUGMENTATION = 4  # number of runs of a step with different seeds, to see if it augments
# Augmentation explains a distance to our inputs up to this multiple of that between two runs.
SPREAD_FACTOR = 3.0


@torch.no_grad()
def check_step(
    trainer: Trainer,
    model: LightningModule,
    evaluator: Evaluator,
    known: Sequence[LoaderSource],
    *,
    is_stable: bool,
    is_shown: bool,
) -> Evidence:
    """Refuses logits that the module's own steps contradict, and asks if they show nothing.

    Steps that give the last layer other inputs than the prediction does are refused, too; if the
    adapter runs the module itself, only a warning is shown. With `is_shown`, `predict_step` has
    shown that the logits are right. If predictions are not `is_stable`, inputs are not compared.

    Returns:
        What all steps show.
    """
    if not known or evaluator.called is None:
        return Evidence()
    layers = {name: model.get_submodule(name) for name in evaluator.called[-1:]}
    steps = _Steps(trainer, model, evaluator, layers)
    evidence = [Evidence(is_used=is_shown)]
    is_compared = not is_stable
    for step, source in _own_steps(model, known):
        prediction, calls, parts = steps.predict(source)
        result = steps.run(step, source, prediction, parts, seed=0)
        if result is None:
            continue
        evidence.append(_weigh(step, result, prediction, evaluator.task, source.adapter))
        if evidence[-1].is_proven and evidence[-1].is_of_batch:
            break
        is_compared = is_compared or steps.compare(step, source, result, prediction, calls)
    prediction, _, _ = steps.predict(known[-1])
    task, split = evaluator.task, known[-1].split
    has_adapter = isinstance(known[0].adapter, ModelAdapter)
    decide(evidence, prediction, task, split, has_adapter=has_adapter)
    are_probabilities = not has_adapter and show_probabilities(evidence, prediction, task)
    is_proven = any(of_step.is_proven for of_step in evidence)
    if not (has_adapter or isinstance(task, NamedHead)) and _trains_by_step(model):
        _warn_of(steps.unused_weights(known[0]))
    return Evidence(is_proven=is_proven, are_probabilities=are_probabilities)


def _warn_of(unused: Sequence[str]) -> None:
    if unused:
        names = shorten(", ".join(unused), MAX_NAMES_SHOWN, placeholder=" ...")
        rank_zero_warn(
            DataWarning(
                f"`model`: `training_step` trains {names}, but the prediction that is counted does "
                "not depend on them.",
                "nothing is wrong if only an auxiliary loss uses them. If the module keeps what it "
                "computes from them in evaluation mode, give an old model as a module, not as a "
                "path. If they choose the classes, as the transitions of a CRF do, " + ADAPTER_HINT,
            )
        )


def _own_steps(
    model: LightningModule, known: Sequence[LoaderSource]
) -> Iterator[tuple[Step, LoaderSource]]:
    """Yields the module's own steps, and the data on which to run each."""
    for step in (model.validation_step, model.test_step):
        if overrides(model, step.__name__):
            yield step, known[-1]
    if _trains_by_step(model):
        yield model.training_step, known[0]


def _trains_by_step(model: LightningModule) -> bool:
    return model.automatic_optimization and overrides(model, "training_step")


def _weigh(
    step: Step, result: _StepRun, prediction: Prediction, task: Task, adapter: Adapter
) -> Evidence:
    evidence = weigh(step.__name__, result.uses, result.logits, prediction, task, adapter)
    with suppress(Exception):  # the evaluation reports an error
        assert prediction.logits is not None
        right = task.right(prediction.logits, prediction.target)
        accuracy = round(float(right.float().mean()), 4)
        if 0 < accuracy < 1 and accuracy in result.accuracies:
            return replace(evidence, is_used=True)
    return evidence


class _StepRun(NamedTuple):
    """Calls of the layers in a step, its loss, which may be NaN, and what it compares and logs."""

    calls: Calls
    loss: float
    uses: list[ScoreUse]
    logits: list[Tensor]  # of the calls that predict as the model does
    accuracies: set[float]


@dataclass(frozen=True)
class _Steps:
    """Runs steps of the model and records calls of the `layers`, which has the last layer."""

    trainer: Trainer
    model: LightningModule
    evaluator: Evaluator
    layers: Mapping[str, nn.Module]

    def predict(self, source: LoaderSource) -> tuple[Prediction, Calls, tuple[str, ...]]:
        """Returns a prediction, calls of layers, and names of modules that predict the same."""
        raw = source.first_batch()
        args, kwargs, target = source.adapter(raw)
        output = logits = None
        probe = Probe(self.model)
        with self._recording() as calls, suppress(Exception):  # the evaluation reports an error
            output = probe(*args, **kwargs)
            logits = self.evaluator.task.logits(output)
        parts = probe.parts or ()
        if not (args and isinstance(args[0], ModelCall)):
            parts = ("", *parts)
        return Prediction(raw, args, target, output, logits), calls, parts

    def compare(
        self,
        step: Step,
        source: LoaderSource,
        result: _StepRun,
        prediction: Prediction,
        calls: Calls,
    ) -> bool:
        """Compares the inputs of the last layer in a step and in the prediction of a batch.

        Returns False if this shows nothing.
        """
        task = self.evaluator.task
        try:
            assert prediction.logits is not None
            task.check(prediction.logits, prediction.target)
            loss = float(task.loss(prediction.logits, prediction.target).mean())
        except Exception:
            return True  # the evaluation reports the error
        apart = min(_distances(result.calls, calls), default=math.nan)
        if math.isnan(apart):
            return False
        run = partial(self.run, step, source, prediction, ())
        if apart <= LAYER_TOLERANCE or _is_augmented(result.calls, calls, run):
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
        self,
        step: Step,
        source: LoaderSource,
        prediction: Prediction,
        parts: Sequence[str],
        *,
        seed: int,
    ) -> _StepRun | None:
        raw = source.first_batch()
        n_scores = 0 if prediction.logits is None else prediction.logits.numel()
        logits = []
        accuracies = set()

        def keep_logits(name: str, args: Args, output: ModelOutput) -> None:
            with suppress(Exception):
                logits.append(self.evaluator.task.logits(output))

        def log(name: str, value: object, *args: object, **kwargs: object) -> None:
            if "acc" in name.lower():
                with suppress(Exception):  # such as a metric that is logged as it is
                    accuracy = float(torch.as_tensor(value))
                    accuracies.update({round(accuracy, 4), round(accuracy / 100, 4)})

        def log_dict(dictionary: Mapping[str, object], *args: object, **kwargs: object) -> None:
            for name, value in dictionary.items():
                log(name, value)

        modules = {name: self.model.get_submodule(name) for name in parts}
        with self._recording(log, log_dict) as calls, forward_hooks(modules, keep_logits):
            seed_all(seed)
            try:
                with recorded_uses(self.model, n_scores) as uses:
                    loss = loss_in(call_step(step, raw))
            except Exception:
                return None
        value = math.nan
        if loss is not None and loss.numel() == 1:
            value = float(loss)
        return _StepRun(calls, value, uses, logits, accuracies)

    def unused_weights(self, source: LoaderSource) -> list[str]:
        """Returns the names of parameters that `training_step` trains and the logits ignore.

        Such as the transitions of a decoder, or weights of which a module keeps what it has
        computed. The training step runs first, in training mode, in which modules drop what they
        keep.
        """
        model = self.model
        if is_sharded(model):
            return []
        parameters = dict(model.named_parameters())
        raw = source.first_batch()

        def loss() -> Tensor | None:
            model.train()
            return loss_in(call_step(model.training_step, raw))

        def logits() -> Tensor:
            args, kwargs, _ = source.adapter(raw)
            return self.evaluator.task.logits(run_model(model, args, kwargs))

        def run(call: Callable[[], Tensor | None]) -> Tensor:
            with self._recording():
                result = call()
                assert result is not None
                return result

        with suppress(Exception):  # the evaluation and the training report an error
            with torch.enable_grad():
                unused_ids = _leaves(run(loss)) - _leaves(run(logits))
            unused = {name: x for name, x in parameters.items() if id(x) in unused_ids}
            if not unused:
                return []
            before = run(logits)
            # A prediction may depend on parameters without gradients.
            with temporary_weights(model, {name: x + 1 for name, x in unused.items()}):
                after = run(logits)
            return list(unused) if torch.equal(before, after) else []
        return []

    @contextmanager
    def _recording(self, log: Step = no_op, log_dict: Step = no_op) -> Iterator[Calls]:
        """Records calls of the layers in a block that leaves trainer and model unchanged."""
        calls = []

        def record(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((plain_copy(args[0]).float(), plain_copy(output).float()))

        with (
            untracked(self.trainer),
            preserve_attributes(self.model),
            evaluation_context(self.evaluator),
            forward_hooks(self.layers, record),
            replaced(self.model, log=log, log_dict=log_dict),
        ):
            yield calls


def _leaves(result: Tensor) -> set[int]:
    """Returns the `id` of each parameter from which a result was computed."""
    leaves, seen, nodes = set(), set(), [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return leaves


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
