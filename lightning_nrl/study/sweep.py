"""`sweep` for a trained model and its Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.packages import LightningDataModule, LightningModule, Trainer
from lightning_nrl._trainer.tracking.loggers import track_sweep
from lightning_nrl._trainer.trainer_repair import TrainedModel
from lightning_nrl._trainer.trainer_state import starting_weights
from lightning_nrl.entrypoints.arguments import callback_with, check_model
from lightning_nrl.entrypoints.functions import dry_fit
from lightning_nrl.errors import check_choice
from lightning_nrl.study.grid import Sweepable, parse_settings
from lightning_nrl.study.run_sweep import Seeds, parse_seeds, swarming, sweep_module
from lightning_nrl.study.sweep_result import SweepResult


def sweep(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    settings: Sweepable,
    seeds: Seeds = 10,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    weights_only: bool = True,
    unseen: str | DataLoader[Any] | None = "test",
    dirpath: str | Path | None = None,
    log: Literal["setting", "run", "none"] = "none",
    **arguments: Any,
) -> SweepResult:
    """Runs the paper's search on one model with many settings and seeds.

    Counts what each run repairs and breaks. Each run finds the same weights as `repair` with the
    same arguments, bit for bit. It takes a fraction of the time, since the sweep records the data
    once. Ranks share the runs. Model, trainer and random state are not changed. Trainer, model,
    data, checkpoint and further arguments, such as `method=ParticleSwarm(...)` and
    `search=SearchOptions(...)`, are those of `repair`; an argument without an effect is refused
    (see docs/options.md).

    Args:
        trainer: as in `repair`.
        model: as in `repair`.
        train_dataloaders: as in `repair`.
        val_dataloaders: as in `repair`.
        settings: a `Grid`, or one or several mappings from argument to value.
        seeds: a list of seeds, or a number `n` for the seeds 0 to n - 1.
        datamodule: as in `repair`.
        ckpt_path: as in `repair`.
        weights_only: as in `repair`.
        unseen: as in `repair`.
        dirpath: folder for a table of the runs and for their weights, or None. A second call with
            the same folder makes only the missing runs.
        log: rows of TensorBoard's HParams tab: a row for each run (`run`), a row for each setting
            with the means over its seeds (`setting`), or no rows (`none`).
        **arguments: further arguments of `repair`.

    Returns:
        The result: `rich.print` shows mean and spread of each setting, `best()` returns a run,
        `pareto()` several runs.

    Example::

        result = sweep(
            Trainer(),
            model,
            datamodule=dm,
            ckpt_path="best.ckpt",
            settings=Grid(alpha=[4, 6, 8], n_weights=[16, 32]),
        )
        run = result.best()
        report = repair(
            Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", **result.arguments(run)
        )
    """
    check_choice("log", log, ("setting", "run", "none"))
    callback = callback_with("sweep", unseen=unseen, dirpath=dirpath, **arguments)
    base = swarming(callback.settings)
    parse_settings(settings, base)
    parsed_seeds = parse_seeds(seeds)
    check_model(model, "sweep_module")

    def work(trained: TrainedModel) -> SweepResult:
        with starting_weights("last", trainer, trained.model):
            return sweep_module(
                trained.evaluator,
                trained.known,
                settings,
                seeds=parsed_seeds,
                base=base,
                unseen=trained.unseen,
                calibration=trained.calibration,
                dirpath=dirpath,
                observer=trained.observer,
            )

    result = dry_fit(
        work,
        callback,
        trainer,
        model,
        ckpt_path,
        weights_only,
        whole=True,
        train_dataloaders=train_dataloaders,
        val_dataloaders=val_dataloaders,
        datamodule=datamodule,
    )
    if log != "none":
        track_sweep(result.hparams_rows(log), trainer.loggers)
    return result
