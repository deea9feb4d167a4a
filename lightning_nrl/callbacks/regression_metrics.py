"""`RegressionMetrics`, which counts regressions against the replaced model in every validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from typing_extensions import override

from lightning_nrl._trainer.lightning.packages import (
    CallbackBase,
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    sampler_of,
    validating,
    validation_loaders,
)
from lightning_nrl._trainer.loaders import check_loader, loader_like, make_source, parse_adapter
from lightning_nrl._trainer.prediction import open_sources
from lightning_nrl._trainer.repair_files import parse_prefix
from lightning_nrl._trainer.step_outputs import OutputCapture, Probe, logits_of
from lightning_nrl._trainer.tracking.scalars import update_numbers
from lightning_nrl._trainer.trainer_checks import check_packages, check_strategy
from lightning_nrl._trainer.trainer_state import forward_context
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve_state, random_state
from lightning_nrl._utils.state import State
from lightning_nrl.data.batch import Adapter, ModelCall, run_model
from lightning_nrl.data.columns import find_column
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError, PerformanceWarning, check_whole
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.evaluation.slices import SliceRecorder, Slices, slice_tags
from lightning_nrl.tasks import Task, parse_task
from lightning_nrl.updates.old_model import Reference
from lightning_nrl.updates.release import check_reference

RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True, eq=False)
class ReferenceResults:
    """Results of the replaced model on this rank's `n` validation samples, in validation order, on
    the CPU.
    """

    loader: DataLoader[Any]
    order: list[list[int]]  # data-set positions of the samples of each batch
    starts: tuple[int, ...]  # row of the first sample of each batch; the last entry is `n`
    passed: Tensor  # `n` bool, True where the replaced model is right
    label: Tensor  # `n` int64, true classes; -1 if the task has no classes
    once: Tensor  # `n` bool, False for samples that a distributed sampler repeats to give each rank equally many
    group: (
        Tensor  # `n` int64, index of the sample's slice in `names`; -1 if the sample is in no slice
    )
    names: tuple[str, ...]  # names of the slices, the same on every rank
    parts: tuple[
        str, ...
    ]  # name of the submodule that returns the new model's output; may be empty (`Probe.parts`)
    adapter: Adapter  # the user's adapter, bound to the new model


def _validation_loader(trainer: Trainer, dataloader: int) -> tuple[DataLoader[Any], int | None]:
    found = validation_loaders(trainer)
    if found is None:
        hint = "add a `val_dataloader` and a `validation_step`."
        raise ConfigurationError("`RegressionMetrics`: nothing is validated.", hint)
    loaders, limits, mode = found
    if not dataloader < len(loaders):
        problem = f"`dataloader={dataloader}`: there are {len(loaders)} validation data loaders."
        raise ConfigurationError(problem, "count them from 0.")
    if len(loaders) > 1 and mode != "sequential":
        problem = f"`dataloader`: a CombinedLoader in the mode {mode!r} mixes {len(loaders)} loaders in one batch."
        hint = (
            "give the validation data loaders as a list, so that they are read one after the other."
        )
        raise ConfigurationError(problem, hint)
    hint = "give the validation data as a DataLoader with a `batch_size`, over a data set with an index."
    loader = check_loader(loaders[dataloader], "val", hint)
    most = limits[dataloader]
    return loader, None if most == float("inf") else int(most)


def evaluate_reference(
    reference: Reference,
    trainer: Trainer,
    model: LightningModule,
    *,
    dataloader: int = 0,
    slices: Slices | None = None,
    task: Task,
    adapter: Adapter,
) -> ReferenceResults:
    """Evaluates the replaced model and the new `model` on validation data. Neither model changes."""
    collective = Collective.current(model.device)
    loader, most = _validation_loader(trainer, dataloader)
    with random_state(), validating(trainer):
        batches = _batches_in_order(loader, most)
        mine = torch.tensor([at for batch in batches for at in batch], dtype=torch.int64)
        everyone = collective.gather(mine)
        which = SubsetRandomSampler(torch.cat(everyone).tolist())  # the source sorts the positions
        again = loader_like(loader, batch_size=max(map(len, batches), default=1), sampler=which)
        source = make_source(again, "val", trainer=trainer, model=model, adapter=adapter)
        evaluator, ((source,),) = open_sources(trainer, model, task, [source])
        recorder = SliceRecorder(source, slices, task)
        probe = Probe(model)
        with preserve_state(model):
            new = evaluator.run([recorder], forward=probe)
        answers = reference.answers(evaluator, [source], new)
    names, group = recorder.named(collective)
    rows = torch.searchsorted(source.index, mine)
    return ReferenceResults(
        loader,
        batches,
        (0, *accumulate(map(len, batches))),
        answers.passed[rows],
        new.label[rows],
        _first_occurrences(everyone)[collective.rank],
        group[rows],
        names,
        probe.parts or (),
        source.adapter,
    )


def is_same_validation(known: ReferenceResults, trainer: Trainer, dataloader: int) -> bool:
    """True if the trainer still validates the samples of `known` in the same order."""
    loader, most = _validation_loader(trainer, dataloader)
    if loader is known.loader:
        return True
    with random_state():
        return (
            loader.dataset is known.loader.dataset
            and _batches_in_order(loader, most) == known.order
        )


def _batches_in_order(loader: DataLoader[Any], most: int | None) -> list[list[int]]:
    sampler, inside = sampler_of(loader)
    shuffles = isinstance(inside, RANDOM) or (
        isinstance(sampler, DistributedSampler) and sampler.shuffle
    )
    if not shuffles:
        found, again = (
            [list(map(int, b)) for b in islice(loader.batch_sampler or (), most)] for _ in range(2)
        )
        if found == again:
            return found
    problem = f"`val` data: {type(inside).__name__} gives the samples in another order each time."
    hint = "validate without shuffling, so that each sample can be matched with the replaced model's result."
    raise ConfigurationError(problem, hint)


def _first_occurrences(everyone: Sequence[Tensor]) -> list[Tensor]:
    # A repeated sample counts where it is validated first; ranks validate in parallel.
    when = torch.cat(
        [torch.arange(len(mine)) * len(everyone) + rank for rank, mine in enumerate(everyone)]
    )
    order = when.argsort()
    _, first = np.unique(torch.cat(list(everyone))[order].numpy(), return_index=True)
    once = torch.zeros(len(when), dtype=torch.bool)
    once[order[torch.from_numpy(first)]] = True
    return list(once.split([len(mine) for mine in everyone]))


class FlipCounter:
    """Counter of samples that the new model breaks and repairs in one validation. Only `counts`
    synchronises ranks.
    """

    def __init__(self, reference: ReferenceResults, device: torch.device) -> None:
        self.reference = reference
        n = len(reference.passed)
        self.new = torch.zeros(n, dtype=torch.bool, device=device)
        self.counted = torch.zeros(n, dtype=torch.bool, device=device)
        self.label = reference.label.to(device)
        self.label_mismatches = torch.zeros((), dtype=torch.int64, device=device)

    def size(self, batch_idx: int) -> int:
        """Returns the number of samples that a batch has in `self.reference`, or 0 for a batch
        beyond the last one.
        """
        starts = self.reference.starts
        return starts[batch_idx + 1] - starts[batch_idx] if batch_idx + 1 < len(starts) else 0

    def add(self, batch_idx: int, right: Tensor, label: Tensor | None) -> None:
        """Adds a batch. `right` marks the samples that the new model gets right. `label` has the
        true classes.
        """
        expected = self.size(batch_idx)
        if right.shape != (expected,):
            problem = f"`val` data: a batch of {expected} samples has results of the shape {list(right.shape)}."
            hint = "validate the same samples each time; a collate function must neither drop nor add any."
            raise ConfigurationError(problem, hint)
        rows = slice(*self.reference.starts[batch_idx : batch_idx + 2])
        self.new[rows] = right.to(self.new.device)
        self.counted[rows] = True
        if label is not None:
            self.label_mismatches += (label.to(self.label.device) != self.label[rows]).sum()

    def counts(self, collective: Collective) -> tuple[tuple[str, ...], Tensor]:
        """Returns slice names and counts (kept, broken, repaired, failing): a row for all data,
        then one per slice.
        """
        known, new = self.reference, self.new.cpu()
        old, counted = known.passed, known.once & self.counted.cpu()
        masks = torch.stack([old & new, old & ~new, ~old & new, ~old & ~new], 1) & counted[:, None]
        flips = torch.zeros(len(known.names) + 1, 4, dtype=torch.int64)
        # Samples in no slice go into the first row, which is overwritten.
        flips.index_add_(0, known.group + 1, masks.long())
        flips[0] = masks.sum(0)
        total = collective.sum(torch.cat([flips.flatten(), self.label_mismatches.cpu()[None]]))
        if total[-1]:
            problem = (
                f"`val` data: {int(total[-1])} samples have another label than when training began."
            )
            raise ConfigurationError(
                problem, "validate the same samples in the same order each time."
            )
        return known.names, total[:-1].view(-1, 4)


class RegressionMetrics(CallbackBase):
    """Logs in every validation how many samples the new model breaks and repairs, compared with the
    replaced model.

    Logs `regression/nfr`, `pfr`, `relative_nfr`, `btc`, `bec`, `broken`, `repaired`, `accuracy` and
    `reference_accuracy`, for `ModelCheckpoint` and `EarlyStopping` (formulas:
    `lightning_nrl.evaluation.metrics`). The callback reuses the model's outputs in
    `validation_step`. Its only cost is a pass of each model before training.

    Args:
        reference: the replaced model: a module, an `OldModel`, the path of its checkpoint, or the
            path of a CSV file with its predictions for the split `val`.
        slices: where the slice of each sample is found: the key or position of a column in the raw
            batch, a function of the raw batch (or its address), or a `Target`. Samples with the
            same text or whole number form a slice. In a column of bools, True samples form a slice
            with the column's name. Tags are `regression/<slice>/nfr` etc.
        prefix: prefix of logged tags.
        dataloader: index of the validation data loader whose samples are counted, from 0.
        task: as in `RegressionFreeRepair`.
        adapter: as in `DataOptions`.

    Example::

        metrics = RegressionMetrics("old.ckpt")
        best = ModelCheckpoint(monitor="regression/nfr")
        Trainer(callbacks=[metrics, best]).fit(new_model, datamodule=dm)
    """

    def __init__(
        self,
        reference: nn.Module | str | Path | State | Reference,
        slices: str | int | Callable[[Any], Any] | Target | None = None,
        prefix: str = "regression",
        dataloader: int = 0,
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
    ) -> None:
        super().__init__()
        self.reference = check_reference("reference", reference)
        self.slices: Any = None if slices is None else find_column("slices", slices)
        self.prefix = parse_prefix(prefix, "regression")
        check_whole("dataloader", dataloader, 0)
        self.dataloader = dataloader
        self.task = parse_task(task)
        self.adapter = parse_adapter(adapter)
        self._outputs = OutputCapture()
        self._reference_results: ReferenceResults | None = None
        self._counter: FlipCounter | None = None
        self._warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_packages(trainer)
        check_strategy(trainer, "which are needed whole", "train with a single device or with ddp.")
        if stage in ("fit", "validate"):
            self._reset()
            self._outputs.attach(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._reset()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.limit_val_batches != 0:
            self._evaluate_reference(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        known = self._reference_results
        # Lightning may create the data loaders again during training.
        if known is None or not is_same_validation(known, trainer, self.dataloader):
            known = self._evaluate_reference(trainer, pl_module)
        self._counter = FlipCounter(known, pl_module.device)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counter is not None and dataloader_idx == self.dataloader:
            self._outputs.begin()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counter is None or dataloader_idx != self.dataloader:
            return
        assert self._reference_results is not None
        args, kwargs, target = self._reference_results.adapter(batch)
        output = self._outputs.end(args, kwargs, redirected=trainer.strategy.model is not pl_module)
        is_forward = not (args and isinstance(args[0], ModelCall))
        logits = logits_of(output, self._counter.size(batch_idx), self.task) if is_forward else None
        if logits is None:
            if is_forward and not self._warned:
                self._warned = True
                problem = "`validation_step` does not call the model on the whole batch, so each batch costs one more pass."
                rank_zero_warn(PerformanceWarning(problem, "call `self(x)` in `validation_step`."))
            with random_state(), forward_context(trainer, pl_module)():
                logits = self.task.logits(run_model(pl_module, args, kwargs))
        right = self.task.right(logits, target)
        self._counter.add(batch_idx, right, self.task.label(target))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._counter is None:
            return
        names, counts = self._counter.counts(Collective.current(pl_module.device))
        self._counter = None
        tags = (self.prefix, *(f"{self.prefix}/{tag}" for tag in map(slice_tags(names).get, names)))
        rows = zip(tags, (update_numbers(FlipCounts(*row)) for row in counts.tolist()), strict=True)
        found = {f"{tag}/{key}": value for tag, values in rows for key, value in values.items()}
        # The counts are the same on every rank; `sync_dist` only silences a warning of Lightning.
        pl_module.log_dict(found, sync_dist=trainer.world_size > 1, add_dataloader_idx=False)

    def _evaluate_reference(self, trainer: Trainer, pl_module: LightningModule) -> ReferenceResults:
        how = {
            "dataloader": self.dataloader,
            "slices": self.slices,
            "task": self.task,
            "adapter": self.adapter,
        }
        known = self._reference_results = evaluate_reference(
            self.reference, trainer, pl_module, **how
        )
        self._outputs.attach(pl_module, known.parts)
        return known

    def _reset(self) -> None:
        self._outputs.detach()
        self._reference_results = self._counter = None
        self._warned = False
