"""A repair in the middle of a fit: the trained module and its data as a trainer holds them, given to the core."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_nrl._trainer.continue_training import ContinuedTraining
from lightning_nrl._trainer.data_splits import DataRequest, SplitLoaders, describe_limits
from lightning_nrl._trainer.lightning.packages import LightningModule, ModelCheckpoint, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import batch_limit, callbacks_of, validating
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.prediction import open_sources
from lightning_nrl._trainer.progress_bar import RepairProgress
from lightning_nrl._trainer.random_transforms import report_stability
from lightning_nrl._trainer.sample_views import class_names, sample_views
from lightning_nrl._trainer.trainer_state import ASSUMED_EPOCHS
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.preserve import preserve, random_state
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import check_saved
from lightning_nrl.data.adapters import adapter_hint, describe
from lightning_nrl.data.batch import Batch, RecordingSource, Source
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    EmptyLocalizationError,
    EvaluationError,
    InseparableBatchError,
    OtherRankError,
    RepairError,
    ReplayError,
    UnusableSamplesError,
)
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.layers import find_scope, refusing_batch_statistics
from lightning_nrl.localization import Known, NeuRecoverLite, on_data
from lightning_nrl.methods.apricot import NO_CHECKPOINTS_HINT
from lightning_nrl.pipeline.input_checks import check_task
from lightning_nrl.pipeline.repair_module import Outcome, repair_module
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.search._scoring.recording import record
from lightning_nrl.tasks import Task
from lightning_nrl.updates.old_model import OldModel, Reference


def with_kept_checkpoints(settings: Settings, trainer: Trainer) -> Settings:
    """Settings whose method has what the trainer's `ModelCheckpoint` callbacks have kept, if it wants them."""
    method: Any = settings.method
    if not getattr(method, "wants_checkpoints", False):
        return settings
    paths = [path for callback in _callbacks(trainer) for path in sorted(callback.best_k_models)]
    return replace(settings, method=method.with_checkpoints(paths)) if paths else settings


def check_kept(settings: Settings, trainer: Trainer) -> None:
    """Refuses, before training, a method that wants checkpoints and will have none."""
    if getattr(settings.method, "wants_checkpoints", False) and not _callbacks(trainer):
        name = type(settings.method).__name__
        raise ConfigurationError(f"`{name}.checkpoints`: there will be none.", NO_CHECKPOINTS_HINT)


def _callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    """Those that keep the best ones."""
    found = [one for one in callbacks_of(trainer) if isinstance(one, ModelCheckpoint)]
    return [one for one in found if one.monitor is not None and one.save_top_k != 0]


ODD_DTYPES = (torch.uint16, torch.uint32, torch.uint64)
"""torch puts them into one tensor with no other dtype."""

PASSES_THAT_LEAVE_OUT = 6
"""Each names the unusable samples of one split, or those whose losses are not finite."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained module and its data, as they are inside a fit."""

    model: LightningModule
    known: list[LoaderSource]
    unseen: list[LoaderSource]
    calibration: list[LoaderSource]
    training: ContinuedTraining
    evaluator: Evaluator
    observer: RepairProgress | None = None
    notes: str = ""  # sentences on limits of batches, and on splits that draw at random, for the report

    def without(self, error: UnusableSamplesError) -> TrainedModel:
        """The same without the samples that an error names, which is warned of; raises it where these are too many."""
        data = {role: getattr(self, role) for role in ("known", "unseen", "calibration")}
        for role, sources in data.items():
            data[role] = [
                one.without(error.samples[one.split]) if error.samples.get(one.split) else one for one in sources
            ]
            if any(2 * len(new.index) < len(old.index) for new, old in zip(data[role], sources, strict=True)):
                raise error  # it is not about samples
        problem, _, hint = str(error).partition("\nHINT: ")
        rank_zero_warn(DataWarning(f"left out: {problem}", hint))
        notes = f"Left out: {problem} {self.notes}".rstrip()
        return replace(self, **data, training=replace(self.training, known=data["known"]), notes=notes)


@dataclass(frozen=True)
class TrainerRepair:
    """What a repair inside a trainer is: settings for the core, and how its data are found among the trainer's."""

    settings: Settings
    task: Task
    reference: Reference | None
    data: DataRequest
    left_out: tuple[type, ...]

    def check(self, trainer: Trainer, model: LightningModule) -> None:
        """A repair in small before training, on one batch of each split; warns if training could not go on for it."""
        settings = _sanity_settings(self.settings, trainer)
        check_kept(settings, trainer)
        with random_state(), validating(trainer):
            few = self._trained(trainer, model, ASSUMED_EPOCHS, limit=1, whole=False)
            sources = [*few.known, *few.unseen, *few.calibration]
            _check_recorded(settings=self.settings, trainer=trainer, known=few.known)
            run_sanity_check(few.evaluator, sources, settings, reference=self.reference)
            if self.reference is None and self.settings.layer == "auto" and self.settings.trains:
                few.training.warn()

    def run(
        self,
        trainer: Trainer,
        model: LightningModule,
        epochs: int,
        fit_seconds: float | None = None,
        work: ResumeStore | None = None,
    ) -> Outcome:
        """Searches a repair. The model, the trainer and the random state are left as found; see `opened`.

        The model was trained for so many epochs, which took so long; None where that is not known. `work` saves what is
        done.
        """
        with self.opened(trainer, model, epochs) as trained:
            for _ in range(PASSES_THAT_LEAVE_OUT):
                try:
                    outcome = self._repaired(trainer, trained, fit_seconds, work)
                    break
                except UnusableSamplesError as error:
                    trained = trained.without(error)
            else:
                outcome = self._repaired(trainer, trained, fit_seconds, work)
            reason = f"{outcome.report.reason} {trained.notes}".rstrip()
            names = class_names(trained.known)
            report = replace(outcome.report, reason=reason, class_names=names)
            sources = [*trained.known, *trained.unseen, *trained.calibration]
            views = sample_views(report, sources, self.data.known.renderer) if trainer.is_global_zero else ()
            return replace(outcome, report=report, views=views)

    def _repaired(
        self, trainer: Trainer, trained: TrainedModel, fit_seconds: float | None, work: ResumeStore | None
    ) -> Outcome:
        training = replace(trained.training, fit_seconds=fit_seconds, work=work or ResumeStore())
        return repair_module(
            trained.evaluator,
            trained.known,
            with_kept_checkpoints(with_history(self.settings, trainer), trainer),
            unseen=trained.unseen,
            calibration=trained.calibration,
            training=training,
            reference=self.reference,
            observer=trained.observer,
            work=work,
        )

    @contextmanager
    def opened(
        self, trainer: Trainer, model: LightningModule, epochs: int, *, whole: bool = False
    ) -> Iterator[TrainedModel]:
        """The model with all its data, in a `fast_dev_run` a few batches of them; random states stay as they are.

        Inside, the trainer says that it validates, and shows progress. `whole`: each rank reads all of the data.
        """
        with random_state(), validating(trainer), RepairProgress(trainer) as progress:
            found = self._trained(trainer, model, epochs, limit=batch_limit(trainer), whole=whole)
            randomness = report_stability([*found.known, *found.unseen, *found.calibration])
            notes = f"{describe_limits(trainer, found.known)} {randomness}".strip()
            yield replace(found, observer=progress, notes=notes)

    def _trained(
        self, trainer: Trainer, model: LightningModule, epochs: int, *, limit: int | None, whole: bool
    ) -> TrainedModel:
        loaders = SplitLoaders(trainer, model)
        how: dict[str, Any] = {"seed": self.settings.seed, "limit": limit, "whole": whole}
        known, unseen, calibration = self.data.sources(loaders, **how)
        evaluator, (known, unseen, calibration) = open_sources(trainer, model, self.task, known, unseen, calibration)
        training = ContinuedTraining(
            trainer,
            model,
            known,
            epochs,
            self.left_out,
            loaders.get("train"),
            augment=self.data.known.augmentation,
        )
        return TrainedModel(model, known, unseen, calibration, training, evaluator)


@runtime_checkable
class RecordsHistory(Protocol):
    """A callback that records the training in a folder."""

    @property
    def folder(self) -> Path | None:
        """Where the record is; None before training begins."""
        ...

    @property
    def recorded(self) -> tuple[str, ...]:
        """The splits of which there is a record; empty before training begins."""
        ...


def history_callback(trainer: Trainer) -> RecordsHistory | None:
    """The callback of a trainer that records its training; None: there is none."""
    return next((one for one in callbacks_of(trainer) if isinstance(one, RecordsHistory)), None)


def with_history(settings: Settings, trainer: Trainer) -> Settings:
    """Settings whose localiser has the history that a callback of the trainer has recorded, if it wants one."""
    localizer: Any = settings.localizer
    callback = history_callback(trainer)
    if not _wants_history(settings) or callback is None or callback.folder is None:
        return settings
    return replace(settings, search=replace(settings.search, localizer=localizer.with_history(str(callback.folder))))


def _wants_history(settings: Settings) -> bool:
    return bool(getattr(settings.localizer, "wants_history", False))


def _check_recorded(settings: Settings, trainer: Trainer, known: Sequence[LoaderSource]) -> None:
    """Refuses a record that has nothing of the failures: no regression among them would be known."""
    callback = history_callback(trainer)
    if not _wants_history(settings) or callback is None:
        return
    failing = [source.split for source in known if source.failed]
    if callback.recorded and not set(failing) & set(callback.recorded):
        wanted = [*callback.recorded, *failing]
        raise ConfigurationError(
            f"`callbacks`: TrainingHistory records {list(callback.recorded)}, the failures are in {failing}.",
            f"{type(settings.localizer).__name__} needs a record of them: `TrainingHistory(splits={wanted})`.",
        )


def _sanity_settings(settings: Settings, trainer: Trainer) -> Settings:
    """The same for a look before the first step: a history that is still to be recorded is taken on trust."""
    if _wants_history(settings) and history_callback(trainer) is not None:
        return replace(settings, search=replace(settings.search, localizer=NeuRecoverLite()))
    return settings


@torch.no_grad()
def run_sanity_check(
    evaluator: Evaluator,
    sources: Sequence[Source],
    settings: Settings,
    *,
    reference: Reference | None = None,
) -> None:
    """Evaluates a few samples and localises on some of them. The model is left as found.

    Raises what does not fit: the layer, the batches, the target, the task, the method or the reference.
    """
    model, task = evaluator.model, evaluator.task
    include_bias, trains = settings.localizer.include_bias, settings.trains
    space, _ = find_scope(model, settings.layer, include_bias=include_bias, called=evaluator.called, trains=trains)
    check_saved(model, space.parameters)
    with preserve(model):
        few = _evaluated(evaluator, sources, settings)
        if reference is not None:
            # Without its cache, which is for all samples.
            asked = replace(reference, cache=None) if isinstance(reference, OldModel) else reference
            asked.answers(evaluator, sources, few)
        check_task(settings, few, task)
        method: Any = settings.method
        if hasattr(method, "check"):
            method.check(model)
        first = sources[0]
        known = torch.arange(len(few)) < len(first.index)
        failed = known & (torch.arange(len(few)) % 2 == 0)
        batches = ((batch, few.rows(first.split, batch.position)) for batch in first)
        # What these few samples say of the weights does not matter yet, nor what is worth a warning.
        budget = settings.search.budget
        work = partial(record, evaluator, batches, space, known, budget=budget)
        ranks = evaluator.collective
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recording = ranks.all_or_none(work, "known data could not be recorded on another rank.")
                if hasattr(method, "check_recording"):
                    ranks.all_or_none(partial(method.check_recording, recording), "the method cannot be used.")
                localizer = on_data(settings.localizer, Known(evaluator, sources, few, space))
                localizer(recording, evaluator, failed=failed, passed=known & ~failed)
        except OtherRankError:
            raise
        except InseparableBatchError:
            # Other methods do without a recording, but for a task without margins.
            if "recording" in getattr(method, "needs", ()) or not bool(few.margin.isfinite().all()):
                raise
        except ReplayError:
            # Training needs no layer of its own.
            if settings.layer != "auto" or not trains or not bool(few.margin.isfinite().all()):
                raise
        except (EmptyLocalizationError, EvaluationError):
            return


class _LastBatch(RecordingSource):
    """A source that keeps the batch that it gave last."""

    batch: Batch | None = None

    def __init__(self, source: Source) -> None:
        super().__init__(source, self._keep, source.index[:0])

    def _keep(self, batch: Batch) -> Tensor:
        self.batch = batch
        return batch.position


def _evaluated(evaluator: Evaluator, sources: Sequence[Source], settings: Settings) -> SampleResults:
    """What the model does on the samples; whatever it raises says what the batch holds and how to take it apart."""
    watched = [_LastBatch(source) for source in sources]
    try:
        with refusing_batch_statistics(evaluator.model):
            few, _ = settings.samples.columns().evaluate(evaluator, watched, settings.target)
        _check_one_form(watched)
    except RepairError:
        raise
    except Exception as error:
        *_, last = [None, *(source.batch for source in watched if source.batch is not None)]
        if last is None or is_out_of_memory(error):
            raise
        raise ConfigurationError(
            f"`adapter`: the model raised {type(error).__name__} on the first batch: {error}\n{describe(last.raw)}",
            adapter_hint(last.raw),
        ) from error
    return few


def _check_one_form(watched: Sequence[_LastBatch]) -> None:
    """Refuses splits whose targets, if they are tensors, cannot lie in one batch: whole labels beside one-hot ones."""
    forms = {}
    for source in watched:
        target = None if source.batch is None else source.batch.target
        if isinstance(target, torch.Tensor) and (source.passed or source.failed):
            is_odd = target.dtype in ODD_DTYPES
            kind = target.dtype if is_odd else target.is_floating_point()
            forms[source.split] = (kind, target.ndim), f"{str(target.dtype)[6:]} {['n', *target.shape[1:]]}"
    if len({form for form, _ in forms.values()}) > 1:
        found = ", ".join(f"{shown} in `{split}`" for split, (_, shown) in forms.items()).replace("'", "")
        raise ConfigurationError(
            f"the targets of the data have several forms: {found}.", "give all data targets as those of the training."
        )
