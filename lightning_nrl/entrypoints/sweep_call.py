"""Many settings and seeds on a LightningModule and its data, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from lightning_nrl._lightning.packages import LightningDataModule, LightningModule, Trainer
from lightning_nrl._tracking import track_sweep
from lightning_nrl._trainer.trainer_repair import TrainedModel
from lightning_nrl._trainer.trainer_state import starting_weights
from lightning_nrl.analysis.sweep import (
    Seeds,
    Sweepable,
    SweepResult,
    Trials,
    check_trials,
    parse_seeds,
    parse_settings,
    swarming,
    sweep_module,
)
from lightning_nrl.entrypoints._arguments import callback_with, check_model
from lightning_nrl.entrypoints._dry_fit import dry_fit
from lightning_nrl.errors import check_choice

__all__ = ["sweep"]

LOGS = ("setting", "run", "none")


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
    trials: Trials | None = None,
    log: Literal["setting", "run", "none"] = "none",
    **arguments: Any,
) -> SweepResult:
    """Runs the paper's search with many settings and seeds on one trained model, and counts what each run does.

    Each run finds, bit for bit, what `repair` finds with the same arguments, at a fraction of the time: data are read
    once and many swarms searched at a time. The model keeps its weights, the trainer and the random state stay as they
    are, and files are written to `dirpath` alone. Ranks share out the runs.

    Args:
        trainer: any trainer that could train the model; it is used for one `fit` that makes no step.
        model: the module, trained, or to be filled from `ckpt_path`.
        train_dataloaders: passed samples, unless a data module has them.
        val_dataloaders: failed samples, unless a data module has them.
        settings: what to try: a `Grid`, names of rows of the paper's Table II, or mappings of arguments.
        seeds: how many seeds for each, from 0 on, or a list of them.
        datamodule: holds the data, with an optional `repair_dataloader()` for the failed samples.
        ckpt_path: a checkpoint of the model; None: the model as it is.
        weights_only: refuses a checkpoint that holds more than tensors and plain values; False: you trust it.
        unseen: data that is only counted: `test`, `val`, a DataLoader, or None.
        dirpath: a folder for the table and the weights; a second call with it makes only the runs that are missing.
        trials: lets an Optuna sampler choose combinations of the grid, such as `Trials(40)`, instead of running all.
        log: what becomes a row of TensorBoard's HParams tab: each `setting`, by its means, each `run`, or `none`.
        **arguments: further arguments of `RegressionFreeRepair`, such as `target`, `layer` and `calibration`, and what
            settings leave open of the search: `method=ParticleSwarm(...)` and `search=SearchOptions(...)`.
            docs/options.md says which have an effect; others are refused.

    Returns:
        The result: `rich.print` shows means and spread, `best` picks a run, `pareto` gives the front.

    Raises:
        ConfigurationError: an argument or the trainer cannot be used, or no failed sample is in the target.

    Example::

        result = sweep(
            Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", settings=Grid(alpha=[4, 6, 8], n_weights=[16, 32])
        )
        run = result.best()
        report = repair(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", **result.arguments(run))
    """
    check_choice("log", log, LOGS)
    callback = callback_with("sweep", unseen=unseen, dirpath=dirpath, **arguments)
    base = swarming(callback.settings)
    parse_settings(settings, base)
    numbers = parse_seeds(seeds)
    check_trials(trials, settings)
    check_model(model, "sweep_module")

    def work(trained: TrainedModel) -> SweepResult:
        with starting_weights("last", trainer, trained.model):
            return sweep_module(
                trained.evaluator,
                trained.known,
                settings,
                seeds=numbers,
                base=base,
                unseen=trained.unseen,
                calibration=trained.calibration,
                dirpath=dirpath,
                trials=trials,
                observer=trained.observer,
            )

    loaders = (train_dataloaders, val_dataloaders)
    source: dict[str, Any] = {"datamodule": datamodule, "ckpt_path": ckpt_path, "weights_only": weights_only}
    result = dry_fit(work, callback, trainer, model, *loaders, whole=True, **source)
    if log != "none":
        track_sweep(result, trainer.loggers, each=log)
    return result
