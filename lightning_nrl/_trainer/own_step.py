"""Whether a module's own step gives the network what a repair gives it: inputs normalised, embedded, chosen alike.

Losses do not tell: label smoothing, weights of classes and regularisation move them, and before training all are alike.
So the last layer is listened to, in the module's own step and in our evaluation of the same batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._lightning.private_parts import overrides
from lightning_nrl._scoring.traced_model import force_eager
from lightning_nrl._trainer.deployed_prediction import called_layers, deployed_adapter
from lightning_nrl._trainer.hook_followers import nothing, replaced
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.output_capture import hooked
from lightning_nrl._trainer.trainer_state import make_evaluator, untracked
from lightning_nrl._utils.attributes import attributes_kept
from lightning_nrl._utils.preserve import preserve, seed_all
from lightning_nrl.data.adapters import ADAPTER_HINT, ModelAdapter
from lightning_nrl.data.batch import run_model
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Task

LAYER_TOLERANCE = 1e-3
"""Part of its size by which a layer's input or output may differ between two ways to the same."""
SEEDS_OF_AUGMENTATION = 4
"""How often a step that augments at random is run, to see how far its inputs spread."""
SPREAD_FACTOR = 3.0
"""How much farther than from each other they may lie from ours, on average, if no more than augmentation is at work."""
LOSS_FACTOR, LOSS_OFFSET = 2.0, 0.5
"""Our loss is suspicious above so many times the module's own, and so much."""

Calls = list[tuple[Tensor, Tensor]]
"""What a layer was given and what it gave, call by call."""


@dataclass(frozen=True)
class _StepResult:
    calls: Calls
    loss: float  # NaN where the step gives none


def open_sources(
    trainer: Trainer, model: LightningModule, task: Task, *splits: Sequence[LoaderSource]
) -> tuple[Evaluator, tuple[list[LoaderSource], ...]]:
    """Returns an evaluator that knows which layers are called, and sources whose batches are run as deployed.

    Both are found out on the first batch of the first source. The sources of the first split are checked: the module's
    own step has to give the network what the evaluation gives it.

    Raises:
        ConfigurationError: the module cannot be run as it is deployed, or its step gives the network something else.
    """
    evaluator = make_evaluator(trainer, model, task)
    first = next((source for sources in splits for source in sources), None)
    if first is None:
        return evaluator, tuple(list(sources) for sources in splits)
    raw = first.first_batch()
    adapter = deployed_adapter(model, evaluator, first.adapter, raw)
    found = tuple([replace(source, adapter=adapter) for source in sources] for sources in splits)
    evaluator = replace(evaluator, called=called_layers(model, evaluator, adapter, raw))
    _check_own_step(trainer, model, evaluator, found[0])
    return evaluator, found


def _check_own_step(
    trainer: Trainer, model: LightningModule, evaluator: Evaluator, known: Sequence[LoaderSource]
) -> None:
    """Compares a module's own step with our evaluation, in evaluation mode on the first batch of known data.

    The step is `validation_step`, where that is missing or does not call the last layer `training_step`. It runs
    without gradients and logs nothing; weights, buffers, metrics and the random state are as found afterwards. An
    augmentation at random is told from other inputs: steps with several seeds lie as far from each other as from ours.

    Raises:
        ConfigurationError: the step gives the network something else.

    Warns:
        DataWarning: the same, where an adapter runs the module itself, which is then right; or only losses could be
            compared, and ours is far above.
    """
    if not known or evaluator.called is None:
        return
    names = evaluator.called
    layer = model.get_submodule(names[-1]) if names else None
    for step, source in (("validation_step", known[-1]), ("training_step", known[0])):
        if not overrides(model, step) or (step == "training_step" and not model.automatic_optimization):
            continue
        adapter, raw = source.adapter, source.first_batch()
        args, kwargs, target = adapter(raw)
        try:
            with _listening(model, layer) as ours, evaluator.context():
                logits = evaluator.task.logits(run_model(model, args, kwargs))
                evaluator.task.check(logits, target)
                loss = float(evaluator.task.loss(logits, target).mean())
        except Exception:
            return  # what does not fit is said when the model is evaluated
        own = _run_step(trainer, model, evaluator, layer, step, source, seed=0)
        if own is None:
            continue
        apart = min(_distances(own.calls, ours), default=math.nan)
        if apart <= LAYER_TOLERANCE:
            return
        losses = f"the loss of its own step is {own.loss:.3g}, ours {loss:.3g}"
        if math.isnan(apart):
            if loss > LOSS_FACTOR * own.loss + LOSS_OFFSET and not isinstance(adapter, ModelAdapter):
                found = f"`model`: `{step}` may not predict as the repair does: {losses} on the same batch"
                rank_zero_warn(DataWarning(f"{found}.", "if so, " + ADAPTER_HINT))
                return
            continue
        if _is_augmented(apart, own, ours, trainer, model, evaluator, layer, step, source):
            return
        found = (
            f"`model`: `{step}` gives the layer {names[-1]!r} other inputs than the prediction that would be repaired "
            f"(relative distance {apart:.2g}); {losses} on the same batch"
        )
        if not isinstance(adapter, ModelAdapter):
            hint = "do in `forward` all that the step does to a batch, or " + ADAPTER_HINT
            raise ConfigurationError(f"{found}.", hint)
        rank_zero_warn(DataWarning(f"{found}.", "make sure that the adapter gives what is deployed."))
        return


def _is_augmented(apart: float, own: _StepResult, ours: Calls, *step: Any) -> bool:
    """Whether the step's inputs differ from ours no more than from seed to seed."""
    runs = [own.calls]
    for seed in range(1, SEEDS_OF_AUGMENTATION):
        again = _run_step(*step, seed=seed)
        if again is None:
            return True
        runs.append(again.calls)
    from_ours = [min(_distances(run, ours), default=math.inf) for run in runs]
    spread = [min(_distances(a, b), default=0.0) for a, b in combinations(runs, 2)]
    return sum(from_ours) / len(from_ours) <= SPREAD_FACTOR * sum(spread) / len(spread)


def _run_step(
    trainer: Trainer,
    model: LightningModule,
    evaluator: Evaluator,
    layer: nn.Module | None,
    step: str,
    source: LoaderSource,
    *,
    seed: int,
) -> _StepResult | None:
    """What a step does, None where it cannot be run at this time."""
    raw = source.first_batch()
    method = getattr(model, step)
    with ExitStack() as stack:
        stack.enter_context(untracked(trainer))
        for part in model.modules():
            if isinstance(part, LightningModule):
                stack.enter_context(replaced(part, log=nothing, log_dict=nothing))
        stack.enter_context(attributes_kept(model))
        calls = stack.enter_context(_listening(model, layer))
        seed_all(seed)
        try:
            with evaluator.context():
                found = method(raw, 0)
        except Exception:
            return None
    loss = found.get("loss") if isinstance(found, Mapping) else found
    return _StepResult(calls, float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else math.nan)


@contextmanager
def _listening(model: nn.Module, layer: nn.Module | None) -> Iterator[Calls]:
    """Inside, the model is in evaluation mode without gradients, and the calls of a layer are noted."""
    calls: Calls = []

    def note(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append((args[0].detach().float().clone(), output.detach().float().clone()))

    layers = {} if layer is None else {"": layer}
    with preserve(model), torch.no_grad(), force_eager(), hooked(layers, note):
        seed_all(0)
        yield calls


def _distance(x: Tensor, y: Tensor) -> float:
    """Relative to the smaller one, so that it is large whichever of the two is scaled down."""
    return float((x - y).norm() / torch.minimum(x.norm(), y.norm()).clamp_min(1e-12))


def _distances(calls: Calls, others: Calls) -> Iterator[float]:
    """How far apart each call of one list and each of the other are, relative to size; none where shapes differ."""
    for a in calls:
        for b in others:
            # A step may put several views of a batch side by side.
            parts = zip(*(x.split(len(y)) for x, y in zip(a, b, strict=True) if len(y)), strict=False)
            for part in parts:
                if all(x.shape == y.shape for x, y in zip(part, b, strict=True)):
                    yield max(_distance(x, y) for x, y in zip(part, b, strict=True))
