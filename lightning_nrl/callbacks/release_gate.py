"""`ReleaseGate`, which runs the release gate in `trainer.test` or `trainer.validate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_nrl._trainer.lightning.packages import (
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    Loaders,
    batch_limit,
    batch_limits,
    data_module_of,
)
from lightning_nrl._trainer.output.announcement import show
from lightning_nrl._trainer.output.folders import check_folder, report_files
from lightning_nrl._trainer.output.repair_files import RELEASE_FILES, write_report
from lightning_nrl._trainer.reading.data_splits import SplitLoaders
from lightning_nrl._trainer.reading.loaders import (
    SPLITS,
    LoaderSource,
    StreamSource,
    batch_size_of,
    check_loader,
    check_loaders,
    loaders_in,
    make_source,
    pieces_of,
    split_and_loader,
)
from lightning_nrl._trainer.steps.proof import logged_accuracies
from lightning_nrl._trainer.tracking.loggers import track_release
from lightning_nrl._trainer.tracking.scalars import release_numbers
from lightning_nrl._utils.atomic_files import check_writable
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import random_state
from lightning_nrl.callbacks.data_callback import DataCallback
from lightning_nrl.data.batch import Adapter
from lightning_nrl.data.columns import Column
from lightning_nrl.data.sample_identity import read_keys
from lightning_nrl.errors import ConfigurationError, DataWarning, check_whole
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.pipeline.input_checks import check_classes
from lightning_nrl.records.provenance import today
from lightning_nrl.release import RegressionSuite, ReleaseReport, Rule
from lightning_nrl.release.accepted import predictions_beside
from lightning_nrl.release.junit import write_error, write_junit
from lightning_nrl.release.model_pair import ModelPair, evaluate_pieces
from lightning_nrl.release.release_report import (
    Criteria,
    OnUndecided,
    check_reference,
    judge_pair,
)
from lightning_nrl.release.rule_parsing import Require
from lightning_nrl.release.suite import released_samples
from lightning_nrl.tasks import Task
from lightning_nrl.updates.old_model import AnyReference, OldModel, in_memory
from lightning_nrl.updates.predictions import Predictions

TRAINING_SAMPLES = 1000
"""Number of training samples whose contents are sought in the tested data, to limit time."""


class ReleaseGate(DataCallback):
    """Decides in `trainer.test` or `trainer.validate` if the model may replace the one in use.

    After the test, each model makes one pass over the data in the precision of the trainer. The
    decision is printed, logged and written to `<log_dir>/release/` as `report.json`, `report.md`
    and `report.html`. The same folder gets the predictions of the tested model, `predictions.csv`,
    for use as `reference` at the next release. Data without an index, such as an `IterableDataset`,
    are read once for both models, and the id of a sample is its number.

    Args:
        reference: the model in use: a module, the path of its checkpoint or of its predictions
            (CSV), or an `OldModel`.
        rules: the rules to satisfy, as texts such as `nfr:1%` or as objects; see
            `lightning_nrl.release.release_report`.
        require: a further condition for each split: `not-worse` (no more samples broken than
            repaired), `better` (a gain that is significant at 5 % in the sign test), or `any` (no
            condition).
        slices: as in `RegressionMetrics`.
        loaders: data to judge instead of the trainer's, as `{name: data loader}`. A trainer's
            loaders are named by the keys of a mapping, or `test`, or `test:0`, `test:1` and so on;
            in `validate`, `val` replaces `test`.
        task: as in `RegressionFreeRepair`.
        adapter: as in `DataOptions`.
        output: as in `DataOptions`.
        seed: seed for random transforms of the data.
        dirpath: folder for the files. None means `<log_dir>/release`.
        verbose: if True, prints the decision.
        on_undecided: as in `lightning_nrl.release.release_report`.
        junit: file for the decision as JUnit XML, for CI services; see `to_junit`.
        suite: samples that must stay right: a `RegressionSuite` or the path of its CSV file, which
            grows by the samples that an accepted release repairs or breaks.
        sample_id: as in `lightning_nrl.release.release_report`.
        noise: as in `lightning_nrl.release.release_report`.

    Attributes:
        report: the `ReleaseReport` with the decision. None until the test has ended.

    Example::

        gate = ReleaseGate(reference="old.ckpt", rules=["nfr:1%"])
        Trainer(callbacks=[gate]).test(model, ckpt_path="new.ckpt", datamodule=dm)
        sys.exit(gate.report.exit_status)
    """

    stages = ("test", "validate")
    only_evaluates = True
    hint = "test with a single device or with ddp."

    def __init__(
        self,
        reference: AnyReference,
        rules: str | Rule | list[str | Rule] = "instance",
        require: Require = "not-worse",
        slices: str | int | Column | None = None,
        loaders: Mapping[str, Loaders] | None = None,
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
        output: int | str | None = None,
        seed: int = 0,
        dirpath: str | Path | None = None,
        verbose: bool = True,
        on_undecided: OnUndecided | None = None,
        junit: str | Path | None = None,
        suite: RegressionSuite | str | Path | None = None,
        sample_id: str | int | Column | None = None,
        noise: Sequence[str | Path] | None = None,
    ) -> None:
        super().__init__(task, adapter, output)
        self.reference = check_reference("reference", reference)
        self.criteria = Criteria(
            rules,
            require,
            slices=slices,
            on_undecided=on_undecided,
            sample_id=sample_id,
            noise=noise,
        )
        self.suite = None if suite is None else RegressionSuite.read(suite)
        check_loaders(loaders)
        self.loaders = loaders
        check_whole("seed", seed, 0, 2**32 - 1)
        self.seed, self.dirpath, self.verbose = seed, dirpath, verbose
        self.junit = junit
        self.report: ReleaseReport | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage in self.stages:
            if self.suite and self.report:  # an earlier test may have added samples
                self.suite = RegressionSuite.read(self.suite)
            self.report = None  # `on_test_start` does not run without batches

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in self.stages and self.report is None:
            limit, _ = batch_limits(trainer)
            raise ConfigurationError(
                f"`data`: no sample was read ({limit or 'no data'}), so nothing was compared.",
                "give data to `trainer.test` or `trainer.validate`, and no limit of 0 batches.",
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self.junit is not None and trainer.state.fn != "fit" and trainer.is_global_zero:
            write_error(exception, self.junit)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":  # its validations do not decide
            return
        if isinstance(self.reference, OldModel) and self.reference.model is pl_module:
            problem = "`reference` is the tested model itself, so nothing can break."
            rank_zero_warn(DataWarning(problem, "give the checkpoint of the model in use."))
        check_folder(self.dirpath, trainer, "release", RELEASE_FILES)
        if self.junit is not None:
            check_writable("junit", self.junit)
        evaluator, few, criteria = self._open(trainer, pl_module, first_batch=True)
        splits = [source.split for source in few]
        criteria.check_data(splits, sliced=criteria.slices is not None)
        evaluate_pieces(
            in_memory(self.reference),
            evaluator,
            pieces_of(few),
            slices=criteria.slices,
            sample_id=criteria.sample_id,
        )

    on_validation_start = on_test_start

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            return
        name = type(pl_module).__name__
        if trainer.ckpt_path:
            name += f" from {trainer.ckpt_path}"
        evaluator, sources, criteria = self._open(trainer, pl_module)
        streams = [source for source in sources if isinstance(source, StreamSource)]
        limit, _ = batch_limits(trainer)
        pair, report = judge_pair(
            self.reference,
            evaluator,
            pieces_of(sources),
            criteria,
            is_limited=bool(limit),
            is_stream=bool(streams),
            seeds={"data": self.seed, **_global_seed()},
            name=name,
        )
        if len(sources) == 1:
            stage = "val" if trainer.state.fn == "validate" else "test"
            logged = {sources[0].split: logged_accuracies(trainer, stage)}
            evaluator = replace(evaluator, logged=logged)
        check_classes(pair.after, evaluator)
        files, log_name = report_files(self.dirpath, trainer, "release", RELEASE_FILES)
        missing = {source.split: source.n_left_out for source in sources if source.n_left_out}
        if not (missing or any(stream.limit for stream in streams)):
            limit = ""
        caveats = report.caveats + _training_data(trainer, pl_module, pair, evaluator.collective)
        self.report = replace(report, files=files, missing=missing, limit=limit, caveats=caveats)
        if trainer.is_global_zero:
            predictions = Predictions.of(pair.after, report.new.sha256, pair.keys)
            self.report = write_report(self.report, "dirpath", predictions.save)
            track_release(self.report, trainer.loggers, step=trainer.global_step, name=log_name)
            if self.junit is not None and not batch_limit(trainer):
                write_junit(self.report, self.junit)
            if report.accepted and not batch_limit(trainer):
                if self.suite is not None:
                    self.suite.grow_by(released_samples(pair, today(), name))
                if trainer.ckpt_path and Path(trainer.ckpt_path).exists() and not limit:
                    with suppress(OSError):  # such as a store of models that only a job may write
                        predictions.save(predictions_beside(trainer.ckpt_path))
            if self.verbose:
                show(self.report)
        # The numbers are the same on every rank; `sync_dist` only silences a warning of Lightning.
        numbers = release_numbers(self.report, log_name)
        pl_module.log_dict(numbers, sync_dist=trainer.world_size > 1, add_dataloader_idx=False)

    on_validation_epoch_end = on_test_epoch_end

    def _open(
        self, trainer: Trainer, model: LightningModule, *, first_batch: bool = False
    ) -> tuple[Evaluator, list[LoaderSource], Criteria]:
        """Opens the tested loaders, and those of other splits in the suite, for its rule alone."""
        stage, data = "test", trainer.test_dataloaders
        if trainer.state.fn == "validate":
            stage, data = "val", trainer.val_dataloaders
        _, limits = batch_limits(trainer)
        loaders = self.loaders
        if loaders is None:
            loaders = _loaders_by_name(data, stage)
        else:
            limits = [batch_limit(trainer)] * len(loaders)
        criteria = self.criteria
        if self.suite is not None:
            of_suite = self._loaders_of_suite(trainer, model, self.suite.splits - loaders.keys())
            criteria = criteria.protecting(self.suite, tuple(loaders) if of_suite else ())
            loaders = {**loaders, **of_suite}
            limits = [*limits, *[batch_limit(trainer)] * len(of_suite)]
        if first_batch:
            limits = [1] * len(loaders)
        limited = zip(loaders.values(), loaders, limits, strict=False)
        evaluator, sources = self.open_loaders(
            trainer, model, limited, seed=self.seed, streams=True
        )
        return evaluator, sources, criteria

    def _loaders_of_suite(
        self, trainer: Trainer, model: LightningModule, splits: set[str]
    ) -> dict[str, Loaders]:
        loaders = {}
        for split in sorted(splits):
            loader = None
            if split_and_loader(split)[0] in SPLITS:
                loader = SplitLoaders(trainer, model).get(split)
            if loader is not None:  # else the rule names the split in an error
                loaders[split] = loader
        return loaders


def _training_data(
    trainer: Trainer, model: LightningModule, pair: ModelPair, ranks: Collective
) -> tuple[str, ...]:
    """Returns a caveat if some of the training data are among the tested data."""
    holder: Any = data_module_of(trainer) or model
    tested = {
        key
        for key, (split, _) in zip(pair.keys, pair.after.samples, strict=False)
        if split != "train"
    }
    with suppress(Exception), random_state():  # no training data, or data without an index
        loader = check_loader(holder.train_dataloader(), "train")
        limit = -(-TRAINING_SAMPLES // batch_size_of(loader))
        few = make_source(loader, "train", trainer=trainer, model=model, limit=limit)
        keys = read_keys([few], ranks)
        n = len(tested.intersection(keys) - {""})
        if n:
            return (
                f"{n:,} of the first {len(keys):,} training samples are among the tested ones, so "
                "limits and tests say nothing about new data.",
            )
    return ()


def _loaders_by_name(data: object, stage: str) -> Mapping[str, Loaders]:
    loaders = loaders_in(data)
    if isinstance(data, Mapping):
        return loaders
    if len(loaders) == 1:
        [loader] = loaders.values()
        return {stage: loader}
    return {f"{stage}:{i}": loader for i, loader in loaders.items()}


def _global_seed() -> dict[str, int]:
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return {"seed_everything": int(seed)} if seed.lstrip("-").isdigit() else {}
