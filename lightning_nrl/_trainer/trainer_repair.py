"""A repair of the trainer's module inside a fit, and the progress bar of the repair."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from rich.progress import Progress

from lightning_nrl._trainer.continue_training import ContinuedTraining
from lightning_nrl._trainer.data_splits import DataRequest, SplitLoaders, describe_limits
from lightning_nrl._trainer.flipped_samples import class_names, sample_views
from lightning_nrl._trainer.lightning.packages import (
    LightningModule,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import batch_limit, callbacks_of, validating
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.prediction import open_sources
from lightning_nrl._trainer.random_transforms import report_stability
from lightning_nrl._trainer.trainer_state import ASSUMED_EPOCHS
from lightning_nrl._utils.formatting import rough_time
from lightning_nrl._utils.preserve import random_state
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.timing import Clock
from lightning_nrl.errors import ConfigurationError, DataWarning, UnusableSamplesError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.pipeline.input_checks import run_sanity_check
from lightning_nrl.pipeline.repair_module import Outcome, repair_module
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.tasks import Task
from lightning_nrl.updates.old_model import Reference

STAGES = {
    "collect": "counting what is right and wrong",
    "unseen": "counting unseen data",
    "reference": "running the replaced model",
    "labels": "looking for wrong labels",
    "localize": "choosing weights to change",
    "search": "searching new values for them",
    "record": "recording the last layer",
    "solve": "solving the layer",
    "linearize": "linearizing the layer",
    "fit": "training with the failures",
    "polish": "polishing the weights",
    "sparse": "changing fewer weights",
    "strength": "choosing the strength",
    "judge": "counting the result",
    "sweep": "running the settings",
    "layers": "measuring what each layer can repair",
    "alone": "fixing each target alone",
    "held out": "trying fixes on held-out data",
    "neighbours": "comparing with the nearest samples",
    "tune": "fine-tuning",
    "checkpoints": "running the checkpoints",
    "move": "moving towards checkpoints",
    "merge": "merging repairs",
}
"""Descriptions of stages in the progress bar. A stage that is not listed is shown by its name."""
MOST_SHARE = 0.99  # largest share of the bar that is filled before the end
MIN_ANNOUNCED_SECONDS = 3.0  # shorter repairs are not announced


@dataclass
class _ActiveStage:
    name: str
    began: float
    done: int = 0
    total: int = 0
    note: str = ""


class RepairProgress:
    """Progress bar of a repair, below the trainer's own bar. Shows the current stage, and the time
    left if known.
    """

    now: Clock = staticmethod(time.perf_counter)

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._line = _progress_line(trainer)
        self._open: list[_ActiveStage] = []
        self._expected: dict[str, float] = {}
        self._began, self._end, self._share = self.now(), math.inf, 0.0

    def close(self) -> None:
        if self._line is not None:
            self._line.close()

    def expect(self, seconds: Mapping[str, float], most: float) -> None:
        """Stores the expected seconds of the coming stages. Announces their sum, or `most` if
        `most` is less.
        """
        self._expected, self._end = dict(seconds), self.now() + most
        total = min(sum(seconds.values()), most)
        if total >= MIN_ANNOUNCED_SECONDS:
            self.announce(f"Repair: {rough_time(total)} from now on; `max_time` sets a limit.")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows a stage while the block runs, in place of the stage around the block."""
        if name in self._expected and name != "judge":  # stages before it are over or were skipped
            planned = list(self._expected.items())
            self._expected = dict(planned[list(self._expected).index(name) :])
        self._open.append(_ActiveStage(name, self.now()))
        self._draw()
        try:
            yield
        finally:
            self._open.pop()
            if name != "judge":  # this stage also occurs inside of methods
                self._expected.pop(name, None)
            self._draw()

    def search(
        self, done: int, total: int, repaired: int | None = None, broken: int | None = None
    ) -> None:
        """Shows the progress of the current stage, and how many samples its best weights so far
        repair and break.
        """
        if self._open:
            stage, counts = self._open[-1], ((repaired, "repaired"), (broken, "broken"))
            note = ", ".join(f"{n} {what}" for n, what in counts if n is not None)
            stage.done, stage.total, stage.note = done, total, note and f" ({note})"
            self._draw()

    def announce(self, text: str) -> None:
        """Prints a sentence, above the progress bar if one is shown."""
        bar = self._trainer.progress_bar_callback
        if bar is not None and self._line is not None:
            bar.print(text)
        else:
            rank_zero_info(text)

    def _draw(self) -> None:
        if self._line is None or not self._open:
            return
        stage, left = self._open[-1], self._seconds_left()
        if self._expected and left is not None:
            elapsed = self.now() - self._began
            self._share = max(self._share, min(elapsed / max(elapsed + left, 1e-9), MOST_SHARE))
        share = self._share if self._expected else stage.done / stage.total if stage.total else None
        rest = f", {rough_time(left)} left" if self._expected and left is not None else ""
        self._line.show(f"Repair: {STAGES.get(stage.name, stage.name)}{stage.note}{rest}", share)

    def _seconds_left(self) -> float | None:
        left = sum(
            seconds
            for name, seconds in self._expected.items()
            if name not in {one.name for one in self._open}
        )
        for stage in self._open:
            spent = self.now() - stage.began
            if stage.done:
                left += spent * (stage.total - stage.done) / stage.done
            elif stage.name in self._expected:
                left += max(0.0, self._expected[stage.name] - spent)
            elif stage is self._open[-1]:
                return None
        return min(left, max(0.0, self._end - self.now()))


def _progress_line(trainer: Trainer) -> _RichLine | _TqdmLine | None:
    bar = trainer.progress_bar_callback
    if (
        not trainer.is_global_zero
        or not isinstance(bar, (RichProgressBar, TQDMProgressBar))
        or bar.is_disabled
    ):
        return None
    rich = bar.progress if isinstance(bar, RichProgressBar) else None
    # Lightning starts its rich display only with its first loop.
    return _RichLine(rich) if rich is not None and rich.live.is_started else _TqdmLine()


class _TqdmLine:
    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, text: str, share: float | None) -> None:
        from tqdm.auto import tqdm

        if self._bar is None:
            # On stdout like Lightning's bar, to be drawn in order.
            how: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "file": sys.stdout}
            self._bar = tqdm(total=100, desc=text, bar_format="{desc} ...", **how)
        self._bar.bar_format = "{desc} ..." if share is None else "{desc} {percentage:3.0f}%|{bar}|"
        self._bar.n = round(100 * (share or 0))
        self._bar.set_description_str(text)

    def close(self) -> None:
        if self._bar is not None:
            below_others = self._bar.pos != 0
            self._bar.close()
            # The cursor is still on the line of Lightning's bar.
            if below_others:
                print()


class _RichLine:
    def __init__(self, lightning: Progress) -> None:
        self._lightning = lightning
        self._task: Any = None

    def show(self, text: str, share: float | None) -> None:
        total = math.inf if share is None else 100
        if self._task is None:
            self._task = self._lightning.add_task(text, total=total)
        self._lightning.update(
            self._task, completed=round(100 * (share or 0)), total=total, description=text
        )
        self._lightning.refresh()

    def close(self) -> None:
        if self._task is not None:
            self._lightning.remove_task(self._task)
            self._lightning.refresh()


MAX_EXCLUSION_RUNS = 6
"""How often a repair may fail because of unusable samples and then run again without these samples.
"""


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
        """Leaves out the samples that an error names, and warns; raises the error if it names over
        half of a split.
        """
        data = {role: getattr(self, role) for role in ("known", "unseen", "calibration")}
        for role, sources in data.items():
            data[role] = [
                one.without(error.samples[one.split]) if error.samples.get(one.split) else one
                for one in sources
            ]
            if any(
                2 * len(new.index) < len(old.index)
                for new, old in zip(data[role], sources, strict=True)
            ):
                raise error
        problem, _, hint = str(error).partition("\nHINT: ")
        rank_zero_warn(DataWarning(f"left out: {problem}", hint))
        notes = f"Left out: {problem} {self.notes}".rstrip()
        return replace(
            self, **data, training=replace(self.training, known=data["known"]), notes=notes
        )


@dataclass(frozen=True)
class TrainerRepair:
    """A repair of a trainer's model. If it continues training, callbacks of the classes `left_out`
    do not run.
    """

    settings: Settings
    task: Task
    reference: Reference | None
    data: DataRequest
    left_out: tuple[type, ...]

    def check(self, trainer: Trainer, model: LightningModule) -> None:
        """Checks a repair before training, on one batch of each split. Warns if training could not
        continue.
        """
        settings, method = self.settings, self.settings.method
        if getattr(method, "wants_checkpoints", False) and not _best_checkpoint_callbacks(trainer):
            name = type(method).__name__
            raise ConfigurationError(
                f"`{name}.checkpoints`: the fit saves none.",
                f"name them, `{name}(['epoch1.ckpt', 'epoch2.ckpt'])`, or give the Trainer a "
                "`ModelCheckpoint(monitor=..., save_top_k=5)`.",
            )
        with random_state(), validating(trainer):
            few = self._open_data(
                SplitLoaders(trainer, model), ASSUMED_EPOCHS, limit=1, whole=False
            )
            history = _history_callback(settings, trainer)
            if history is not None:
                # The training has not made its record yet.
                _check_recorded(settings, history, few.known)
                settings = replace(
                    settings, search=replace(settings.search, localizer=NeuRecoverLite())
                )
            run_sanity_check(few.evaluator, few.sources, settings, reference=self.reference)
            if self.reference is None and settings.layer == "auto" and settings.trains:
                few.training.warn()

    def run(
        self, trainer: Trainer, model: LightningModule, epochs: int, work: ResumeStore | None = None
    ) -> Outcome:
        """Searches for a repair of a model that was trained for `epochs` epochs. Leaves model and
        trainer unchanged.
        """
        settings, work = _with_trainer_files(self.settings, trainer), work or ResumeStore()
        with self.opened(trainer, model, epochs) as trained:
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
                        observer=trained.observer,
                        work=work,
                    )
                    break
                except UnusableSamplesError as error:
                    if not tries_left:
                        raise
                    trained = trained.without(error)
            reason = f"{outcome.report.reason} {trained.notes}".rstrip()
            report = replace(outcome.report, reason=reason, class_names=class_names(trained.known))
            render: Any = self.data.known.render
            views = (
                sample_views(report, trained.sources, render, model=trained.model)
                if trainer.is_global_zero
                else ()
            )
            return replace(outcome, report=report, views=views)

    @contextmanager
    def opened(
        self, trainer: Trainer, model: LightningModule, epochs: int, *, whole: bool = False
    ) -> Iterator[TrainedModel]:
        """Opens data, in the trainer's validation stage, and a progress bar. With `whole`, ranks
        read all samples.
        """
        with random_state(), validating(trainer), closing(RepairProgress(trainer)) as progress:
            loaders = SplitLoaders(trainer, model)
            found = self._open_data(loaders, epochs, limit=batch_limit(trainer), whole=whole)
            sentences = (
                loaders.not_counted(found.sources),
                describe_limits(trainer, found.known),
                report_stability(found.sources),
            )
            yield replace(found, observer=progress, notes=" ".join(filter(None, sentences)))

    def _open_data(
        self, loaders: SplitLoaders, epochs: int, *, limit: int | None, whole: bool
    ) -> TrainedModel:
        trainer, model = loaders.trainer, loaders.model
        data = self.data.sources(loaders, seed=self.settings.seed, limit=limit, whole=whole)
        evaluator, (known, unseen, calibration) = open_sources(trainer, model, self.task, *data)
        trained_on, augment = loaders.get("train"), cast(Any, self.data.known.augment)
        training = ContinuedTraining(
            trainer, model, known, epochs, self.left_out, trained_on, augment=augment
        )
        return TrainedModel(model, known, unseen, calibration, training, evaluator)


def _history_callback(settings: Settings, trainer: Trainer) -> Any:
    if not getattr(settings.localizer, "wants_history", False):
        return None
    return next(
        (
            one
            for one in callbacks_of(trainer)
            if hasattr(one, "recorded") and hasattr(one, "folder")
        ),
        None,
    )


def _with_trainer_files(settings: Settings, trainer: Trainer) -> Settings:
    method: Any = settings.method
    localizer: Any = settings.localizer
    history = _history_callback(settings, trainer)
    if history is not None and history.folder is not None:
        localizer = localizer.with_history(str(history.folder))
        settings = replace(settings, search=replace(settings.search, localizer=localizer))
    if getattr(method, "wants_checkpoints", False):
        paths = [
            path
            for callback in _best_checkpoint_callbacks(trainer)
            for path in sorted(callback.best_k_models)
        ]
        settings = replace(settings, method=method.with_checkpoints(paths)) if paths else settings
    return settings


def _best_checkpoint_callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    found = [one for one in callbacks_of(trainer) if isinstance(one, ModelCheckpoint)]
    return [one for one in found if one.monitor is not None and one.save_top_k != 0]


def _check_recorded(settings: Settings, history: Any, known: Sequence[LoaderSource]) -> None:
    # If no split with failures is recorded, the localizer finds no regression among the failures.
    failing = [source.split for source in known if source.failed]
    if history.recorded and not set(failing) & set(history.recorded):
        wanted = [*history.recorded, *failing]
        problem = f"`callbacks`: TrainingHistory records {list(history.recorded)}, the failures are in {failing}."
        hint = f"{type(settings.localizer).__name__} needs a record of them: `TrainingHistory(splits={wanted})`."
        raise ConfigurationError(problem, hint)
