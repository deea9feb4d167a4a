"""`WeightInterpolation` of the trained weights with those of the replaced model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import CheckpointState, batch_limit, validating
from lightning_nrl._trainer.output.announcement import show
from lightning_nrl._trainer.reading.data_splits import (
    DataChoice,
    SplitLoaders,
    find_calibration,
    find_one,
)
from lightning_nrl._trainer.reading.loaders import LoaderSource, check_data
from lightning_nrl._trainer.reference_copy import check_other_model, parse_with_weights
from lightning_nrl._trainer.tracking.loggers import track_numbers
from lightning_nrl._trainer.tracking.scalars import interpolation_numbers
from lightning_nrl._trainer.tracking.tags import NUMBER_TAG, parse_prefix, tagged
from lightning_nrl._trainer.trainer_checks import check_order
from lightning_nrl._trainer.trainer_state import make_evaluator, starting_weights
from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.preserve import preserve_state, random_state
from lightning_nrl._utils.state import State, write
from lightning_nrl.callbacks.data_callback import DataCallback
from lightning_nrl.data import Adapter
from lightning_nrl.errors import ConfigurationError, TrainingWarning, check_whole
from lightning_nrl.tasks import Task
from lightning_nrl.updates.interpolation import (
    ACCURACY_TOLERANCE,
    DEFAULT_STRENGTHS,
    InterpolationChoice,
    alignment,
    batch_norms,
    check_part,
    choose_interpolation,
    estimate_statistics,
    interpolate,
)
from lightning_nrl.updates.old_model import AnyReference

MIN_COSINE = 0.5
"""Below this cosine of initial and replaced weights, a warning says that they are unrelated."""


class WeightInterpolation(DataCallback):
    """Sets the weights after `fit` to `(1 - strength) old + strength new`.

    `old` are the weights of the replaced model. This breaks fewer samples at little or no loss of
    accuracy (Wortsman et al. 2022, WiSE-FT; Schumann et al. 2024, BCWI). Training must start from
    the weights of the replaced model: `new.load_state_dict(...)` before `fit`. Put this callback
    before `RegressionFreeRepair`, which then repairs the remaining failures.

    Logs `interpolation/strength`. On calibration data it also logs `interpolation/accuracy` and
    `interpolation/nfr` (the negative flip rate), and with the suffix `_before` the values without
    interpolation. Checkpoints of training, weight averages and optimizer states do not change. Save
    the new weights with `trainer.save_checkpoint`.

    Args:
        reference: the replaced model: a module, the path of its checkpoint, a state dict, or an
            `OldModel`.
        strength: weight of the new model, in [0, 1]. `auto` takes the smallest strength of 1,
            0.95, ..., 0.5 that breaks no more calibration samples than strength 1, and whose
            accuracy is within `tolerance` of the best accuracy.
        tolerance: accuracy that `auto` may give up for fewer regressions. 0.005 is half a
            percentage point.
        calibration: data that were not trained on, for choosing the strength and for counting:
            `val`, `test`, `repair` or a DataLoader. If None, nothing is counted, and `strength`
            must be a number.
        statistics: data for the statistics of batch norm layers: `train`, another split, or a
            DataLoader, preferably without augmentation. Each strength that is tried takes one pass
            over these data.
        batches: number of batches for the statistics, drawn at random. None takes all batches.
        prefix: prefix of logged tags.
        task: as in `RegressionFreeRepair`.
        adapter: as in `DataOptions`.
        output: as in `DataOptions`.
        seed: seed for drawing the batches and for random transforms.
        verbose: if True, prints the choice.

    Attributes:
        choice: the chosen strength and the alternatives. None if there were no calibration data.

    Example::

        new_model.load_state_dict(torch.load("old.ckpt")["state_dict"])
        interpolation = WeightInterpolation("old.ckpt")
        repair = RegressionFreeRepair(reference="old.ckpt")
        Trainer(callbacks=[interpolation, repair]).fit(new_model, datamodule=dm)
    """

    def __init__(
        self,
        reference: AnyReference,
        strength: float | Literal["auto"] = "auto",
        tolerance: float = ACCURACY_TOLERANCE,
        calibration: DataChoice = "val",
        statistics: str | DataLoader[Any] = "train",
        batches: int | None = None,
        prefix: str = "interpolation",
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
        output: int | str | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        super().__init__(task, adapter, output)
        self.reference = parse_with_weights(reference)
        if strength != "auto":
            check_part("strength", strength, "strength")
        check_part("tolerance", tolerance, "share")
        self.strength, self.tolerance = strength, tolerance
        self.calibration = check_data("calibration", calibration, optional=True)
        if calibration is None and strength == "auto":
            raise ConfigurationError(
                "`strength='auto'` needs calibration data, and there are none.",
                "give `calibration` data that were not trained on, or a number as `strength=`.",
            )
        self.statistics = check_data("statistics", statistics)
        if batches is not None:
            check_whole("batches", batches, 1)
        check_whole("seed", seed, 0, 2**32 - 1)
        self.batches, self.seed, self.verbose = batches, seed, verbose
        self.prefix = parse_prefix(prefix, "interpolation")
        self.choice: InterpolationChoice | None = None
        self._reference_state: Mapping[str, Any] = {}
        self._changed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_order(self, trainer, change="the interpolation")
            check_other_model(self.reference, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Read before training, which may overwrite the file.
        self._reference_state = read_state("reference", self.reference.model)
        fitting("reference", self._reference_state, pl_module)
        self.choice, self._changed = None, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with random_state(), validating(trainer):
            # A few batches show whether the data fit the model; batch norm needs several samples on
            # each rank.
            validation, training = self._sources(trainer, pl_module, limit=4 * trainer.world_size)
            evaluator = make_evaluator(trainer, pl_module, self.task)
            if validation is not None:
                with preserve_state(pl_module):
                    evaluator.run([validation])
            if training is not None:
                estimate_statistics(evaluator, training)
        cosine = alignment(fitting("reference", self._reference_state, pl_module), pl_module)
        if cosine < MIN_COSINE:
            rank_zero_warn(
                TrainingWarning(
                    "the weights do not begin near those of `reference` "
                    f"(cosine {cosine:.2f}), and an interpolation of two trainings from scratch "
                    "is useless.",
                    "start from the old weights: `model.load_state_dict(...)` before `fit`.",
                )
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluator = make_evaluator(trainer, pl_module, self.task)
        limit = (batch_limit(trainer) or 0) * trainer.world_size or None
        with (
            starting_weights("last", trainer, pl_module) as start,
            random_state(),
            validating(trainer),
        ):
            validation, training = self._sources(trainer, pl_module, limit)
            old, batches, seed = self._reference_state, self.batches, self.seed
            state: State = {}
            if validation is not None:
                self.choice = choose_interpolation(
                    old,
                    evaluator,
                    validation,
                    training,
                    tolerance=self.tolerance if self.strength == "auto" else None,
                    strengths=self._strengths,
                    batches=batches,
                    seed=seed,
                )
                state = self.choice.state
                self._log(trainer, interpolation_numbers(self.choice))
            else:
                (strength,) = self._strengths
                if strength < 1:
                    state = interpolate(
                        old, evaluator, strength, training, batches=batches, seed=seed
                    )
                self._log(trainer, {"strength": strength})
            write(pl_module, state)
            self._reference_state, self._changed = {}, bool(state)
            start.keep = self._changed

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `on_train_end` does not run in a fit without a training step.
        if self._reference_state and not trainer.should_stop:
            rank_zero_warn(
                TrainingWarning(
                    "the weights were not interpolated, because no training step ran "
                    "(fit complete or skipped).",
                    "for a trained model, call "
                    "`lightning_nrl.updates.choose_interpolation(old, new, val, train)`.",
                )
            )
        self._reference_state = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: CheckpointState
    ) -> None:
        if self._changed:  # otherwise weight averaging would save its average
            checkpoint["state_dict"].update(pl_module.state_dict())

    @property
    def _strengths(self) -> Sequence[float]:
        return DEFAULT_STRENGTHS if self.strength == "auto" else [float(self.strength)]

    def _sources(
        self, trainer: Trainer, pl_module: LightningModule, limit: int | None
    ) -> tuple[LoaderSource | None, LoaderSource | None]:
        """Returns calibration data and data for batch norm statistics, as far as needed."""
        loaders = SplitLoaders(trainer, pl_module)
        calibration = find_calibration(self.calibration, loaders, needed=self.strength == "auto")
        statistics = None
        if self.strength not in (0, 1) and batch_norms(pl_module):
            statistics = find_one("statistics", self.statistics, loaders)
        limited = [(*loader, limit) for loader in (statistics, calibration) if loader]
        _, opened = self.open_loaders(trainer, pl_module, limited, seed=self.seed)
        validation = opened[-1] if calibration else None
        return validation, opened[0] if statistics else None

    def _log(self, trainer: Trainer, numbers: Mapping[str, float]) -> None:
        tags = tagged(NUMBER_TAG, numbers, name=self.prefix)
        track_numbers(tags, trainer.loggers, step=trainer.global_step, what="interpolation")
        if trainer.is_global_zero and self.verbose and self.choice is not None:
            show(self.choice)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in tags.items()})
