"""Finds how a module predicts when it is deployed, and compares its own steps with this prediction."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import overrides
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.step_outputs import forward_hooks
from lightning_nrl._trainer.trainer_state import make_evaluator, untracked
from lightning_nrl._utils.preserve import preserve_attributes, preserve_state, seed_all
from lightning_nrl.data.adapters import ADAPTER_HINT, ModelAdapter
from lightning_nrl.data.batch import Adapter, ModelCall, Unpacked, run_model, tensors_in
from lightning_nrl.errors import ConfigurationError, DataWarning, first_line
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layer_gradients import OutputProbe
from lightning_nrl.evaluation.layers import force_eager, layers_of
from lightning_nrl.tasks import Task, class_logits

SAME_OUTPUT_TOLERANCE = (
    1e-3  # largest difference of outputs that count as equal, relative to the largest output
)
FEWEST_PROBABILITIES = 8  # number of samples; fewer logits may all lie between 0 and 1 by chance
LAYER_TOLERANCE = (
    1e-3  # largest relative distance at which two inputs or outputs of a layer count as equal
)
SEEDS_OF_AUGMENTATION = 4  # number of runs of a step with different seeds, to see if it augments
SPREAD_FACTOR = 3.0  # augmentation explains a distance to our inputs up to this multiple of that between two runs
LOSS_FACTOR, LOSS_OFFSET = (
    2.0,
    0.5,
)  # our loss is suspicious above factor * loss of the step + offset
OUTPUT_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x.roll(1, 0), lambda x: 0.5 * x)
"""Changes of a layer's output that show whether logits depend on it. Both keep typical values,
since a
NaN that becomes an index would crash a GPU."""

Calls = list[tuple[Tensor, Tensor]]
"""Input and output of a layer in each of its calls."""


def open_sources(
    trainer: Trainer, model: LightningModule, task: Task, *splits: Sequence[LoaderSource]
) -> tuple[Evaluator, tuple[list[LoaderSource], ...]]:
    """Returns an evaluator, and the sources in `splits` with adapters that predict as the deployed
    module does.

    The first batch of the first source decides if `predict_step` or `forward` predicts, and which
    layers are called (`Evaluator.called`). On the sources in `splits[0]`, the module's own steps
    are compared with the prediction.
    """
    evaluator = make_evaluator(trainer, model, task)
    ranks = evaluator.collective
    first = next((source for sources in splits for source in sources), None)
    if first is None:
        return evaluator, tuple(list(sources) for sources in splits)
    failed = "the prediction could not be tried on another rank."
    raw = ranks.all_or_none(first.first_batch, failed)

    def by_first_rank(choice: Any) -> Any:
        return json.loads(ranks.first_bytes(json.dumps(choice).encode()))

    # The prediction may fail or differ on a single rank, so the first rank chooses adapter and
    # layers for all.
    choose = partial(choose_prediction, model, evaluator, first.adapter, raw)
    adapter, chosen = first.adapter, by_first_rank(ranks.all_or_none(choose, failed))
    if chosen is not None:
        adapter = partial(_adapt_raw, PredictStep(adapter, evaluator.task, *chosen), adapter)
    found = tuple([replace(source, adapter=adapter) for source in sources] for sources in splits)
    evaluator = replace(
        evaluator, called=by_first_rank(called_layers(model, evaluator, adapter, raw))
    )

    def check() -> None:
        if not _is_random(model, evaluator, adapter, raw):
            return _check_step(trainer, model, evaluator, found[0])
        problem = "`model`: its predictions are random in evaluation mode, for instance by dropout that stays on."
        hint = (
            "all counts hold for one fixed draw; draw only `if self.training`, or " + ADAPTER_HINT
        )
        return rank_zero_warn(DataWarning(problem, hint))

    ranks.all_or_none(check, failed)
    return evaluator, found


@torch.no_grad()
def _is_random(model: nn.Module, evaluator: Evaluator, adapter: Adapter, raw: Any) -> bool:
    args, kwargs, target = adapter(raw)
    found = []
    with suppress(Exception):
        for seed in (0, 1):
            with _evaluation_context(model, evaluator):
                seed_all(seed)
                logits = _logits(evaluator.task, run_model(model, args, kwargs), target)
                found += [] if logits is None else [logits.nan_to_num()]
    return len(found) == 2 and not _is_close(*found)


@dataclass(frozen=True)
class PredictStep(ModelCall):
    """Prediction by a module's own `predict_step`, or by its `forward` if it has none."""

    adapter: Adapter  # separates inputs from targets
    task: Task
    on_inputs: bool = False  # True: `predict_step` takes the inputs without targets
    gives_probabilities: bool = (
        False  # True: `predict_step` returns probabilities, to be converted to logits
    )

    def __call__(self, model: nn.Module, raw: Any) -> Any:
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
        if probabilities.shape[1] == 1:
            return probabilities.logit(torch.finfo(probabilities.dtype).eps)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def _adapt_raw(call: ModelCall, adapter: Adapter, raw: Any) -> Unpacked:
    return (call, raw), {}, adapter(raw)[2]


@torch.no_grad()
def choose_prediction(
    model: LightningModule, evaluator: Evaluator, adapter: Adapter, raw: Any
) -> tuple[bool, bool] | None:
    """Returns the fields `on_inputs` and `gives_probabilities` for a `PredictStep`, or None to
    predict
    by `forward`.

    `forward` is chosen if it predicts the same as `predict_step`, or if `predict_step` is missing
    or fails. If the adapter runs the module itself, the result is None, and the adapter predicts.
    """
    if isinstance(adapter, ModelAdapter):
        return None
    task, name = evaluator.task, type(model).__name__
    args, kwargs, target = adapter(raw)

    def result_or_error(call: Callable[[], Any]) -> Any:
        try:
            with _evaluation_context(model, evaluator):
                return call()
        except Exception as error:
            return error

    forward = result_or_error(partial(run_model, model, args, kwargs))
    if not overrides(model, "predict_step"):
        if isinstance(forward, NotImplementedError) and 'required "forward"' in str(forward):
            problem = f"`model`: {name} has no `forward` and no `predict_step`, so it is not known what it predicts."
            raise ConfigurationError(problem, ADAPTER_HINT) from forward
        return None  # the evaluation reports any other problem
    calls = [PredictStep(adapter, task, on_inputs) for on_inputs in (False, True)[: 1 + bool(args)]]
    results = ((call, result_or_error(partial(call, model, raw))) for call in calls)
    call, output = next(
        ((c, found) for c, found in results if not isinstance(found, Exception)), (None, None)
    )
    logits = None if isinstance(forward, Exception) else _logits(task, forward, target)
    if call is None:
        if isinstance(forward, Exception):
            found = f"{type(forward).__name__}: {first_line(forward)}"
            problem = f"`model`: {name} can run neither `predict_step` nor `forward` ({found})."
            raise ConfigurationError(problem, ADAPTER_HINT) from forward
        _warn("raises an error on these batches")
        return None
    own = _logits(task, output, target)
    if own is None:
        kind = (
            f"{output.dtype} {list(output.shape)}"
            if isinstance(output, Tensor)
            else type(output).__name__
        )
        if logits is None or not _predicts_same(output, task.prediction(logits)):
            problem = f"`predict_step` of {name} returns {kind}, no logits, and `forward` does not predict the same."
            raise ConfigurationError(f"`model`: {problem}", ADAPTER_HINT)
        _warn(f"returns {kind}, no logits")
        return None
    probable = _are_probabilities(own, task)
    if logits is not None and logits.shape == own.shape:
        same = (
            (logits, class_logits(logits).softmax(1)[:, -logits.shape[1] :])
            if probable
            else (logits,)
        )
        if any(_is_close(x, own) for x in same):
            return None
    _check_gradients(model, evaluator, replace(call, gives_probabilities=probable), raw)
    return call.on_inputs, probable


def _logits(task: Task, output: Any, target: Any) -> Tensor | None:
    try:
        logits = task.logits(output)
        task.check(logits, target)
        passed, loss = task.passed(logits, target), task.loss(logits, target)
    except Exception:
        return None
    return (
        logits
        if logits.is_floating_point() and passed.shape == loss.shape == (len(logits),)
        else None
    )


def _is_close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= SAME_OUTPUT_TOLERANCE * b.abs().max())


def _are_probabilities(x: Tensor, task: Task) -> bool:
    x = x.float()
    if x.shape[1:] == (1,) and task.prediction(x) is not None:
        return len(x) >= FEWEST_PROBABILITIES and bool(((x >= 0) & (x <= 1)).all())
    return x.ndim > 1 and bool((x >= 0).all()) and bool(((x.sum(1) - 1).abs() < 1e-2).all())


def _predicts_same(output: Any, prediction: Tensor | None) -> bool:
    found = [
        x for x in tensors_in(output) if prediction is not None and x.shape == prediction.shape
    ]
    return any(torch.equal(x.to(prediction), prediction) for x in found if prediction is not None)


def _warn(problem: str) -> None:
    text = f"`model`: its `predict_step` {problem}, so `forward` is used instead"
    rank_zero_warn(DataWarning(f"{text}.", "to have other outputs judged, " + ADAPTER_HINT))


def _check_gradients(model: nn.Module, evaluator: Evaluator, call: PredictStep, raw: Any) -> None:
    with _evaluation_context(model, evaluator):
        called = _call_order(model, partial(call, model, raw))
        layers = layers_of(model)
        probe = OutputProbe({name: layers[name] for name in called[-1:]})
        with torch.enable_grad(), probe.hooked():
            reached = evaluator.task.logits(call(model, raw)).requires_grad
    if called and not reached:
        raise ConfigurationError(
            "`model`: no gradients come through `predict_step` (`torch.no_grad` or `inference_mode` around it), and "
            "`forward` predicts something else.",
            "remove it, since the trainer predicts without gradients anyway; or " + ADAPTER_HINT,
        )


@contextmanager
def _evaluation_context(model: nn.Module, evaluator: Evaluator) -> Iterator[None]:
    with preserve_state(model), evaluator.context(), force_eager():
        seed_all(0)
        yield


@torch.no_grad()
def called_layers(
    model: nn.Module, evaluator: Evaluator, adapter: Adapter, raw: Any
) -> list[str] | None:
    """Returns the names of the layers that the prediction calls, sorted by last call. On an error,
    returns None.

    Omits Linear layers at the end that do not affect the logits, such as a second head.
    """
    args, kwargs, _ = adapter(raw)
    run = partial(run_model, model, args, kwargs)
    try:
        with _evaluation_context(model, evaluator):
            called = _call_order(model, run)
    except Exception:
        return None
    linear = {
        name: x
        for name, x in layers_of(model).items()
        if isinstance(x, nn.Linear) and name in called
    }
    if len(linear) > 1:
        with _evaluation_context(model, evaluator):
            idle = _unused_last_layers(
                linear, partial(_logits_after_change, model, lambda: evaluator.task.logits(run()))
            )
        called = [name for name in called if name not in idle]
    return called


def _call_order(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    calls: list[str] = []
    with forward_hooks(layers_of(model), lambda name, args, output: calls.append(name)):
        run()
    return list(dict.fromkeys(reversed(calls)))[::-1]


def _unused_last_layers(
    linear: dict[str, nn.Linear], run: Callable[..., Tensor | None]
) -> set[str]:
    logits = run()
    needed, idle = set[str](), set[str]()
    # `layer="auto"` takes the last layer that is not frozen, other choices take the last layer: try
    # both orders.
    for order in (list(linear), sorted(linear, key=lambda name: linear[name].weight.requires_grad)):
        left = [name for name in order if name not in idle]
        while logits is not None and len(left) > 1 and left[-1] not in needed:
            found = [run(linear[left[-1]], change) for change in OUTPUT_CHANGES]
            if all(
                x is not None and x.shape == logits.shape and torch.allclose(x, logits)
                for x in found
            ):
                idle.add(left.pop())
            else:
                needed.add(left[-1])
    return idle


def _logits_after_change(
    model: nn.Module,
    run: Callable[[], Tensor],
    layer: nn.Module | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    layers = {} if layer is None else {"": layer}
    with (
        preserve_attributes(model),
        forward_hooks(layers, lambda name, args, output: change and change(output)),
    ):
        seed_all(0)
        try:
            return run().clone()  # a model may reuse the memory of its outputs
        except Exception:
            return None


def _check_step(
    trainer: Trainer, model: LightningModule, evaluator: Evaluator, known: Sequence[LoaderSource]
) -> None:
    """Refuses a module whose own step, on a known batch, gives the last layer other inputs than the
    prediction does.

    The step is `validation_step`, or `training_step` if `validation_step` is missing or does not
    call the last layer. If the adapter runs the module itself, the module is not refused, but a
    warning is shown.
    """
    if not known or evaluator.called is None:
        return
    name = evaluator.called[-1] if evaluator.called else None
    layers = {} if name is None else {name: model.get_submodule(name)}
    for step, source in (("validation_step", known[-1]), ("training_step", known[0])):
        if not overrides(model, step) or (
            step == "training_step" and not model.automatic_optimization
        ):
            continue
        is_model_adapter = isinstance(source.adapter, ModelAdapter)
        args, kwargs, target = source.adapter(source.first_batch())
        try:
            with _recording(model, evaluator, layers) as ours:
                logits = evaluator.task.logits(run_model(model, args, kwargs))
                evaluator.task.check(logits, target)
                loss = float(evaluator.task.loss(logits, target).mean())
        except Exception:
            return  # the evaluation reports the error
        run = partial(_run_step, trainer, model, evaluator, layers, step, source)
        own = run(seed=0)
        if own is None:
            continue
        calls, own_loss = own
        apart = min(_distances(calls, ours), default=math.nan)
        if apart <= LAYER_TOLERANCE:
            return
        losses = f"the loss of its own step is {own_loss:.3g}, that of the prediction {loss:.3g} on the same batch"
        if math.isnan(apart):
            if loss > LOSS_FACTOR * own_loss + LOSS_OFFSET and not is_model_adapter:
                found = f"`model`: `{step}` may not predict as the repair does: {losses}"
                rank_zero_warn(DataWarning(f"{found}.", "if so, " + ADAPTER_HINT))
                return
            continue
        if _is_augmented(calls, ours, run):
            return
        found = (
            f"`model`: `{step}` gives the layer {name!r} other inputs than the prediction that would be repaired "
            f"(relative distance {apart:.2g}); {losses}"
        )
        if not is_model_adapter:
            hint = "move what the step does to a batch into `forward`, or " + ADAPTER_HINT
            raise ConfigurationError(f"{found}.", hint)
        rank_zero_warn(
            DataWarning(
                f"{found}.", "make sure that the adapter predicts as the deployed model does."
            )
        )
        return


def _is_augmented(own: Calls, ours: Calls, run: Callable[..., tuple[Calls, float] | None]) -> bool:
    # If the step augments, its inputs differ from the prediction's about as much as from its own
    # with another seed.
    runs = [own]
    for seed in range(1, SEEDS_OF_AUGMENTATION):
        again = run(seed=seed)
        if again is None:
            return True
        runs.append(again[0])
    from_ours = [min(_distances(one, ours), default=math.inf) for one in runs]
    spread = [min(_distances(a, b), default=0.0) for a, b in combinations(runs, 2)]
    return sum(from_ours) / len(from_ours) <= SPREAD_FACTOR * sum(spread) / len(spread)


def _run_step(
    trainer: Trainer,
    model: LightningModule,
    evaluator: Evaluator,
    layers: Mapping[str, nn.Module],
    step: str,
    source: LoaderSource,
    *,
    seed: int,
) -> tuple[Calls, float] | None:
    raw = source.first_batch()
    with (
        untracked(trainer),
        preserve_attributes(model),
        _recording(model, evaluator, layers) as calls,
    ):
        seed_all(seed)
        try:
            found = getattr(model, step)(raw, 0)
        except Exception:
            return None
    loss = found.get("loss") if isinstance(found, Mapping) else found
    return calls, float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else math.nan


@contextmanager
def _recording(
    model: nn.Module, evaluator: Evaluator, layers: Mapping[str, nn.Module]
) -> Iterator[Calls]:
    calls: Calls = []

    def note(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append((args[0].detach().float().clone(), output.detach().float().clone()))

    with _evaluation_context(model, evaluator), torch.no_grad(), forward_hooks(layers, note):
        yield calls


def _distances(calls: Calls, others: Calls) -> Iterator[float]:
    # Relative to the smaller norm, so that a distance is large whichever of the two tensors is
    # scaled.
    for a in calls:
        for b in others:
            # A step may concatenate several views of a batch.
            parts = zip(
                *(x.split(len(y)) for x, y in zip(a, b, strict=True) if len(y)), strict=False
            )
            for part in parts:
                pairs = list(zip(part, b, strict=True))
                if all(x.shape == y.shape for x, y in pairs):
                    size = [torch.minimum(x.norm(), y.norm()).clamp_min(1e-12) for x, y in pairs]
                    yield max(
                        float((x - y).norm() / n) for (x, y), n in zip(pairs, size, strict=True)
                    )
