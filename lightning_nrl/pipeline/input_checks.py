"""Checks of settings and data before a method runs, and on a few samples before training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.formatting import plural
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.state import check_saved
from lightning_nrl.data.adapters import ADAPTER_HINT
from lightning_nrl.data.batch import Batch, RecordingSource, Source
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    EmptyLocalizationError,
    EvaluationError,
    InseparableBatchError,
    OtherRankError,
    ReplayError,
    UnusableSamplesError,
    check_kind,
)
from lightning_nrl.evaluation import DOUBTFUL, Evaluator, SampleResults
from lightning_nrl.evaluation.evaluator import check_needs
from lightning_nrl.evaluation.layers import ParameterSpace, find_scope, forbid_batch_statistics
from lightning_nrl.localization import KnownData
from lightning_nrl.methods import Method
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.search.scoring.recording import record
from lightning_nrl.tasks import NamedHead, Task
from lightning_nrl.updates.old_model import Reference, in_memory

# torch cannot concatenate them with other dtypes.
ODD_DTYPES = (torch.uint16, torch.uint32, torch.uint64)
MAX_LISTED_IDS = 10  # ids of samples in a message
# Averages over batches differ a little from the share of right samples, other measures do by more.
LOGGED_ACCURACY_TOLERANCE = 0.02
OTHER_ACCURACY = 0.1
FAR_BELOW_CHANCE = 0.25  # share of the samples that are right by chance
FEWEST_AT_CHANCE = 100  # samples; of fewer, a right model may see a part of the classes only


def given_or_default(settings: Settings | None) -> Settings:
    """Returns the settings, or the default ones. Raises a `ConfigurationError` for other types."""
    if settings is None:
        return Settings()
    example = "Settings(target=..., layer=...)"
    check_kind("settings", settings, isinstance(settings, Settings), "Settings", example)
    return settings


def check_sources(known: Sequence[Source], unseen: Sequence[Source], settings: Settings) -> None:
    """Raises a `ConfigurationError` unless both are lists of `Source` with proper names and marks.

    Split names must differ. A known source must be marked `failed`. If `n_passed` is set, one must
    be marked `passed`.
    """
    for argument, sources in (("known", known), ("unseen", unseen)):
        is_list = isinstance(sources, Sequence)
        if not is_list or not all(isinstance(source, Source) for source in sources):
            kind = type(sources).__name__
            raise ConfigurationError(
                f"`{argument}`: found a {kind}, not one list of `Source` objects.",
                f"write `{argument}=[TensorSource(inputs, targets, split=...)]`.",
            )
    names = [source.split for source in (*known, *unseen)]
    if len(set(names)) < len(names):
        raise ConfigurationError(
            f"the data have the splits {names}.", "give each split its own name."
        )
    if not any(source.failed for source in known):
        raise ConfigurationError(
            "`known`: no source is marked `failed`.", "mark the source that has the failures."
        )
    n_passed = settings.search.n_passed
    if n_passed is not None and not any(source.passed for source in known):
        raise ConfigurationError(
            f"`n_passed={n_passed}`: no known source is marked `passed`.",
            "mark the source to draw samples from, "
            "or leave `n_passed` out to score every known passed sample.",
        )


def check_limit(settings: Settings, calibrated: bool) -> None:
    """Raises a `ConfigurationError` if `limit` only counts the target or lacks calibration data."""
    limit = settings.limit
    if limit is None:
        return
    if limit.needs_target:
        raise ConfigurationError(
            f"`limit='{limit}'` must count more than the target.", "write `tolerance:1%`."
        )
    if not calibrated:
        raise ConfigurationError(
            f"`limit='{limit}'` needs calibration data, and there are none.",
            "give `calibration` data that the repair does not use, or leave `limit` out.",
        )


def check_task(settings: Settings, before: SampleResults, task: Task) -> None:
    """Raises a `ConfigurationError` if the task lacks margins or classes that are needed.

    The method or `set_aside` may need them.
    """
    check_needs(settings.needs, before, task)
    if settings.samples.set_aside == DOUBTFUL:
        hint = "set failures aside by a function of the batch, or leave `set_aside` out."
        check_needs(["classes"], before, task, f"`set_aside={DOUBTFUL!r}`", hint)


def check_losses(before: SampleResults) -> None:
    """Raises an `UnusableSamplesError` with the samples that have a NaN or infinite loss."""
    wrong = before.non_finite()
    if wrong:
        n = sum(map(len, wrong.values()))
        first = "; ".join(f"{split}: {ids[:MAX_LISTED_IDS]}" for split, ids in wrong.items())
        raise UnusableSamplesError(
            f"the model's loss is NaN or infinite on {n} known samples ({first}).",
            "check these inputs, or the training; a model that gives NaN cannot be repaired.",
            wrong,
        )


def warn_of_margins(before: SampleResults) -> None:
    """Warns of samples whose margin is not finite, unless the task has no margins."""
    n = int((~before.has_margin).sum())
    if n and before.has_margins:
        warnings.warn(
            DataWarning(
                f"no finite margin for {plural(n, 'known sample')}, as where logits are infinite.",
                "all samples are counted and must not break, but no step pushes these.",
            ),
            stacklevel=2,
        )


def check_classes(before: SampleResults, evaluator: Evaluator) -> None:
    """Refuses results that logits rarely give, unless it is proven or said what the logits are.

    These are results at chance that mostly name classes without labels, as features do, and results
    far below chance, as of distances. So are results that differ from `Evaluator.logged`.
    """
    for split, logged in evaluator.logged.items():
        if split in before.splits:
            rows = before.of(split)
            check_accuracy(evaluator.task, split, logged, before.passed[rows], before.label[rows])
    n = len(before)
    n_classes = int(before.label.max()) + 1 if n else 0
    if n < FEWEST_AT_CHANCE or n_classes < 2:
        return
    if evaluator.is_proven or isinstance(evaluator.task, NamedHead):
        return
    unknown = int((before.prediction >= n_classes).sum())
    right = int(before.passed.sum())
    problem = ""
    if unknown > n / 2 and right <= n / n_classes:
        problem = (
            f"it mostly predicts classes that no label has ({unknown:,} of {n:,} samples), and "
            f"{right:,} are right, no more than by chance"
        )
    elif evaluator.is_proven is False and right <= FAR_BELOW_CHANCE * n / n_classes:
        problem = f"only {right:,} of {n:,} samples are right, far fewer than by chance"
    if problem:
        raise ConfigurationError(
            f"`model`: {problem}. Its output may be features or distances, not logits.",
            "name another output by `output=`, write `output='logits'` if this one has the logits, "
            f"or {ADAPTER_HINT}",
        )


def check_accuracy(
    task: Task, split: str, logged: Mapping[str, float], right: Tensor, label: Tensor
) -> None:
    """Compares accuracies that the module logged for a split with the share of right samples.

    `right` and `label`, `n`, are ours for the same data. The mean over the classes counts, too. If
    both are far from what was logged, the model is refused; if the user has named the output, or
    the accuracies differ by little, a warning is shown.
    """
    if (label < 0).any() or not len(label):
        return
    shares = [right[label == of_class].double().mean() for of_class in label.unique()]
    counted = (float(right.double().mean()), float(torch.stack(shares).mean()))
    distances = {}
    for name, value in logged.items():
        share = value / 100 if value > 1 else value  # some log percent
        for accuracy in counted:
            distances[abs(share - accuracy)] = (name, share, accuracy)
    if not distances or min(distances) <= LOGGED_ACCURACY_TOLERANCE:
        return
    name, share, accuracy = distances[min(distances)]
    problem = (
        f"`{name}`: the module logged {share:.3f}, but by its output an accuracy of "
        f"{accuracy:.3f} was counted on the same `{split}` data."
    )
    hint = (
        "if both measure the same, name the logits by `output=` "
        f"(`data=DataOptions(output=...)` in a repair), or {ADAPTER_HINT}"
    )
    if min(distances) > OTHER_ACCURACY and not isinstance(task, NamedHead):
        raise ConfigurationError(problem, hint)
    warnings.warn(DataWarning(problem, hint), stacklevel=2)


def check_targets(before: SampleResults, settings: Settings) -> None:
    """Raises a `ConfigurationError` if no known sample fails in the target, or none passes."""
    hint = "give data with failures to repair and passed samples."
    if not before.passed.any():
        raise ConfigurationError(f"`known`: no sample passes ({settings.target}).", hint)
    if not before.targeted.any():
        problem = f"`known`: no sample fails in the target ({settings.target})."
        raise ConfigurationError(problem, hint)


def scope_of(settings: Settings, evaluator: Evaluator) -> tuple[ParameterSpace, tuple[str, ...]]:
    """Returns the layers to search and the parameters that may change, as `find_scope` does."""
    return find_scope(
        evaluator.model,
        settings.layer,
        include_bias=settings.localizer.include_bias,
        called=evaluator.called,
        trains=settings.trains,
    )


def run_sanity_check(
    evaluator: Evaluator,
    sources: Sequence[Source],
    settings: Settings,
    *,
    reference: Reference | None = None,
) -> None:
    """Runs the first stages of a repair on a few samples, to refuse settings before training.

    Evaluates all `sources`, and chooses weights to search with the first source. Leaves the model
    unchanged. Raises the errors that a repair would raise for an unsuitable layer, batch, target,
    task, method or reference.
    """
    model, method = evaluator.model, settings.method
    space, _ = scope_of(settings, evaluator)
    check_saved(model, space.parameters)
    with preserve_state(model):
        few = _evaluated(evaluator, sources, settings)
        if reference is not None:
            in_memory(reference).answers(evaluator, sources, few)
        check_task(settings, few, evaluator.task)
        if isinstance(method, Method):
            method.check(model)
        try:
            _check_recording(evaluator, sources, settings, few, space)
        except OtherRankError:
            raise
        except InseparableBatchError:
            # Only methods that need `recording` and tasks without margins need batches whose
            # samples can be separated.
            if "recording" in settings.needs or not few.has_margins:
                raise
        except ReplayError:
            # Further training does not need a layer whose output can be replaced.
            if settings.layer != "auto" or not settings.trains or not few.has_margins:
                raise
        except (EmptyLocalizationError, EvaluationError):
            return  # too few samples to judge


def _check_recording(
    evaluator: Evaluator,
    sources: Sequence[Source],
    settings: Settings,
    few: SampleResults,
    space: ParameterSpace,
) -> None:
    first = sources[0]
    all_or_none = evaluator.collective.all_or_none
    row = torch.arange(len(few))
    known = row < len(first.index)
    failed = known & (row % 2 == 0)
    batches = ((batch, few.rows(first.split, batch.position)) for batch in first)
    work = partial(record, evaluator, batches, space, known, budget=settings.search.memory_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = all_or_none(work, "known data could not be recorded on another rank.")
        if isinstance(settings.method, Method):
            check = partial(settings.method.check_recording, recording)
            all_or_none(check, "the method cannot be used on another rank.")
        localizer = settings.localizer.on(KnownData(evaluator, sources, few, space))
        localizer(recording, evaluator, failed=failed, passed=known & ~failed)


class _LastBatch(RecordingSource):
    batch: Batch | None = None

    def __init__(self, source: Source) -> None:
        super().__init__(source, self._keep, source.index[:0])

    def _keep(self, batch: Batch) -> Tensor:
        self.batch = batch
        return batch.position


def _evaluated(
    evaluator: Evaluator, sources: Sequence[Source], settings: Settings
) -> SampleResults:
    watched = [_LastBatch(source) for source in sources]
    with forbid_batch_statistics(evaluator.model):
        few, _ = settings.samples.columns().evaluate(evaluator, watched, settings.target)
    _check_one_form(watched)
    return few


def _check_one_form(watched: Sequence[_LastBatch]) -> None:
    """Raises if the labels of two splits cannot be in one batch.

    Such labels are class numbers and one-hot vectors, for instance.
    """
    forms = set[tuple[object, int]]()
    texts = []
    for source in watched:
        if source.batch is None or not isinstance(source.batch.target, Tensor):
            continue
        if source.passed or source.failed:
            target = source.batch.target
            kind: object = target.is_floating_point()
            if target.dtype in ODD_DTYPES:
                kind = target.dtype
            forms.add((kind, target.ndim))
            dtype = str(target.dtype).removeprefix("torch.")
            shape = ", ".join(["n", *map(str, target.shape[1:])])
            texts.append(f"{dtype} [{shape}] in `{source.split}`")
    if len(forms) > 1:
        raise ConfigurationError(
            f"the targets of the data have several forms: {', '.join(texts)}.",
            "give all targets the form that training uses.",
        )
