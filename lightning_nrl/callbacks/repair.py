"""The Lightning shell of a repair: hooks and checks, in order; `lightning_nrl.pipeline` makes the repair."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nrl._trainer import repair_files, trainer_checks
from lightning_nrl._trainer.data_splits import DataOptions, DataRequest
from lightning_nrl._trainer.lightning.packages import CallbackBase, LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import logged_hparams, state_key_of
from lightning_nrl._trainer.tracking.loggers import declare
from lightning_nrl._trainer.trainer_repair import TrainerRepair
from lightning_nrl._trainer.trainer_state import StartingWeights, epochs_of, handle_signals, starting_weights
from lightning_nrl._utils.interrupts import defer_signals
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import State, changed, saved_names
from lightning_nrl.callbacks.weight_interpolation import WeightInterpolation
from lightning_nrl.data.targets import Target, parse_target
from lightning_nrl.errors import ConfigurationError, DataWarning, TrainingWarning, first_line
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.evaluation.layers import find_scope
from lightning_nrl.methods import METHODS, AnyMethod
from lightning_nrl.pipeline import BoundOptions, Outcome, SearchOptions, Settings
from lightning_nrl.pipeline.input_checks import check_limit
from lightning_nrl.pipeline.settings import AnyGate, parse_gate, with_paper_row
from lightning_nrl.report import RepairReport
from lightning_nrl.tasks import Task, parse_task
from lightning_nrl.updates.old_model import Reference, parse_reference


class RepairCallback(CallbackBase):
    """A callback that repairs the model of its trainer."""

    settings: Settings
    data: DataOptions

    @property
    def state_key(self) -> str:
        return state_key_of(self, layer=self.settings.layer, target=str(self.settings.target))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer_checks.check_packages(trainer)
        if stage == "fit":
            trainer_checks.check_strategy(trainer)
            trainer_checks.check_twins(self, trainer)
            earlier, start_from = (WeightInterpolation,), self.data.start_from
            trainer_checks.check_order(self, trainer, earlier, start_from, kind=RepairCallback)
            if hparams := logged_hparams(trainer):  # which Lightning logs next
                declare(trainer.loggers, hparams)


class RegressionFreeRepair(RepairCallback):
    """Repairs the model that `fit` has trained, and keeps what worked working.

    After training, the callback collects what the model gets right and wrong, and searches new values for weights of a
    layer that matter for the failures and not for the rest. As far as it pays, it then solves that layer, and where
    more may change, training goes on and what broke is polished away. The result is accepted only if it passes the gate
    on all known data. The callback writes `repaired.ckpt`, the weight change (`repair.patch.safetensors`),
    `report.json` and `report.md` to `<log_dir>/repair/`, logs to every logger, and leaves the repaired weights in the
    model. If nothing is accepted, the weights stay as training left them.

    Args:
        target: the failures to repair, such as `Target.label(3)` or `"label 3"`; None: all.
        layer: dotted name of the layer or block to be repaired, several names, or `auto`: the last Linear (where
            there is none, the last convolution) is searched, and training may change the whole network.
        gate: what is accepted: `instance` (no known passed sample broken), `instance-in-target` (none in the target),
            `accuracy` (at least as many repaired as broken), `tolerance:3` or `tolerance:1%`, or a `Gate`.
        method: how new weights are found: `auto`, `finetune-polish`, `convex`, `linearized`, `swarm`, or an object of
            `lightning_nrl.methods`.
        task: what passed and loss mean: `multiclass`, `binary`, `multilabel`, `segmentation`, `sequence`, or an
            object of `lightning_nrl.tasks`, such as `Regression(tolerance=0.1)`; None: one class a sample, from logits.
        reference: in an update, the model that the new one replaces: a module, the path of its checkpoint, a CSV file
            of its predictions, or an `OldModel`. Known samples that it gets right and the new one wrong are repaired.
        unseen: data that the repair never looks at, counted before and after for the report: `test`, `val`, a
            DataLoader or None.
        calibration: data that no search looks at, to choose the strength by: `val`, `test`, a DataLoader or None.
        data: where known data come from, how their batches are read, and which weights are repaired: `DataOptions`.
        samples: what each sample counts, slices, and samples that may not break: `SampleOptions`.
        search: how candidates are ranked and searched: `SearchOptions`.
        bounds: how much of the change is made, and what is said of other samples: `BoundOptions`.
        max_time: seconds that the repair may take; None: no limit, its work is counted by the epochs of the fit.
        seed: the same seed gives the same repair.
        dirpath: folder for the files; None: `repair` in the folder of the logger's run, or in `default_root_dir`.
        verbose: whether the report is printed at the end.

    Attributes:
        report: what was done, once it is done.

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
        target: Target | str | None = None,
        layer: str | list[str] = "auto",
        gate: AnyGate = "instance",
        method: str | AnyMethod = "auto",
        task: str | Task | None = None,
        reference: nn.Module | str | Path | State | Reference | None = None,
        unseen: str | DataLoader[Any] | None = None,
        calibration: str | DataLoader[Any] | None = None,
        data: DataOptions | None = None,
        samples: SampleOptions | None = None,
        search: SearchOptions | None = None,
        bounds: BoundOptions | None = None,
        max_time: float | None = None,
        seed: int = 0,
        dirpath: str | Path | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.settings = Settings(
            target=parse_target("all" if target is None else target),
            layer=layer,
            gate=parse_gate(gate),
            method=METHODS.parse("method", method),
            max_time=max_time,
            seed=seed,
            search=SearchOptions() if search is None else search,
            bounds=BoundOptions() if bounds is None else bounds,
            samples=SampleOptions() if samples is None else samples,
        )
        self.data = DataOptions() if data is None else data
        check_limit(self.settings, calibration is not None)
        self.repair = TrainerRepair(
            settings=self.settings,
            data=DataRequest(self.data, unseen, calibration),
            task=parse_task(task),
            reference=parse_reference(reference),
            left_out=(RepairCallback, WeightInterpolation),
        )
        self.dirpath = dirpath
        self.verbose = verbose
        self._report: RepairReport | None = None
        self._box = repair_files.ResultBox()
        self._parameters: State | None = None
        self._pending = False
        self._ran = False
        self._work, self._name = ResumeStore(), "repair"

    @classmethod
    def from_paper(cls, row: str, **arguments: Any) -> RegressionFreeRepair:
        """Makes a callback with the settings of one row of the paper's Table II, such as `EXP-B1` (docs/paper.md).

        Further arguments of the constructor go before those of the row.
        """
        return cls(**with_paper_row(row, arguments))

    @property
    def report(self) -> RepairReport | None:
        """The report, once the repair is done; also if a strategy did it in processes of its own."""
        if text := self._box.take():
            self._report = RepairReport.from_json(text)
        return self._report

    @report.setter
    def report(self, report: RepairReport | None) -> None:
        self._report = report

    @property
    def repaired_model_path(self) -> str | None:
        """The repaired checkpoint; None unless a repair was accepted, so that `test` takes the model as it is."""
        return None if self.report is None else self.report.files.get("checkpoint")

    @property
    def patch_path(self) -> str | None:
        """The weight change as a file, for `Patch.load`; None without an accepted repair."""
        return None if self.report is None else self.report.files.get("patch")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer_checks.check_whole(pl_module)
        if self.settings.layer != "auto":  # which takes a layer that the prediction calls
            find_scope(pl_module, self.settings.layer, include_bias=self.settings.localizer.include_bias)
        self._ran = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ran = True
        self.report = self._parameters = None
        repair_files.check_folder(self.dirpath, trainer)
        self.repair.check(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `trainer.test()` without a model loads the best checkpoint of the fit, which was saved before the repair.
        if self._is_changed(pl_module):
            problem = f"what is tested are not the repaired weights: {trainer.ckpt_path or 'others'} was loaded."
            hint = f"test the repair by `ckpt_path={self.repaired_model_path!r}`."
            if not self.repaired_model_path:
                hint = "test the repair by `trainer.test(model)`, with the model as the fit left it."
            rank_zero_warn(TrainingWarning(problem, hint))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.repair_now(trainer, pl_module, self.data.start_from)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._ran:
            trainer_checks.warn_without_step()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.add_to(checkpoint, pl_module, self.state_key)

    def add_to(self, checkpoint: dict[str, Any], pl_module: LightningModule, state_key: str) -> None:
        """Puts the repaired weights into a checkpoint, and the report as the state of the callback with this key.

        Weights go there while `repaired.ckpt` is saved, before the live weights change, and as long as the live layer
        holds them. Weight averaging would save its average instead, and load the live weights over it.
        """
        if self.report is not None:
            checkpoint.setdefault("callbacks", {}).setdefault(state_key, {})["report"] = self.report.to_json()
        if self._parameters and (self._pending or not self._is_changed(pl_module)):
            state = checkpoint["state_dict"] = checkpoint.get("current_model_state", checkpoint["state_dict"])
            saved = saved_names(pl_module)
            for key in (*saved, *(self._parameters.keys() - saved.values())):
                if (value := self._parameters.get(saved.get(key, key))) is not None:
                    state[key] = value.to(state.get(key, value).device, copy=True)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # `state_dict` is not there: Lightning would refuse twins before `setup` says why.
        if isinstance(state_dict, dict) and "report" in state_dict:
            try:
                self.report = RepairReport.from_json(state_dict["report"])
            except ConfigurationError as error:
                problem = f"the report in the checkpoint cannot be read ({first_line(error)})"
                hint = "training goes on without it; the weights are those of the checkpoint."
                rank_zero_warn(DataWarning(f"{problem}.", hint))

    def repair_now(
        self, trainer: Trainer, pl_module: LightningModule, start_from: str = "last", name: str = "repair"
    ) -> Outcome:
        """Searches a repair in a fit, saves it, writes it into the model, logs and prints it under this name."""
        self._name = name
        self.report = self._parameters = None
        with self.handle_signals(trainer), starting_weights(start_from, trainer, pl_module) as start:
            outcome = self.attempt(trainer, pl_module)
            logged = self.save(trainer, pl_module, outcome, start)
        self.announce(trainer, outcome, logged)
        return outcome

    def training_went_on(self, pl_module: LightningModule) -> None:
        """Forgets repaired weights that further training has changed."""
        if self._is_changed(pl_module):
            self._parameters = None

    def attempt(self, trainer: Trainer, pl_module: LightningModule, epochs: int | None = None) -> Outcome:
        """Searches a repair of a model trained for `epochs`, by default those of this fit; changes nothing."""
        self._work = repair_files.saved_work(self._folder, trainer, self.settings.search.save_every, self._name)
        return self.repair.run(trainer, pl_module, epochs_of(trainer) if epochs is None else epochs, self._work)

    def save(
        self, trainer: Trainer, pl_module: LightningModule, outcome: Outcome, start: StartingWeights | None = None
    ) -> str:
        """Writes the files, and the repaired weights into the model once the files are there; returns the logged name.

        A file that cannot be written costs a warning.
        """
        accepted = outcome.parameters is not None
        kinds = repair_files.REPAIRED_FILES if accepted else repair_files.REPORT_FILES
        files, name = repair_files.report_files(self._folder, trainer, self._name, kinds)
        origin = outcome.report.provenance.loaded_from(trainer.ckpt_path if start is None else start.path)
        report = self.report = replace(outcome.report, files=files, provenance=origin)
        parameters = self._parameters = outcome.parameters
        self._pending = True
        try:
            with repair_files.SavedFiles(files, trainer, tuple(repair_files.REPAIRED_FILES.values())) as saved:
                if parameters is not None:
                    saved.patch(report, pl_module, parameters)
                    saved.checkpoint(report, pl_module, parameters)
                report = saved.reports(report, outcome.views, outcome.changes)
                with defer_signals():
                    saved.commit()
                    outcome.write(pl_module)
                    self.report, self._pending = report, False
                    if start is not None:
                        start.keep = accepted
                    self._work.done()
                self.report = report = saved.tell(report, accepted)
            if trainer.is_global_zero:
                self._box.put(report.to_json)
        except BaseException:
            if self._pending:
                self.report = self._parameters = None
            raise
        finally:
            self._pending = False
        return name

    def announce(self, trainer: Trainer, outcome: Outcome, name: str) -> None:
        """Logs and prints the report of a saved repair."""
        assert self.report is not None
        how: dict[str, Any] = {"changes": outcome.changes, "views": outcome.views, "verbose": self.verbose}
        repair_files.announce(self.report, trainer, name, **how)

    def handle_signals(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Handles Ctrl-C and SIGTERM within seconds, and says what becomes of the repair."""
        return handle_signals(trainer, lambda: self.report is not None, lambda: self._work.place)

    def _is_changed(self, pl_module: LightningModule) -> bool:
        """True if the model holds other weights than the repaired ones."""
        return bool(self._parameters and changed(pl_module, self._parameters))

    @property
    def _folder(self) -> str | Path | None:
        one = self.dirpath is None or self._name == "repair"
        return self.dirpath if one else Path(str(self.dirpath)) / self._name
