"""`WeightInterpolation` of the trained weights with those of the replaced model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nrl._trainer.data_splits import (
    SplitLoaders,
    choice_numbers,
    find_calibration,
    find_one,
)
from lightning_nrl._trainer.lightning.packages import (
    CallbackBase,
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import batch_limit, validating
from lightning_nrl._trainer.loaders import LoaderSource, check_data, make_source, parse_adapter
from lightning_nrl._trainer.prediction import open_sources
from lightning_nrl._trainer.reference_copy import parse_with_weights
from lightning_nrl._trainer.repair_files import parse_prefix, show
from lightning_nrl._trainer.tracking.loggers import track_numbers
from lightning_nrl._trainer.trainer_checks import check_order, check_packages, check_strategy
from lightning_nrl._trainer.trainer_state import make_evaluator, starting_weights
from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.preserve import preserve_state, random_state
from lightning_nrl._utils.state import State, write
from lightning_nrl.data.batch import Adapter
from lightning_nrl.errors import ConfigurationError, TrainingWarning, check_whole
from lightning_nrl.tasks import Task, parse_task
from lightning_nrl.updates.interpolation import (
    ACCURACY_TOLERANCE,
    ShareChoice,
    alignment,
    batch_norms,
    check_share,
    choose_share,
    estimate_statistics,
    interpolate,
)
from lightning_nrl.updates.old_model import Reference

MIN_COSINE = 0.5
"""A smaller cosine between initial and replaced weights causes a warning. It is about 0 for
unrelated weights.
"""


class WeightInterpolation(CallbackBase):
    """Interpolates the weights after `fit` with those of the replaced model: `(1 - share) new +
    share
    old`.

    This breaks fewer samples at little or no loss of accuracy (Wortsman et al. 2022, WiSE-FT;
    Schumann et al. 2024, BCWI). Training must start from the weights of the replaced model:
    `new.load_state_dict(...)` before `fit`. Put this callback before `RegressionFreeRepair`, which
    then repairs the remaining failures.

    Logs `interpolation/share`. On calibration data it also logs `interpolation/accuracy` and
    `interpolation/nfr` (the negative flip rate), and with the suffix `_before` the values without
    interpolation. Checkpoints of training, weight averages and optimizer states do not change. Save
    the new weights with `trainer.save_checkpoint`.

    Args:
        reference: the replaced model: a module, the path of its checkpoint, a state dict, or an
            `OldModel`.
        share: share of the replaced model, in [0, 1]. `auto` takes the largest share of 0, 0.05,
            ..., 0.5 that breaks no more calibration samples than share 0, and whose accuracy is
            within `tolerance` of the best accuracy.
        tolerance: accuracy that `auto` may give up for fewer regressions. 0.005 is half a
            percentage point.
        calibration: data that were not trained on, for choosing the share and for counting: `val`,
            `test`, `repair` or a DataLoader. If None, nothing is counted, and `share` must be a
            number.
        statistics: data for the statistics of batch norm layers: `train`, another split, or a
            DataLoader, preferably without augmentation. Each share that is tried takes one pass
            over these data.
        batches: number of batches for the statistics, drawn at random. None takes all batches.
        prefix: prefix of logged tags.
        task: as in `RegressionFreeRepair`.
        adapter: as in `DataOptions`.
        seed: seed for drawing the batches and for random transforms.
        verbose: if True, prints the choice.

    Attributes:
        choice: the chosen share and the alternatives. None if there were no calibration data.

    Example::

        new_model.load_state_dict(torch.load("old.ckpt")["state_dict"])
        interpolation = WeightInterpolation("old.ckpt")
        repair = RegressionFreeRepair(reference="old.ckpt")
        Trainer(callbacks=[interpolation, repair]).fit(new_model, datamodule=dm)
    """

    def __init__(
        self,
        reference: nn.Module | str | Path | State | Reference,
        share: float | Literal["auto"] = "auto",
        tolerance: float = ACCURACY_TOLERANCE,
        calibration: str | DataLoader[Any] | None = "val",
        statistics: str | DataLoader[Any] = "train",
        batches: int | None = None,
        prefix: str = "interpolation",
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.reference = parse_with_weights(reference)
        if share != "auto":
            check_share(share)
        check_share(tolerance, "tolerance")
        self.share, self.tolerance = share, tolerance
        self.calibration: Any = check_data("calibration", calibration, optional=True)
        if calibration is None and share == "auto":
            hint = "give `calibration` data that were not trained on, or a number as `share=`."
            raise ConfigurationError(
                "`share='auto'` needs calibration data, and there are none.", hint
            )
        self.statistics: Any = check_data("statistics", statistics)
        if batches is not None:
            check_whole("batches", batches, 1)
        check_whole("seed", seed, 0, 2**32 - 1)
        self.batches, self.seed, self.verbose = batches, seed, verbose
        self.prefix = parse_prefix(prefix, "interpolation")
        self.task = parse_task(task)
        self.adapter = parse_adapter(adapter)
        self.choice: ShareChoice | None = None
        self._reference_state: Mapping[str, Any] = {}
        self._changed = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_packages(trainer)
        if stage != "fit":
            return
        check_strategy(trainer, "which are needed whole", "train with a single device or with ddp.")
        check_order(self, trainer, what="the interpolation")
        if self.reference.model is pl_module:
            hint = "give its checkpoint, or a copy: `copy.deepcopy(model)`."
            raise ConfigurationError("`reference` is the model in training.", hint)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Read before training, which may overwrite the file.
        self._reference_state = read_state("reference", self.reference.model)
        fitting("reference", self._reference_state, pl_module)
        self.choice, self._changed = None, False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with random_state(), validating(trainer):
            # A few batches show whether the data fit the model; batch norm needs several samples on
            # each rank.
            counted, training = self._sources(trainer, pl_module, limit=4 * trainer.world_size)
            evaluator = make_evaluator(trainer, pl_module, self.task)
            if counted is not None:
                with preserve_state(pl_module):
                    evaluator.run([counted])
            if training is not None:
                estimate_statistics(evaluator, training)
        cosine = alignment(fitting("reference", self._reference_state, pl_module), pl_module)
        if cosine < MIN_COSINE:
            where = f"the weights do not begin near those of `reference` (cosine {cosine:.2f})"
            problem = f"{where}, and an interpolation of two trainings from scratch is useless."
            hint = "start from the old weights: `model.load_state_dict(...)` before `fit`."
            rank_zero_warn(TrainingWarning(problem, hint))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluator = make_evaluator(trainer, pl_module, self.task)
        how: dict[str, Any] = {"batches": self.batches, "seed": self.seed}
        limit = (batch_limit(trainer) or 0) * trainer.world_size or None
        with (
            starting_weights("last", trainer, pl_module) as start,
            random_state(),
            validating(trainer),
        ):
            counted, training = self._sources(trainer, pl_module, limit)
            if counted is None:
                assert self.share != "auto"
                share = float(self.share)
                state: State = (
                    interpolate(self._reference_state, evaluator, share, training, **how)
                    if share
                    else {}
                )
                numbers = {"share": share}
            else:
                given = {"tolerance": None, "shares": [self.share]}
                how |= {"tolerance": self.tolerance} if self.share == "auto" else given
                self.choice = choose_share(
                    self._reference_state, evaluator, counted, training, **how
                )
                state, numbers = self.choice.state, choice_numbers(self.choice)
            self._log(trainer, numbers)
            write(pl_module, state)
            self._reference_state, self._changed = {}, bool(state)
            start.keep = self._changed

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `on_train_end` does not run in a fit without a training step.
        if self._reference_state and not trainer.should_stop:
            problem = "the weights were not interpolated, because no training step ran (fit complete or skipped)."
            hint = "for a trained model, call `lightning_nrl.updates.choose_share(old, new, val, train)`."
            rank_zero_warn(TrainingWarning(problem, hint))
        self._reference_state = {}

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._changed:  # otherwise weight averaging would save its average
            checkpoint["state_dict"].update(pl_module.state_dict())

    def _sources(
        self, trainer: Trainer, pl_module: LightningModule, limit: int | None
    ) -> tuple[LoaderSource | None, LoaderSource | None]:
        make = partial(
            make_source,
            trainer=trainer,
            model=pl_module,
            adapter=self.adapter,
            seed=self.seed,
            limit=limit,
        )
        loaders, chosen = SplitLoaders(trainer, pl_module), self.share == "auto"
        counted = find_calibration(self.calibration, loaders, needed=chosen)
        fixed = self.share in (0, 1) or not batch_norms(pl_module)
        training = None if fixed else find_one("statistics", self.statistics, loaders)
        estimating, counting = (
            [] if found is None else [make(*found)] for found in (training, counted)
        )
        _, (opened,) = open_sources(trainer, pl_module, self.task, [*estimating, *counting])
        return (opened[-1] if counting else None), (opened[0] if estimating else None)

    def _log(self, trainer: Trainer, numbers: Mapping[str, float]) -> None:
        tags = {f"{self.prefix}/{name}": value for name, value in numbers.items()}
        if trainer.is_global_zero:
            track_numbers(tags, trainer.loggers, step=trainer.global_step, what="interpolation")
            if self.verbose and self.choice is not None:
                show(self.choice)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in tags.items()})
