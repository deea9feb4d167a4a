"""A repair of the trainer's module inside a fit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import cast

from lightning_nrl._trainer.lightning.packages import (
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    batch_limit,
    validating,
)
from lightning_nrl._trainer.output.flipped_samples import Render, names_in, sample_views
from lightning_nrl._trainer.output.progress import RepairProgress
from lightning_nrl._trainer.reading.data_splits import DataRequest, SplitLoaders, describe_limits
from lightning_nrl._trainer.reading.loaders import SPLITS, LoaderSource
from lightning_nrl._trainer.reading.random_transforms import report_stability
from lightning_nrl._trainer.steps.prediction import describe_uncounted_outputs, open_sources
from lightning_nrl._trainer.trainer_state import ASSUMED_EPOCHS
from lightning_nrl._trainer.training.continue_training import Augment, ContinuedTraining
from lightning_nrl._utils.preserve import random_state
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl.errors import (
    DataWarning,
    UnusableSamplesError,
    check_choice,
)
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.methods import Method
from lightning_nrl.pipeline import Outcome, Settings, repair_module
from lightning_nrl.pipeline.input_checks import run_sanity_check
from lightning_nrl.release.suite import RegressionSuite
from lightning_nrl.tasks import Task
from lightning_nrl.updates import Reference

MAX_EXCLUSION_RUNS = 6
"""Number of reruns of a repair without samples that turned out to be unusable."""


@dataclass(frozen=True)
class TrainedModel:
    model: LightningModule
    known: list[LoaderSource]
    unseen: list[LoaderSource]
    calibration: list[LoaderSource]
    training: ContinuedTraining
    evaluator: Evaluator
    observer: RepairProgress | None = None
    notes: str = ""  # sentences on the data for the report

    @property
    def sources(self) -> list[LoaderSource]:
        return [*self.known, *self.unseen, *self.calibration]

    def without(self, error: UnusableSamplesError) -> TrainedModel:
        """Leaves out the samples that an error names, and warns.

        Raises the error if it names over half of a split.
        """
        known = _without(self.known, error)
        reduced = replace(
            self,
            known=known,
            unseen=_without(self.unseen, error),
            calibration=_without(self.calibration, error),
            training=replace(self.training, known=known),
            notes=f"Left out: {error.problem} {self.notes}".rstrip(),
        )
        rank_zero_warn(DataWarning(f"left out: {error.problem}", error.hint))
        return reduced


def _without(sources: Sequence[LoaderSource], error: UnusableSamplesError) -> list[LoaderSource]:
    kept = []
    for source in sources:
        reduced = source.without(error.samples.get(source.split, ()))
        if 2 * len(reduced.index) < len(source.index):
            raise error
        kept.append(reduced)
    return kept


@dataclass(frozen=True)
class TrainerRepair:
    """A repair of a trainer's model.

    If it continues training, callbacks of the classes `left_out` do not run.
    """

    settings: Settings
    task: Task
    reference: Reference | None
    data: DataRequest
    left_out: tuple[type, ...]
    suite: RegressionSuite | None = None

    def check(self, trainer: Trainer, model: LightningModule) -> None:
        """Checks a repair before training, on one batch of each split.

        Warns if training could not continue.
        """
        settings = self.settings
        with random_state(), validating(trainer):
            loaders = SplitLoaders(trainer, model, self.data.options.stream_limit)
            first = self._open_data(loaders, ASSUMED_EPOCHS, limit=1, whole=False)
            failing = [source.split for source in first.known if source.failed]
            settings = _in_trainer(settings, trainer, failing)
            self._read_suite(first)
            run_sanity_check(first.evaluator, first.sources, settings, reference=self.reference)
            if self.reference is None and settings.layer == "auto" and settings.trains:
                first.training.warn()

    def run(
        self,
        trainer: Trainer,
        model: LightningModule,
        epochs: int,
        store: ResumeStore,
        began: float | None,
        logged: Mapping[str, Mapping[str, float]] | None,
    ) -> Outcome:
        """Searches for a repair of a model that was trained for `epochs` epochs.

        Leaves model and trainer unchanged. `max_time` counts from `began`, or else from now.
        `logged` is as in `Evaluator`.
        """
        began = began or time.perf_counter()
        settings = _in_trainer(self.settings, trainer, None)
        with self.opened(trainer, model, epochs) as trained:
            suite = self._read_suite(trained)
            trained = replace(trained, evaluator=replace(trained.evaluator, logged=logged or {}))
            for tries_left in range(MAX_EXCLUSION_RUNS, -1, -1):
                try:
                    outcome = repair_module(
                        trained.evaluator,
                        trained.known,
                        settings,
                        unseen=trained.unseen,
                        calibration=trained.calibration,
                        training=trained.training,
                        reference=self.reference,
                        suite=suite,
                        observer=trained.observer,
                        work=store,
                        began=began,
                    )
                    break
                except UnusableSamplesError as error:
                    if not tries_left:
                        raise
                    trained = trained.without(error)
            reason = f"{outcome.report.reason} {trained.notes}".rstrip()
            classes = names_in(trained.known, "classes")
            report = replace(outcome.report, reason=reason, class_names=classes)
            if trainer.is_global_zero:
                render = cast(Render | None, self.data.options.render)
                views = sample_views(report, trained.sources, render, model=trained.model)
                outcome = replace(outcome, views=views)
            return replace(outcome, report=report)

    @contextmanager
    def opened(
        self, trainer: Trainer, model: LightningModule, epochs: int, *, whole: bool = False
    ) -> Iterator[TrainedModel]:
        """Opens data, in the trainer's validation stage, and a progress bar.

        With `whole`, ranks read all samples.
        """
        with random_state(), validating(trainer), closing(RepairProgress(trainer)) as progress:
            loaders = SplitLoaders(trainer, model, self.data.options.stream_limit)
            trained = self._open_data(loaders, epochs, limit=batch_limit(trainer), whole=whole)
            sentences = [
                loaders.not_counted(trained.sources),
                describe_limits(trainer, trained.known),
                report_stability(trained.sources),
            ]
            if self.settings.layer == "auto":
                sentences.append(describe_uncounted_outputs(trained.evaluator, trained.known[0]))
            yield replace(trained, observer=progress, notes=" ".join(filter(None, sentences)))

    def _read_suite(self, trained: TrainedModel) -> RegressionSuite | None:
        """Reads the samples to protect, to which an earlier repair may have added some.

        Warns of samples in other splits of a trainer, and refuses unknown splits.
        """
        if self.suite is None:
            return None
        suite = trained.evaluator.collective.of_first(  # another process may add some now
            RegressionSuite.read(self.suite, may_be_new=True)
        )
        known = [source.split for source in (*trained.known, *trained.calibration)]
        for split in sorted(suite.splits.difference(known)):
            check_choice("suite: split", split.partition(":")[0], (*known, *SPLITS))
            rank_zero_warn(
                DataWarning(
                    f"`suite`: its samples of {split!r} are not known data of this repair, so they "
                    "are not protected.",
                    "judge the repaired model by `ReleaseGate(suite=...)`, or give their data as "
                    "`data=DataOptions(passed=[...])`.",
                )
            )
        return replace(
            suite, samples={key: entry for key, entry in suite.samples.items() if key[0] in known}
        )

    def _open_data(
        self, loaders: SplitLoaders, epochs: int, *, limit: int | None, whole: bool
    ) -> TrainedModel:
        model = loaders.model
        data = self.data.sources(loaders, seed=self.settings.seed, limit=limit, whole=whole)
        evaluator, (known, unseen, calibration) = open_sources(
            loaders.trainer, model, self.task, *data, needs_gradients=True
        )
        training = ContinuedTraining(
            loaders.trainer,
            model,
            known,
            epochs,
            self.left_out,
            loaders.for_training(),
            augment=cast(Augment | None, self.data.options.augment),
        )
        return TrainedModel(model, known, unseen, calibration, training, evaluator)


def _in_trainer(settings: Settings, trainer: Trainer, failing: Sequence[str] | None) -> Settings:
    method, localizer = settings.method, settings.localizer
    if isinstance(method, Method):
        settings = replace(settings, method=method.in_trainer(trainer, failing))
    new = localizer.in_trainer(trainer, failing)
    if new is localizer:
        return settings
    return replace(settings, search=replace(settings.search, localizer=new))
