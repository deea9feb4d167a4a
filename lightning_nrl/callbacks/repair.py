"""`RegressionFreeRepair`: hooks and checks around the repair of `lightning_nrl.pipeline`."""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_nrl._trainer import trainer_checks
from lightning_nrl._trainer.lightning.packages import (
    CallbackBase,
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    CheckpointState,
    callbacks_of_class,
    logged_hparams,
    state_key_of,
)
from lightning_nrl._trainer.lightning.step_outputs import follow_hook, follow_own_hook, release_hook
from lightning_nrl._trainer.output import announcement, folders, repair_files
from lightning_nrl._trainer.output.result_box import ResultBox
from lightning_nrl._trainer.reading.data_splits import DataChoice, DataOptions, DataRequest
from lightning_nrl._trainer.steps.proof import logged_accuracies
from lightning_nrl._trainer.tracking.loggers import declare
from lightning_nrl._trainer.trainer_repair import TrainerRepair
from lightning_nrl._trainer.trainer_state import (
    StartingWeights,
    epochs_of,
    handle_signals,
    starting_weights,
)
from lightning_nrl._utils.interrupts import defer_signals
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import (
    State,
    changed,
    current_state,
    hash_tensor,
    saved_names,
)
from lightning_nrl.callbacks.weight_interpolation import WeightInterpolation
from lightning_nrl.data import Target, parse_target
from lightning_nrl.errors import ConfigurationError, DataWarning, TrainingWarning, first_line
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.evaluation.layers import find_scope
from lightning_nrl.gate import Gate
from lightning_nrl.methods import METHODS, AnyMethod, with_lora
from lightning_nrl.pipeline import BoundOptions, Outcome, SearchOptions, Settings
from lightning_nrl.pipeline.input_checks import check_limit
from lightning_nrl.release.suite import RegressionSuite, protecting, repaired_samples
from lightning_nrl.report import RepairReport
from lightning_nrl.tasks import Task
from lightning_nrl.tasks.custom import task_of_output
from lightning_nrl.updates.old_model import AnyReference, parse_reference


@dataclass
class AcceptedWeights:
    """New weights, and those that they replace. `hashes` is empty until the model has the new ones.

    It then has the hash of each of the model's tensors.
    """

    parameters: State
    evaluated: State
    hashes: Mapping[str, str] = field(default_factory=dict)


class RegressionFreeRepair(CallbackBase):
    """Repairs failures of a model after `fit` without breaking known samples that it gets right.

    After training, the callback evaluates the known data. The default method then searches new
    values for some weights of one layer, solves a convex problem for the layer, and, if the whole
    network may change, continues the training and takes small steps until no known sample is
    broken. It proposes the result that repairs most without harm to held-out samples. If the gate
    accepts this result on all known data, the callback writes `repaired.ckpt` and the weight change
    (`repair.patch.safetensors`), and leaves the repaired weights in the model. Otherwise the
    weights stay unchanged. In any case it writes the report (JSON, Markdown, HTML) to
    `<log_dir>/repair/` and to every logger.

    Args:
        target: the failures to repair, such as `Target.label(3)` or `"label 3"`. None means all
            failures.
        layer: dotted name of the layer or block to repair, or several names. With `auto`, training
            changes the whole network; the other steps change the last Linear, or the last
            convolution if there is no Linear.
        gate: condition for acceptance: `instance` (no known passed sample is broken),
            `instance-in-target` (no sample in the target is broken), `accuracy` (at least as many
            samples are repaired as broken), `tolerance:3` or `tolerance:1%` (at most 3, or 1 % of
            the passed samples, are broken), or a `Gate`.
        method: repair method: `auto`, `finetune-polish`, `convex`, `swarm`, or an object of
            `lightning_nrl.methods`.
        lora: rank, or `peft.LoraConfig`, of adapters (LoRA) that `finetune-polish` moves instead of
            the weights. It writes them to `adapter/`, too, for `PeftModel.from_pretrained`. None
            moves the weights.
        task: definition of correctness and loss: `multiclass`, `binary`, `multilabel`,
            `segmentation`, `sequence`, or an object of `lightning_nrl.tasks`, such as
            `Regression(tolerance=0.1)`. None means `multiclass`.
        reference: in a model update, the model that is replaced: a module, the path of its
            checkpoint, a CSV file of its predictions, or an `OldModel`. Only known samples that the
            replaced model gets right are then repaired.
        unseen: data that the repair never uses: `test`, `val`, a DataLoader or None. The report
            counts how many of these samples break and how many are repaired.
        calibration: data that no search uses, for choosing how much of the weight change to make:
            `val`, `test`, a DataLoader or None.
        data: `DataOptions` with the sources of known data, the adapter for batches, and the weights
            to repair.
        samples: `SampleOptions` with sample weights, slices, and protected samples.
        search: `SearchOptions` with the ranking, localisation and size of the search.
        bounds: `BoundOptions` with how much of the weight change to make, and which bounds for
            future data to report.
        max_time: time limit in seconds. With None, the time grows with the number of epochs that
            the fit had.
        seed: seed of the repair. The same seed gives the same repair.
        dirpath: folder for the files. None takes `repair` in the logger's folder or, if there is no
            logger, in `default_root_dir`.
        verbose: if True, prints the report at the end.
        suite: samples that must stay right: a `RegressionSuite` or the path of its CSV file, to
            which an accepted repair adds the repaired targets.

    Attributes:
        report: the report. None before the repair.

    Raises:
        ConfigurationError: an argument is invalid. Raised on construction, or in `fit` if the check
            needs the model.

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
        gate: str | Gate = "instance",
        method: str | AnyMethod = "auto",
        lora: Any = None,
        task: str | Task | None = None,
        reference: AnyReference | None = None,
        unseen: DataChoice = None,
        calibration: DataChoice = None,
        data: DataOptions | None = None,
        samples: SampleOptions | None = None,
        search: SearchOptions | None = None,
        bounds: BoundOptions | None = None,
        max_time: float | None = None,
        seed: int = 0,
        dirpath: str | Path | None = None,
        verbose: bool = True,
        suite: RegressionSuite | str | Path | None = None,
    ) -> None:
        super().__init__()
        self.suite = None if suite is None else RegressionSuite.read(suite, may_be_new=True)
        parsed_method = METHODS.parse("method", method)
        if lora is not None:
            parsed_method = with_lora(parsed_method, lora)
        self.settings = Settings(
            target=parse_target("all" if target is None else target),
            layer=layer,
            gate=Gate.parse(gate),
            method=parsed_method,
            max_time=max_time,
            seed=seed,
            search=search or SearchOptions(),
            bounds=bounds or BoundOptions(),
            samples=samples or SampleOptions(),
        )
        if self.suite is not None:
            protecting(self.settings.samples, self.suite)  # refuses other protected samples
        self.data = data or DataOptions()
        check_limit(self.settings, calibration is not None)
        self.trainer_repair = TrainerRepair(
            settings=self.settings,
            data=DataRequest(self.data, unseen, calibration),
            task=task_of_output(task, self.data.output),
            reference=parse_reference(reference),
            left_out=(RegressionFreeRepair, WeightInterpolation),
            suite=self.suite,
        )
        self.dirpath = dirpath
        self.verbose = verbose
        self._report: RepairReport | None = None
        self._box = ResultBox()
        self._accepted: AcceptedWeights | None = None
        self._ran = False
        self._validated_at: int | None = None  # step of the last validation of all data
        self._store, self._name = ResumeStore(), "repair"

    @classmethod
    def from_paper(cls, row: str, **arguments: Any) -> RegressionFreeRepair:
        """Returns a callback set up as a row of the paper's Table II, such as `EXP-B1`.

        `arguments` override the row.
        """
        # Most users never need the wing.
        with_paper_row = pkgutil.resolve_name("lightning_nrl.study.table_ii:with_paper_row")
        return cls(**with_paper_row(row, arguments))

    @property
    def report(self) -> RepairReport | None:
        """The report of the last repair, or None before a repair.

        It may be from another process, if the strategy ran the repair there.
        """
        if text := self._box.take():
            self._report = RepairReport.from_json(text)
        return self._report

    @property
    def repaired_model_path(self) -> str | None:
        """Path of the repaired checkpoint, or None if no repair was accepted.

        None is valid as `ckpt_path` of `test`, too.
        """
        return None if self.report is None else self.report.files.get("checkpoint")

    @property
    def patch_path(self) -> str | None:
        """Path of the weight change, which `Patch.load` reads. None if no repair was accepted."""
        return None if self.report is None else self.report.files.get("patch")

    @property
    def state_key(self) -> str:
        return state_key_of(self, layer=self.settings.layer, target=str(self.settings.target))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer_checks.check_packages(trainer)
        if stage == "fit":
            trainer_checks.check_strategy(trainer)
            trainer_checks.check_twins(self, trainer)
            earlier, start_from = (WeightInterpolation,), self.data.start_from
            trainer_checks.check_order(
                self, trainer, earlier, start_from, kind=RegressionFreeRepair
            )
            if hparams := logged_hparams(trainer):  # which Lightning logs next
                declare(trainer.loggers, hparams)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer_checks.check_whole(pl_module)
        if self.settings.layer != "auto":
            find_scope(
                pl_module, self.settings.layer, include_bias=self.settings.localizer.include_bias
            )
        self._ran = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ran = True
        # It may be left from a training that ended without calling the hook.
        release_hook(pl_module, "on_train_end")
        self._report = self._accepted = None
        folders.check_folder(self.dirpath, trainer)
        self.trainer_repair.check(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `trainer.test()` without a model loads the best checkpoint of the fit, from before the
        # repair.
        if self._is_changed(pl_module):
            call = "`trainer.test(model)`, with the model as the fit left it"
            if self.repaired_model_path:
                call = f"`ckpt_path={self.repaired_model_path!r}`"
            rank_zero_warn(
                TrainingWarning(
                    "the test uses other weights than the repaired ones "
                    f"(loaded: {trainer.ckpt_path or 'nothing'}).",
                    f"test the repair by {call}.",
                )
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.limit_val_batches == 1.0:
            self._validated_at = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        repair = partial(self.repair_now, trainer, pl_module, self.data.start_from)
        follow_own_hook(pl_module, "on_train_end", repair)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        release_hook(pl_module, "on_train_end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._ran:
            trainer_checks.warn_without_step()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The module's own `teardown` is the last hook of a fit.
        if stage == "fit" and self._accepted is not None:
            warn = partial(self._warn_if_undone, trainer, pl_module, self._accepted.hashes)
            follow_hook(pl_module, "teardown", warn)

    def _warn_if_undone(
        self, trainer: Trainer, pl_module: LightningModule, hashes: Mapping[str, str]
    ) -> None:
        # A later repair may have changed the weights again.
        repairs = (self, *callbacks_of_class(trainer, RegressionFreeRepair))
        if any(repair.is_repaired(pl_module) for repair in repairs):
            return
        current = _hashes(pl_module)
        names = [name for name, digest in hashes.items() if current.get(name) != digest]
        rank_zero_warn(
            TrainingWarning(
                "the fit ends with other weights than the repaired ones: a hook that ran after "
                f"the repair changed {names[0]!r} ({len(names)} of {len(current)} tensors). The "
                "report does not describe this model.",
                "change weights in the module's `on_train_end`, or in a callback before the "
                f"repair; load the repaired weights from {self.repaired_model_path}.",
            )
        )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: CheckpointState
    ) -> None:
        """Writes the report and the repaired weights into a checkpoint.

        The weights are written to `repaired.ckpt`, which is saved before the model changes, and
        later to any checkpoint of a model that has them. They replace the average of a
        weight-averaging callback.
        """
        if self.report is not None:
            states = checkpoint.setdefault("callbacks", {})
            states.setdefault(self.state_key, {})["report"] = self.report.to_json()
        accepted = self._accepted
        if accepted is not None and (not accepted.hashes or not self._is_changed(pl_module)):
            state = checkpoint.get("current_model_state") or checkpoint["state_dict"]
            checkpoint["state_dict"] = state
            saved = saved_names(pl_module)
            for key in (*saved, *(accepted.parameters.keys() - saved.values())):
                value = accepted.parameters.get(saved.get(key, key))
                if value is not None:
                    state[key] = value.to(state.get(key, value).device, copy=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # There is no method `state_dict`: with one, Lightning would refuse equal callbacks before
        # `setup` can say why.
        if "report" in state_dict:
            try:
                self._report = RepairReport.from_json(state_dict["report"])
            except ConfigurationError as error:
                rank_zero_warn(
                    DataWarning(
                        f"the report in the checkpoint cannot be read ({first_line(error)}).",
                        "training continues without it; the weights are those of the checkpoint.",
                    )
                )

    def repair_now(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        start_from: str = "last",
        name: str = "repair",
    ) -> Outcome:
        """Repairs the model within a fit.

        `start_from` is as in `DataOptions`. `name` is used in files and logs.
        """
        began = time.perf_counter()
        self._name = name
        self._report = self._accepted = None
        with (
            self.handle_signals(trainer),
            starting_weights(start_from, trainer, pl_module) as start,
        ):
            is_validated = self._validated_at == trainer.global_step and not start.path
            logged = {"val": logged_accuracies(trainer, "val")} if is_validated else {}
            outcome = self.attempt(trainer, pl_module, began=began, logged=logged)
            log_name = self.save_outcome(trainer, pl_module, outcome, start)
        self.announce(trainer, outcome, log_name)
        return outcome

    def attempt(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        epochs: int | None = None,
        *,
        began: float | None = None,
        logged: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Outcome:
        """Searches for a repair without changing the model.

        `epochs` (None: as in the fit) limits further training. `max_time` counts from `began`, a
        moment of `time.perf_counter`, or else from now. `logged` is as in `Evaluator`.
        """
        save_every = self.settings.search.save_every
        self._store = folders.resume_store(self._folder, trainer, save_every, self._name)
        return self.trainer_repair.run(
            trainer, pl_module, epochs or epochs_of(trainer), self._store, began, logged
        )

    def save_outcome(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outcome: Outcome,
        start: StartingWeights | None = None,
    ) -> str:
        """Writes the files (or warns), then accepted weights to the model.

        Returns the repair's name in loggers.
        """
        parameters = outcome.parameters
        kinds = repair_files.REPORT_FILES if parameters is None else repair_files.REPAIRED_FILES
        if outcome.adapter is not None:
            kinds = {**kinds, "adapter": "adapter"}
        checkpoint = trainer.ckpt_path if start is None else start.path
        files, name = folders.report_files(self._folder, trainer, self._name, kinds)
        provenance = outcome.report.provenance.loaded_from(checkpoint)
        report = self._report = replace(outcome.report, files=files, provenance=provenance)
        self._accepted = accepted = None
        if parameters is not None:
            self._accepted = accepted = AcceptedWeights(parameters, outcome.evaluated or {})
        is_saved = False
        try:
            file_names = ("adapter", *repair_files.REPAIRED_FILES.values())
            with repair_files.SavedFiles(files, trainer, file_names) as saved:
                if parameters is not None:
                    saved.patch(report, pl_module, parameters)
                    saved.checkpoint(pl_module, parameters)
                if outcome.adapter is not None:
                    saved.write("adapter", outcome.adapter.write)
                report = saved.reports(report, outcome.views, outcome.changes)
                with defer_signals():
                    saved.commit()
                    if outcome.write(pl_module) and accepted is not None:
                        accepted.hashes = _hashes(pl_module)
                    self._report, is_saved = report, True
                    if start is not None:
                        start.keep = parameters is not None
                    self._store.done()
                report = self._report = saved.warn_missing(report, parameters is not None)
            if trainer.is_global_zero:
                self._box.put(report.to_json)
                if self.suite is not None and report.files:
                    self.suite.grow_by(repaired_samples(report))
        except BaseException:
            if not is_saved:
                self._report = self._accepted = None
            raise
        return name

    def announce(self, trainer: Trainer, outcome: Outcome, name: str) -> None:
        """Logs and prints the report of a saved repair."""
        assert self.report is not None
        announcement.announce(
            self.report,
            trainer,
            name,
            changes=outcome.changes,
            views=outcome.views,
            verbose=self.verbose,
        )

    def handle_signals(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Returns a context in which Ctrl-C and SIGTERM stop the repair and print its state.

        The repair stops within seconds.
        """
        return handle_signals(trainer, lambda: self.report is not None, lambda: self._store.place)

    def is_repaired(self, pl_module: LightningModule) -> bool:
        """True if the model is as the last accepted repair left it."""
        return self._accepted is not None and self._accepted.hashes == _hashes(pl_module)

    def _is_changed(self, pl_module: LightningModule) -> bool:
        """True if the model has neither the repaired weights nor those that were evaluated."""
        accepted = self._accepted
        if accepted is None or not changed(pl_module, accepted.parameters):
            return False
        return bool(changed(pl_module, accepted.evaluated))

    @property
    def _folder(self) -> str | Path | None:
        if self.dirpath is None or self._name == "repair":
            return self.dirpath
        return Path(self.dirpath) / self._name


def _hashes(model: nn.Module) -> dict[str, str]:
    """Returns the hash of each parameter and persistent buffer, on any device."""
    return {name: hash_tensor(value) for name, value in current_state(model).items()}
