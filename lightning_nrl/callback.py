"""The Lightning shell: hooks and checks, in order. What a repair is stands in `lightning_nrl.pipeline`."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nrl._lightning import batch_limit, validating
from lightning_nrl._model.layers import find_scope
from lightning_nrl._tracking import track
from lightning_nrl._trainer.artifacts import base_folder, file_names, headline, output_folder, show, write_report
from lightning_nrl._trainer.continue_training import ContinuedTraining, epochs_of
from lightning_nrl._trainer.data_splits import DataRequest
from lightning_nrl._trainer.loaders import LoaderSource, warn_if_random
from lightning_nrl._trainer.progress import RepairProgress
from lightning_nrl._trainer.sanity_check import rehearse
from lightning_nrl._trainer.trainer_checks import check_namespace, check_order, check_strategy
from lightning_nrl._trainer.trainer_state import make_evaluator, starting_weights
from lightning_nrl._utils.imports import import_function
from lightning_nrl._utils.preserve import random_state
from lightning_nrl._utils.state import State, changed
from lightning_nrl.callbacks.weight_interpolation import WeightInterpolation
from lightning_nrl.data.batch import Adapter, unpack
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import NotRepairedWarning, check_choice, explain
from lightning_nrl.gate import Gate
from lightning_nrl.localization import Localizer, NeuRecoverLite
from lightning_nrl.methods import METHODS
from lightning_nrl.pipeline.input_checks import check_limit
from lightning_nrl.pipeline.repair_module import Outcome, repair_module
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.presets import paper_arguments
from lightning_nrl.problem import Method
from lightning_nrl.reference.old_model import Reference, parse_reference
from lightning_nrl.report import RepairReport
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.search.fitness import Fitness
from lightning_nrl.tasks import Task, parse_task

__all__ = ["RegressionFreeRepair"]


class RegressionFreeRepair(Callback):
    """Repairs the model that `fit` has trained, and keeps what worked working.

    After training, the callback collects what the model gets right and wrong, localises the weights of a layer that
    matter for the failures and not for the rest, searches new values for them, and accepts the result only if it passes
    the gate on all known data. It then writes `repaired.ckpt`, `report.json` and `report.md` to `<log_dir>/repair/`,
    logs to every logger, and leaves the repaired weights in the model. If nothing is accepted, the weights stay as
    training left them.

    Args:
        target: which failures are to be repaired, such as `Target.label(3)`; None: all.
        layer: dotted name of the layer or block to be repaired, several names, or `auto`: the last Linear (where
            there is none, the last convolution) is searched, and methods that train may change the whole network.
        gate: what is accepted: `instance` (no known passed sample broken), `accuracy` (at least as many repaired as
            broken), `tolerance:3` or `tolerance:1%`, or a `Gate`.
        method: how new weights are found: `auto`, `finetune-polish`, `convex`, `linearized`, `swarm`, or an object of
            `lightning_nrl.methods`.
        fitness: how candidates are ranked: `lexicographic` (fewer broken, then more repaired), `eq1` and `eq2` (the
            paper's equations), or a `Fitness`.
        localizer: how the weights to be searched are chosen; None: NeuRecoverLite with its default settings.
        n_passed: how many passed samples the search scores (#pos in the paper); None: all that are known.
        passed: where passed samples come from: `auto` (the train data), `train`, `val`, `repair` or a DataLoader.
        failed: where failures come from: `auto` (the data module's `repair_dataloader()` if it has one, else the
            validation data), `train`, `val`, `repair` or a DataLoader. All samples of both are known data, and the gate
            counts them.
        unseen: data that the repair never looks at, counted before and after for the report: `test`, `val`, a
            DataLoader or None.
        calibration: data that no search looks at, to choose the strength by: `val`, `test`, a DataLoader or None.
        task: what passed and loss mean: `multiclass`, `multilabel`, `segmentation`, `sequence`, or an object of
            `lightning_nrl.tasks`, such as `Regression(tolerance=0.1)`; None: multiclass classification from logits.
        adapter: takes your batches apart, `f(batch) -> (args, kwargs, target)`, or `package.module:function`; None:
            `(x, y, *extras)` or a mapping with the usual keys.
        reference: in an update, the model that the new one replaces: a module, the path of its checkpoint, a CSV file
            of its predictions, or an `OldModel`. Known samples that it gets right and the new one wrong are repaired.
        keep: in an update, what may not break: `both`, what either model gets right, or `reference`, what both do.
        start_from: `last`: the weights at the end of training; `best`: those of the best checkpoint.
        seed: the same seed gives the same repair.
        dirpath: folder for the files; None: `<log_dir>/repair`, or `<default_root_dir>/repair` without a logger.
        budget: bytes that the search may use on the device; None takes a share of what is free.
        max_time: seconds that the repair may take; None: as long as its method needs.
        strength: how much of the change that was found is made, above 0 to 2; None: all of it (1), or more where that
            repairs more and breaks no known sample and no more of the calibration data.
        limit: how many calibration samples may break, as a gate: the greatest strength within it is taken.
        sparse: the share of repairs that may be lost for a patch of fewer changed weights; None: no weights are spared.
        importance: what repairing each failed sample is worth, beside the others: a column of numbers above 0 (a key or
            a place in your batches, a function of a batch or its address), `{id: number}`, or `focal`: hard ones count
            more; None: all alike.
        slices: which slice each sample is in, likewise a column, or a target; the report has a row for each.
        quotas: how many targets of a slice must be repaired: `{"night": 5, "truck": "50%"}`.
        protected: passed samples that may not break, whatever the gate tolerates: a column of bools, a target, or ids
            by split; whole numbers say how many other samples one counts for.
        set_aside: failures that are no targets although they are in the target: a column of bools, a target, ids, or
            `doubtful`, those whose label looks wrong.
        confidence: of the limits that the report gives from calibration data, in (0, 1).
        mix: the expected share of each slice, or without slices of each class, among samples that are right before, for
            a limit under this mix.
        verbose: whether the report is printed at the end.

    Attributes:
        report: what was done, once it is done. With strategies that start processes (`ddp_spawn`) read the files.

    Raises:
        ConfigurationError: an argument that cannot be used, as early as that can be known.

    Example::

        repair = RegressionFreeRepair(target=Target.label(3))
        trainer = Trainer(max_epochs=10, callbacks=[repair])
        trainer.fit(model, datamodule=dm)
        trainer.test(model, ckpt_path=repair.repaired_model_path, datamodule=dm)
    """

    def __init__(
        self,
        target: Target | None = None,
        layer: str | list[str] = "auto",
        gate: str | Gate = "instance",
        method: str | Method | ParticleSwarm = "auto",
        fitness: str | Fitness = "lexicographic",
        localizer: Localizer | None = None,
        n_passed: int | None = None,
        passed: str | DataLoader = "auto",
        failed: str | DataLoader = "auto",
        unseen: str | DataLoader | None = None,
        calibration: str | DataLoader | None = None,
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
        reference: nn.Module | str | Path | State | Reference | None = None,
        keep: Literal["both", "reference"] = "both",
        start_from: Literal["last", "best"] = "last",
        seed: int = 0,
        dirpath: str | Path | None = None,
        budget: int | None = None,
        max_time: float | None = None,
        strength: float | None = None,
        limit: str | Gate | None = None,
        sparse: float | None = None,
        importance: Any = None,
        slices: Any = None,
        quotas: dict[str, int | float | str] | None = None,
        protected: Any = None,
        set_aside: Any = None,
        confidence: float = 0.95,
        mix: dict[str | int, float] | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        check_choice("start_from", start_from, ("last", "best"))
        self.settings = Settings(
            target=target if target is not None else Target.all(),
            layer=layer,
            gate=Gate.parse(gate),
            method=METHODS.parse("method", method),
            fitness=Fitness(fitness) if isinstance(fitness, str) else fitness,  # type: ignore[arg-type]
            localizer=localizer if localizer is not None else NeuRecoverLite(),
            n_passed=n_passed,
            seed=seed,
            budget=budget,
            max_time=max_time,
            strength=strength,
            limit=limit,
            sparse=sparse,
            keep=keep,
            importance=importance,
            slices=slices,
            quotas=quotas,
            protected=protected,
            set_aside=set_aside,
            confidence=confidence,
            mix=mix,
        )
        check_limit(self.settings, calibration is not None)
        self.task = parse_task(task)
        self.data = DataRequest(passed, failed, unseen, calibration)
        self.adapter = unpack if adapter is None else import_function("adapter", adapter)
        self.reference = parse_reference(reference)
        self.start_from = start_from
        self.dirpath = dirpath
        self.verbose = verbose
        self.report: RepairReport | None = None
        self._parameters: State | None = None
        self._pending = False
        self._ran = False

    @classmethod
    def from_paper(cls, row: str, **arguments: Any) -> RegressionFreeRepair:
        """A callback with the settings of one row of the paper's Table II, such as `EXP-B1`.

        Where the paper is silent or contradicts itself, the package's decisions stand (docs/concept.md).

        Args:
            row: the paper's ID of the experiment.
            **arguments: further arguments of the constructor, such as `target` and `layer`; they go before the row's.

        Raises:
            ConfigurationError: Table II has no such row.
        """
        return cls(**{**paper_arguments(row), **arguments})

    @property
    def repaired_model_path(self) -> str:
        """The repaired checkpoint; empty unless a repair was accepted."""
        return "" if self.report is None else self.report.files.get("checkpoint", "")

    @property
    def state_key(self) -> str:
        return self._generate_state_key(layer=self.settings.layer, target=str(self.settings.target))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_namespace(trainer)
        if stage == "fit":
            check_strategy(trainer)
            check_order(self, trainer, (WeightInterpolation,), self.start_from)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        find_scope(pl_module, self.settings.layer, include_bias=self.settings.localizer.include_bias)
        self._ran = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.report = self._parameters = None
        base_folder(self.dirpath, trainer)
        with random_state(), validating(trainer):
            known, *others = self._sources(trainer, pl_module, limit=1)
            evaluator = make_evaluator(trainer, pl_module, self.task)
            rehearse(evaluator, [*known, *chain(*others)], self.settings, reference=self.reference)
            if (
                self.reference is None
                and self.settings.layer == "auto"
                and getattr(self.settings.method, "trains", False)
            ):
                ContinuedTraining(trainer, pl_module, known).warn()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.run(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._ran:
            rank_zero_warn(
                explain(
                    "no repair was made, because no training step ran (training was complete, skipped or stopped).",
                    "to repair a trained checkpoint, call `lightning_nrl.repair(trainer, model, ckpt_path=...)`.",
                ),
                category=NotRepairedWarning,
            )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts the repaired weights into the file, whatever other callbacks have put there.

        That is so while `repaired.ckpt` is saved, before the live weights change, and afterwards as long as the live
        layer holds the repaired weights: weight averaging would save its average instead.
        """
        if self._parameters is not None and (self._pending or self._is_live(pl_module)):
            state = checkpoint["state_dict"]
            for name, value in self._parameters.items():
                state[name] = value.to(state.get(name, value).device, copy=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.report is None else {"report": self.report.to_json()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "report" in state_dict:
            self.report = RepairReport.from_json(state_dict["report"])

    def run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Repairs, saves, logs, and last of all writes the repaired weights into the model."""
        with starting_weights(self.start_from, trainer, pl_module) as start:
            outcome = self.attempt(trainer, pl_module)
            self.finish(trainer, pl_module, outcome)
            start.keep = outcome.parameters is not None

    def attempt(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int | None = None) -> Outcome:
        """Searches a repair. The model, the trainer and the random state are left as found.

        Args:
            trainer: in the middle of a fit.
            pl_module: its module.
            epochs: how many the model was trained for; None: those of this fit.
        """
        self._ran = True
        epochs = epochs_of(trainer) if epochs is None else epochs
        with random_state(), validating(trainer), RepairProgress(trainer) as progress:
            batches = batch_limit(trainer)
            known, unseen, calibration = self._sources(trainer, pl_module, limit=batches)
            warn_if_random(known)
            left_out = (RegressionFreeRepair, WeightInterpolation)
            training = ContinuedTraining(trainer, pl_module, known, epochs, left_out=left_out)
            return repair_module(
                make_evaluator(trainer, pl_module, self.task),
                known,
                self.settings,
                unseen=unseen,
                calibration=calibration,
                training=training,
                reference=self.reference,
                observer=progress,
            )

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outcome: Outcome) -> None:
        """Writes the files, logs, prints, and last of all changes the weights."""
        folder, accepted = output_folder(self.dirpath, trainer), outcome.parameters is not None
        report = replace(outcome.report, files=file_names(folder, checkpoint=accepted))
        # A second repair in one log gets tags of its own, as it gets a folder of its own.
        name = folder.name if folder is not None and self.dirpath is None else "repair"
        self.report, self._parameters, self._pending = report, outcome.parameters, True
        try:
            if accepted and folder is not None:
                trainer.save_checkpoint(report.files["checkpoint"], weights_only=False)
            if trainer.is_global_zero:
                write_report(report)
                track(report, trainer.loggers, step=trainer.global_step, change=outcome.change, name=name)
                if self.verbose:
                    show(report)
            trainer.callback_metrics.update(headline(report, name))
        except BaseException:
            self.report = self._parameters = None
            raise
        finally:
            self._pending = False
        outcome.write(pl_module)

    def _sources(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, limit: int | None
    ) -> tuple[list[LoaderSource], list[LoaderSource], list[LoaderSource]]:
        """Known, unseen and calibration data."""
        how: dict[str, Any] = {"adapter": self.adapter, "seed": self.settings.seed, "limit": limit}
        known, unseen = self.data.sources(trainer, pl_module, **how)
        return known, unseen, self.data.calibration_sources(trainer, pl_module, **how)

    def _is_live(self, pl_module: pl.LightningModule) -> bool:
        return not changed(pl_module, self._parameters or {})
