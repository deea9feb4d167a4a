"""Shows by a module's own steps that the output to be counted is what it predicts with.

A step passes its scores to losses, to metrics, and to functions such as `softmax` and `argmax`.
Scores that rank the classes of each sample as our logits do prove the logits; other scores that are
compared with our labels contradict them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from lightning_nrl._trainer.lightning.packages import Trainer, rank_zero_warn
from lightning_nrl._utils.preserve import replaced
from lightning_nrl.data.adapters import (
    ADAPTER_HINT,
    adapter_hint,
    is_default,
    outputs_in,
    paths_in,
)
from lightning_nrl.data.batch import Adapter, Args, BatchTarget, ModelOutput, RawBatch, tensors_in
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.tasks import (
    Custom,
    Multiclass,
    Multilabel,
    NamedHead,
    Ordinal,
    Task,
    class_logits,
)
from lightning_nrl.tasks import Sequence as TokenTask
from lightning_nrl.tasks.elements import ElementsTask

LOSSES = {
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
}
"""Functions of torch that compare scores with a target."""
OF_CLASSES = {"cross_entropy", "multi_margin_loss", "nll_loss"}
"""Losses that have the classes in dimension 1."""
DECISIONS = {"argmax", "log_softmax", "logsigmoid", "sigmoid", "softmax", "topk"}
"""Functions of torch that turn scores into classes or probabilities."""
TAKE_LOGITS = {"binary_cross_entropy_with_logits", "logsigmoid", "sigmoid"}
"""Functions that take logits, never probabilities."""
ASKED_TASKS = (Multiclass, Multilabel, Ordinal, ElementsTask)
"""Tasks for which any tensor of the right shape gives a plausible count of right samples."""
# Largest difference of outputs that count as equal, wide enough for half precision: relative to the
# largest value, or to the spread of a row.
COMPARED_TOLERANCE = 1e-2
FEWEST_PROBABILITIES = 8  # fewer logits may all lie between 0 and 1 by chance


class ScoreUse(NamedTuple):
    """Scores that a step uses, and what it compares them with, if anything."""

    scores: Tensor
    target: Tensor | None
    function: str  # its name in torch, or the class of a metric
    class_dim: int | None = None  # dimension of the classes, if the function says which it is


class Prediction(NamedTuple):
    """A model's output for a batch, its logits if it has any, and what the adapter found."""

    raw: RawBatch
    args: Args
    target: BatchTarget
    output: ModelOutput
    logits: Tensor | None


class _FunctionRecorder(TorchFunctionMode):
    def __init__(self, n_scores: int) -> None:
        super().__init__()
        self.n_scores = n_scores
        self.uses: list[ScoreUse] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        arguments = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        values = (*args, *arguments.values())
        scores = next((value for value in values if isinstance(value, Tensor)), None)
        if scores is not None and name in LOSSES:
            target = args[1] if len(args) > 1 else arguments["target"]
            class_dim = 1 if name in OF_CLASSES else None
            self.uses.append(ScoreUse(scores.detach(), target.detach(), name, class_dim))
        # Others, such as attention weights, are left out.
        if scores is not None and name in DECISIONS and scores.numel() == self.n_scores:
            class_dim = args[1] if len(args) > 1 else arguments.get("dim")
            self.uses.append(ScoreUse(scores.detach(), None, name, class_dim))
        return func(*args, **arguments)


@contextmanager
def recorded_uses(model: nn.Module, n_scores: int) -> Iterator[list[ScoreUse]]:
    """Records what the losses, metrics and decisions in a block take.

    Decisions on other than `n_scores` numbers are left out.
    """
    with ExitStack() as stack:
        recorder = stack.enter_context(_FunctionRecorder(n_scores))

        def update(
            metric: Metric, own_update: Callable[..., object], *args: Any, **kwargs: Any
        ) -> None:
            named = dict(zip(("preds", "target"), args, strict=False)) | kwargs
            preds, target = named.get("preds"), named.get("target")
            if isinstance(preds, Tensor) and isinstance(target, Tensor):
                name = type(metric).__name__
                recorder.uses.append(ScoreUse(preds.detach(), target.detach(), name))
            own_update(*args, **kwargs)

        for module in model.modules():
            if isinstance(module, Metric):
                recording = partial(update, module, module.update)
                stack.enter_context(replaced(module, update=recording))
        yield recorder.uses


@dataclass(frozen=True)
class Evidence:
    """What a step shows about our logits.

    Attributes:
        is_proven: a loss or metric compares them with our labels.
        is_used: they get into a loss or a decision, or the accuracy that is logged is ours.
        is_of_batch: this holds for our prediction of the batch, not only for a changed batch.
        are_probabilities: they are probabilities of labels, whose logits are to be counted; None if
            no function that takes either gets them.
        contradiction: the error if other scores are compared with our labels.
    """

    is_proven: bool = False
    is_used: bool = False
    is_of_batch: bool = False
    are_probabilities: bool | None = None
    contradiction: ConfigurationError | None = None


def weigh(
    step: str,
    uses: Iterable[ScoreUse],
    logits_in_step: Sequence[Tensor],
    prediction: Prediction,
    task: Task,
    adapter: Adapter,
) -> Evidence:
    """Weighs the uses in a step, in which the model returned `logits_in_step`.

    Raises a `ConfigurationError` if a loss compares our logits with another part of the batch.
    Labels of the user's own adapter stay.
    """
    labels = list(tensors_in(prediction.target))
    is_proven = is_used = is_of_batch = False
    are_probabilities = None
    contradiction = other_decision = None
    other_targets = []
    for use in uses:
        target = use.target
        is_labelled = target is not None and any(_is_same(target, label) for label in labels)
        ours = prediction.logits
        matches_batch = ours is not None and agrees(use, ours, task)
        matching = [logits for logits in logits_in_step if agrees(use, logits, task)]
        if matches_batch or matching:
            is_used = True
            is_proven = is_proven or is_labelled
            is_of_batch = is_of_batch or matches_batch
            for logits in (ours, *matching):
                if are_probabilities is None and logits is not None:
                    are_probabilities = _takes_probabilities(use, logits, task)
            if target is not None and not is_labelled:
                other_targets.append(_path_of(target, prediction.raw))
        elif is_labelled and contradiction is None and _may_contradict(use, ours, task):
            contradiction = _contradiction(step, use, prediction, task)
        elif target is None and ours is not None and use.scores.shape == ours.shape:
            other_decision = _contradiction(step, use, prediction, task)
    if is_default(adapter) and not is_proven:
        for path in filter(None, other_targets):
            raise ConfigurationError(
                f"`adapter`: your loss (in `{step}`) compares the output with `{path}`, and the "
                "repair would take other labels.",
                adapter_hint(prediction.raw, labels=path, args=prediction.args),
            )
    if contradiction is None and not is_used and step != "training_step":
        contradiction = other_decision  # as of a prediction by sliding windows
    return Evidence(is_proven, is_used, is_of_batch, are_probabilities, contradiction)


def decide(
    evidence: Sequence[Evidence],
    prediction: Prediction,
    task: Task,
    split: str,
    *,
    has_adapter: bool,
) -> None:
    """Refuses logits that the evidence contradicts, and asks if there is none.

    Outputs that the user names are not refused. If an adapter makes the prediction (`has_adapter`),
    a contradiction is only a warning. `split` is that of the prediction.
    """
    if isinstance(task, (Custom, NamedHead)) or any(of_step.is_proven for of_step in evidence):
        return
    for contradiction in filter(None, [of_step.contradiction for of_step in evidence]):
        if not has_adapter:
            raise contradiction
        hint = "make sure that the adapter predicts as the deployed model does."
        rank_zero_warn(DataWarning(contradiction.problem, hint))
        return
    if (
        has_adapter
        or any(of_step.is_used for of_step in evidence)
        or not isinstance(task, ASKED_TASKS)
    ):
        return
    logits = prediction.logits
    try:
        assert logits is not None
        task.check(logits, prediction.target)
        n_right = int(task.right(logits, prediction.target).sum())
    except Exception:
        return  # the evaluation reports the error
    raise _question(prediction, task, f"{n_right} of the first {len(logits)} samples of `{split}`")


def logged_accuracies(trainer: Trainer, split: str) -> dict[str, float]:
    """Returns the accuracies that the module logged for a split, such as `val_acc`, by name."""
    logged = {}
    for name, value in trainer.callback_metrics.items():
        is_accuracy = "acc" in name.lower() and "top" not in name.lower()
        if name.lower().startswith(split) and is_accuracy:
            logged[name] = float(value)
    return logged


def _question(prediction: Prediction, task: Task, share: str) -> ConfigurationError:
    fitting = []
    for name, x in outputs_in(prediction.output).items():
        with suppress(Exception):
            task.check(task.logits(x), prediction.target)
            fitting.append(f"{name!r}, {list(x.shape)}")
    problem = "`output`: no loss, metric, `softmax` or `argmax` in your steps was seen to take "
    if len(fitting) > 1:
        problem += f"one of the outputs that may be the logits ({'; '.join(fitting)})."
        answer = "write `output=` with the one that has the logits, for instance `output=1`"
    else:
        assert prediction.logits is not None
        problem += (
            f"the output {list(prediction.logits.shape)}. By the largest logit, {share} are right."
        )
        answer = "if that is what the module predicts with, write `output='logits'`"
    way_out = ADAPTER_HINT
    if isinstance(task, ElementsTask):
        # Logits would lead back to the same counts.
        way_out = (
            "if a decoder chooses the classes, such as that of a CRF, pass `adapter=f` with "
            "f(module, batch) that returns (F.one_hot(classes, n_classes).float(), labels): "
            "gates and metrics count them, a repair cannot train them."
        )
    return ConfigurationError(
        problem, f"{answer} (`data=DataOptions(output=...)` in a repair); if not, {way_out}"
    )


def _may_contradict(use: ScoreUse, logits: Tensor | None, task: Task) -> bool:
    if logits is not None:
        try:
            task.prediction(logits)
        except ConfigurationError:
            return False  # the evaluation reports the wrong shape
    # Metrics may take scores of one class; only classes are sure to be the prediction.
    return use.function in LOSSES or not use.scores.is_floating_point()


def _contradiction(
    step: str, use: ScoreUse, prediction: Prediction, task: Task
) -> ConfigurationError:
    scores, logits = use.scores, prediction.logits
    shape = list(scores.shape)
    labels = [_path_of(label, prediction.raw) for label in tensors_in(prediction.target)]
    chosen = "no output" if logits is None else f"an output {list(logits.shape)}"
    problem = f"and the repair would take {chosen} for the logits."
    if use.target is not None:
        problem = f"with `{', '.join(labels)}`, {problem}"
    for name, x in outputs_in(prediction.output).items():
        if agrees(use, x, task):
            return ConfigurationError(
                f"`output`: your loss (in `{step}`) compares output {name!r}, {shape}, {problem}",
                f"write `output={name!r}` (`data=DataOptions(output={name!r})` in a repair), "
                "or name the output that is the prediction.",
            )
    hint = ADAPTER_HINT
    verb = "takes" if use.target is None else "compares"
    subject = f"your `{use.function}` (in `{step}`) {verb} {shape}, which"
    if logits is not None and agrees(use, -logits, task):
        subject += " ranks the classes the other way round than the output does,"
        hint = hint.replace("module.net(x)", "-module(x)")
    else:
        subject += " is no output,"
    if logits is not None and isinstance(task, TokenTask):
        other_dim = replace(task, class_dim=-task.class_dim)
        if agrees(use, logits, other_dim):
            hint = f"write `task=Sequence(class_dim={other_dim.class_dim})`."
    return ConfigurationError(
        f"`model`: {subject} {problem}",
        f"{hint}\nIf the largest output is the prediction all the same, write `output='logits'`.",
    )


def _path_of(target: Tensor, raw: RawBatch) -> str:
    for path, part in paths_in(raw).items():
        if isinstance(part, Tensor) and _is_same(target, part):
            return path
    return ""


def agrees(use: ScoreUse, logits: Tensor, task: Task) -> bool:
    """True if scores rank the classes of each sample as the logits do.

    The logits may be probabilities. Scores of tasks without classes must be equal to the logits.
    """
    if isinstance(task, NamedHead):
        return agrees(use, logits, task.head_task)
    scores = use.scores
    if not scores.numel() or not logits.numel():
        return False
    try:
        ours = list(_rankings(logits, task))
    except ConfigurationError:
        return False  # of a wrong shape
    if not ours:
        return is_close(scores, logits)
    for ranking in ours:
        if not scores.is_floating_point():
            decided = _decided(ranking, logits, task)
            if decided.numel() == scores.numel() and bool((decided == scores.flatten()).all()):
                return True
            continue
        for form in _forms(use, ranking):
            if form.shape == ranking.shape and _same_order(form, ranking):
                return True
    return False


def _rankings(logits: Tensor, task: Task) -> Iterator[Tensor]:
    """Yields rows to rank, `N x C`; of labels or two classes, a vector with a threshold of 0.

    Raises a `ConfigurationError` if the task refuses the shape.
    """
    if isinstance(task, (Multilabel, Ordinal)):
        yield from _threshold_rows(logits)
    elif isinstance(task, ElementsTask):
        classes_first = task.classes_first(logits)
        yield from _class_rankings(logits, classes_first)
    elif isinstance(task, Multiclass):
        task.prediction(logits)
        yield from _class_rankings(logits, class_logits(logits))


def _class_rankings(logits: Tensor, classes_first: Tensor) -> Iterator[Tensor]:
    n_classes = classes_first.shape[1]
    if n_classes > 2:
        yield classes_first.movedim(1, -1).reshape(-1, n_classes).float()
    elif classes_first.numel() == logits.numel():
        yield _threshold_row(classes_first[:, 1] - classes_first[:, 0])
    else:
        yield from _threshold_rows(logits)


def _threshold_row(logits: Tensor) -> Tensor:
    return F.pad(logits.float().flatten(), (1, 0))


def _threshold_rows(scores: Tensor, function: str = "") -> Iterator[Tensor]:
    if function != "binary_cross_entropy":
        yield _threshold_row(scores)
    if function not in TAKE_LOGITS and ((scores >= 0) & (scores <= 1)).all():
        yield _threshold_row(scores.float().logit())


def _forms(use: ScoreUse, ranking: Tensor) -> Iterator[Tensor]:
    scores = use.scores
    has_classes = ranking.ndim == 2
    if not has_classes and scores.numel() == len(ranking) - 1:
        yield from _threshold_rows(scores, use.function)
        return
    n_classes = ranking.shape[1] if has_classes else 2
    dims = (1, -1) if use.class_dim is None else (use.class_dim,)
    for dim in dims:
        if scores.ndim > 1 and scores.shape[dim] == n_classes:
            rows = scores.movedim(dim, -1).reshape(-1, n_classes).float()
            yield rows if has_classes else _threshold_row(rows[:, 1] - rows[:, 0])


def _decided(ranking: Tensor, logits: Tensor, task: Task) -> Tensor:
    if isinstance(task, Ordinal):
        return task.prediction(ranking[1:].view(logits.shape))
    return ranking.argmax(1) if ranking.ndim == 2 else ranking[1:] > 0


def _same_order(x: Tensor, y: Tensor) -> bool:
    return _is_sorted(x.gather(-1, y.argsort(-1))) and _is_sorted(y.gather(-1, x.argsort(-1)))


def _is_sorted(rows: Tensor) -> bool:
    # Ties and rounding may change the order. Quartiles, since masked classes have huge logits.
    ranked = rows.sort(-1).values
    n = rows.shape[-1]
    spread = ranked[..., (3 * n) // 4] - ranked[..., n // 4]
    tolerance = COMPARED_TOLERANCE * spread.nan_to_num(posinf=0)
    drop = (rows.cummax(-1).values - rows).nan_to_num(nan=0)
    return bool((drop.amax(-1) <= tolerance).all())


def _takes_probabilities(use: ScoreUse, logits: Tensor, task: Task) -> bool | None:
    """True or False if scores show that the output has probabilities or logits of labels."""
    scores = use.scores
    if not has_labels(logits, task) or scores.numel() != logits.numel():
        return None
    if use.function in TAKE_LOGITS:
        return is_close(scores.sigmoid(), logits)
    if use.function == "binary_cross_entropy":
        return is_close(scores, logits)
    return None


def has_labels(logits: Tensor, task: Task) -> bool:
    """True if each logit is for a label of its own, present or not."""
    if isinstance(task, NamedHead):
        return has_labels(logits, task.head_task)
    if isinstance(task, (Multiclass, ElementsTask)):
        return logits.shape[1:2] in ((), (1,))
    return isinstance(task, (Multilabel, Ordinal))


def show_probabilities(evidence: Sequence[Evidence], prediction: Prediction, task: Task) -> bool:
    """True if the output has the probability of each label, by the evidence or by its range."""
    shown = [of_step.are_probabilities for of_step in evidence]
    logits = prediction.logits
    if any(shown) or False in shown or logits is None or not has_labels(logits, task):
        return any(shown)
    is_range = bool(((logits >= 0) & (logits <= 1)).all())
    return is_range and logits.numel() >= FEWEST_PROBABILITIES and not isinstance(task, NamedHead)


def is_close(x: Tensor, expected: Tensor, tolerance: float = COMPARED_TOLERANCE) -> bool:
    """True if all numbers are equal, within a tolerance relative to the largest."""
    if x.numel() != expected.numel():
        return False
    numbers = expected.float().flatten()
    distance = (x.float().flatten() - numbers).abs().max()
    return bool(distance <= tolerance * numbers.abs().max())


def _is_same(target: Tensor, labels: Tensor) -> bool:
    if not target.numel() or not labels.numel():
        return False
    if target.numel() != labels.numel():
        target, labels = _classes(target), _classes(labels)
    return torch.equal(target.flatten().double(), labels.flatten().double())


def _classes(labels: Tensor) -> Tensor:
    return labels.argmax(1) if labels.ndim == 2 else labels
