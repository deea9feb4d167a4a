"""`RegressionMetrics`, which counts regressions against the replaced model in every validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import (
    Loader,
    Loaders,
    batch_limit,
    sampler_of,
    validating,
    validation_loaders,
)
from lightning_nrl._trainer.lightning.step_outputs import OutputCapture, Probe, logits_of
from lightning_nrl._trainer.reading.loaders import (
    check_loader,
    check_loaders,
    loader_like,
    pieces_of,
)
from lightning_nrl._trainer.steps.proof import logged_accuracies
from lightning_nrl._trainer.tracking.scalars import Scalars, update_numbers
from lightning_nrl._trainer.tracking.tags import NUMBER_TAG, PART_TAG, parse_prefix, tagged
from lightning_nrl._trainer.trainer_state import forward_context
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import outside_inference_mode, preserve_state, random_state
from lightning_nrl.callbacks.data_callback import DataCallback
from lightning_nrl.data.batch import Adapter, Batch, ModelCall, Unpacked, run_model
from lightning_nrl.data.columns import Column, find_column
from lightning_nrl.errors import ConfigurationError, PerformanceWarning, check_whole
from lightning_nrl.evaluation.sample_results import FlipCounts, flip_masks
from lightning_nrl.evaluation.slices import SliceRecorder, slice_tags
from lightning_nrl.pipeline.input_checks import check_accuracy, check_classes
from lightning_nrl.release.model_pair import evaluate_pieces
from lightning_nrl.release.release_report import check_reference
from lightning_nrl.tasks import Task
from lightning_nrl.updates.old_model import AnyReference, in_memory

RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True, eq=False)
class ReferenceResults:
    """Results of the replaced model on this rank's `n` validation samples, in validation order.

    Tensors are on the CPU.
    """

    loader: Loader
    order: list[list[int]]  # data-set positions of the samples of each batch
    passed: Tensor  # `n` bool, True where the replaced model is right
    label: Tensor  # `n` int64, true classes; -1 if the task has no classes
    # `n` bool, False for samples that a distributed sampler repeats, to give each rank equally many
    once: Tensor
    slice_number: Tensor  # `n` int64, index of the sample's slice in `slices`, or -1
    slices: tuple[str, ...]  # names of the slices, the same on every rank
    adapter: Adapter  # the user's adapter, bound to the new model


def _validation_loader(trainer: Trainer, dataloader: int) -> tuple[Loader, int | None]:
    validation = validation_loaders(trainer)
    if validation is None:
        raise ConfigurationError(
            "`RegressionMetrics`: nothing is validated.",
            "add a `val_dataloader` and a `validation_step`.",
        )
    loaders, limits, mode = validation
    n = len(loaders)
    if dataloader >= n:
        raise ConfigurationError(
            f"`dataloader={dataloader}`: there are {n} validation data loaders.",
            "count them from 0.",
        )
    if n > 1 and mode != "sequential":
        raise ConfigurationError(
            f"`dataloader`: a CombinedLoader in the mode {mode!r} mixes {n} loaders in one batch.",
            "give the validation data loaders as a list, "
            "so that they are read one after the other.",
        )
    hint = (
        "give the validation data as a DataLoader with a `batch_size`, over a data set with an "
        "index, or `RegressionMetrics(..., loaders={'val': loader})`, which takes streams."
    )
    limit = limits[dataloader]
    n_batches = None if limit == math.inf else int(limit)
    return check_loader(loaders[dataloader], "val", hint), n_batches


def is_same_validation(known: ReferenceResults, trainer: Trainer, dataloader: int) -> bool:
    """True if the trainer still validates the samples of `known` in the same order."""
    loader, limit = _validation_loader(trainer, dataloader)
    if loader is known.loader:
        return True
    if loader.dataset is not known.loader.dataset:
        return False
    with random_state():
        return _batches_in_order(loader, limit) == known.order


def _batches_in_order(loader: Loader, limit: int | None) -> list[list[int]]:
    sampler, inner_sampler = sampler_of(loader)
    shuffles = isinstance(sampler, DistributedSampler) and sampler.shuffle
    if not shuffles and not isinstance(inner_sampler, RANDOM):
        batches = _read_batches(loader, limit)
        if batches == _read_batches(loader, limit):
            return batches
    culprit = inner_sampler
    if type(loader.batch_sampler) is not BatchSampler:
        culprit = loader.batch_sampler  # makes batches in its own way
    name = type(culprit).__name__
    raise ConfigurationError(
        f"`val` data: {name} gives the samples in another order each time.",
        "validate without shuffling, so that each sample can be matched with the replaced model's "
        "result, or give other data as `loaders={'val': loader}`.",
    )


def _read_batches(loader: Loader, limit: int | None) -> list[list[int]]:
    return [list(map(int, batch)) for batch in islice(loader.batch_sampler or (), limit)]


def _first_occurrences(by_rank: Sequence[Tensor]) -> list[Tensor]:
    # A repeated sample counts where it is validated first; ranks validate in parallel.
    sizes, n_ranks = list(map(len, by_rank)), len(by_rank)
    time = torch.cat([torch.arange(n) * n_ranks + rank for rank, n in enumerate(sizes)])
    order = time.argsort()
    _, first = np.unique(torch.cat(list(by_rank))[order].numpy(), return_index=True)
    once = torch.zeros(len(time), dtype=torch.bool)
    once[order[torch.from_numpy(first)]] = True
    return list(once.split(sizes))


class FlipCounter:
    """Counter of samples that the new model breaks and repairs in one validation.

    Only `counts` synchronises ranks.
    """

    def __init__(self, reference: ReferenceResults) -> None:
        self.reference = reference
        self.right = [torch.zeros(0, dtype=torch.bool)]  # by batch
        self.label = [torch.zeros(0, dtype=torch.int64)]

    def size(self, batch_idx: int) -> int:
        """Returns the number of samples that a batch had before, or 0 after the last batch."""
        order = self.reference.order
        return len(order[batch_idx]) if batch_idx < len(order) else 0

    def add(self, batch_idx: int, right: Tensor, label: Tensor | None) -> None:
        """Adds a batch: marks of the samples that the new model gets right, and true classes."""
        n = self.size(batch_idx)
        if right.shape != (n,):
            raise ConfigurationError(
                f"`val` data: a batch of {n} samples has results of the shape {list(right.shape)}.",
                "validate the same samples each time; "
                "a collate function must neither drop nor add any.",
            )
        self.right.append(right)
        if label is not None:
            self.label.append(label)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Returns which samples of this rank are right, and their labels if they have any."""
        right, label = (
            torch.cat([x.cpu() for x in batches]) for batches in (self.right, self.label)
        )
        return right, label

    def counts(self, collective: Collective) -> tuple[tuple[str, ...], Tensor]:
        """Returns slice names and counts: a row for all data, then a row per slice.

        The columns are kept, broken, repaired and failing.
        """
        old = self.reference
        right, label = self.joined()
        # A validation that was stopped has only the first batches.
        n = len(right)
        masks = torch.stack(flip_masks(old.passed[:n], right), 1) & old.once[:n, None]
        flips = torch.zeros(len(old.slices) + 1, 4, dtype=torch.int64)
        # Samples in no slice go into the first row, which is overwritten.
        flips.index_add_(0, old.slice_number[:n] + 1, masks.long())
        flips[0] = masks.sum(0)
        mismatches = (label != old.label[: len(label)]).sum()
        total = collective.sum(torch.cat([flips.flatten(), mismatches[None]]))
        if total[-1]:
            raise ConfigurationError(
                f"`val` data: {int(total[-1])} samples have another label than when training "
                "began.",
                "validate the same samples in the same order each time.",
            )
        return old.slices, total[:-1].view(-1, 4)


class RegressionMetrics(DataCallback):
    """Logs in every validation how many samples break and are repaired since the replaced model.

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
        loaders: data to count instead of the validation data, as `{name: data loader}`. They may
            lack an index. In each validation, both models make a pass over them. Tags are
            `regression/<name>/nfr` and `regression/<name>/<slice>/nfr`.
        task: as in `RegressionFreeRepair`.
        adapter: as in `DataOptions`.
        output: as in `DataOptions`.

    Example::

        metrics = RegressionMetrics("old.ckpt")
        best = ModelCheckpoint(monitor="regression/nfr")
        Trainer(callbacks=[metrics, best]).fit(new_model, datamodule=dm)
    """

    stages = ("fit", "validate")
    only_evaluates = True

    def __init__(
        self,
        reference: AnyReference,
        slices: str | int | Column | None = None,
        prefix: str = "regression",
        dataloader: int = 0,
        loaders: Mapping[str, Loaders] | None = None,
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
        output: int | str | None = None,
    ) -> None:
        super().__init__(task, adapter, output)
        self.reference = check_reference("reference", reference)
        self.slices = None if slices is None else find_column("slices", slices)
        self.prefix = parse_prefix(prefix, "regression")
        check_whole("dataloader", dataloader, 0)
        self.dataloader = dataloader
        check_loaders(loaders)
        self.loaders = loaders
        self._outputs = OutputCapture()
        self._reference_results: ReferenceResults | None = None
        self._counter: FlipCounter | None = None
        self._unpacked: Unpacked = ((), {}, None)
        self._warned = False
        self._compared = False  # with the accuracy that the module logs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage in self.stages:
            self.teardown()
            self._outputs.attach(pl_module)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._outputs.detach()
        self._reference_results = self._counter = None
        self._warned = self._compared = False

    on_exception = teardown

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.loaders is not None:
            self._evaluate_loaders(trainer, pl_module)
        elif trainer.limit_val_batches != 0:
            self._evaluate_reference(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.loaders is not None:
            return
        known = self._reference_results
        # Lightning may create the data loaders again during training.
        if known is None or not is_same_validation(known, trainer, self.dataloader):
            known = self._evaluate_reference(trainer, pl_module)
        self._counter = FlipCounter(known)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counter is not None and dataloader_idx == self.dataloader:
            assert self._reference_results is not None
            # Read before the step, which may write into the batch.
            self._unpacked = self._reference_results.adapter(batch)
            self._outputs.begin()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counter is None or dataloader_idx != self.dataloader:
            return
        args, kwargs, target = self._unpacked
        redirected = trainer.strategy.model is not pl_module
        output = self._outputs.end(args, kwargs, redirected=redirected)
        is_forward = not (args and isinstance(args[0], ModelCall))
        logits = None
        if is_forward:
            logits = logits_of(output, self._counter.size(batch_idx), self.task)
        if logits is None:
            if is_forward and not self._warned:
                self._warned = True
                rank_zero_warn(
                    PerformanceWarning(
                        "`validation_step` does not call the model on the whole batch, "
                        "so each batch costs one more pass.",
                        "call `self(x)` in `validation_step`.",
                    )
                )
            with random_state(), forward_context(trainer, pl_module):
                logits = self.task.logits(run_model(pl_module, args, kwargs))
        right = self.task.right(logits, target)
        self._counter.add(batch_idx, right, self.task.label(target))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        numbers: Scalars = {}
        if self.loaders is not None and not trainer.sanity_checking:
            for part, counts in self._evaluate_loaders(trainer, pl_module).items():
                numbers |= tagged(PART_TAG, update_numbers(counts), name=self.prefix, part=part)
        if self._counter is not None:
            collective = Collective.current(pl_module.device)
            names, rows = self._counter.counts(collective)
            if not self._compared:
                self._compared = True
                right, label = collective.of_first(self._counter.joined())
                if len(right) == len(label):
                    check_accuracy(
                        self.task, "val", logged_accuracies(trainer, "val"), right, label
                    )
            self._counter = None
            all_data, *slices = [update_numbers(FlipCounts(*row)) for row in rows.tolist()]
            numbers = tagged(NUMBER_TAG, all_data, name=self.prefix)
            tags = slice_tags(names)
            for name, of_slice in zip(names, slices, strict=True):
                numbers |= tagged(PART_TAG, of_slice, name=self.prefix, part=tags[name])
        # The counts are the same on every rank; `sync_dist` only silences a warning of Lightning.
        pl_module.log_dict(numbers, sync_dist=trainer.world_size > 1, add_dataloader_idx=False)

    def _evaluate_loaders(self, trainer: Trainer, model: LightningModule) -> dict[str, FlipCounts]:
        """Returns the counts of the user's own loaders, and of the slices in each."""
        limit = batch_limit(trainer)
        loaders = [(loader, name, limit) for name, loader in (self.loaders or {}).items()]
        with random_state(), validating(trainer):
            evaluator, sources = self.open_loaders(trainer, model, loaders, streams=True)
            old = in_memory(self.reference)
            pair = evaluate_pieces(old, evaluator, pieces_of(sources), slices=self.slices)
        tags = slice_tags(pair.slices)
        counts = {}
        for split in pair.splits:
            counts[split] = pair.flips.counts(pair.rows(split))
            for name, mask in pair.slices_of(split).items():
                counts[f"{split}/{tags[name]}"] = pair.flips.counts(mask)
        return counts

    def _evaluate_reference(self, trainer: Trainer, model: LightningModule) -> ReferenceResults:
        """Evaluates the replaced and the new model on validation data. Neither model changes."""
        collective = Collective.current(model.device)
        loader, limit = _validation_loader(trainer, self.dataloader)
        probe = Probe(model)
        with random_state(), validating(trainer), outside_inference_mode():
            batches = _batches_in_order(loader, limit)
            positions = torch.tensor([at for batch in batches for at in batch], dtype=torch.int64)
            by_rank = collective.gather(positions)
            loader_in_order = loader_like(
                loader,
                loader.dataset,
                batch_size=max(map(len, batches), default=1),
                # The source sorts the positions.
                sampler=SubsetRandomSampler(torch.cat(by_rank).tolist()),
            )
            loaders = [(loader_in_order, "val", None)]
            evaluator, (source,) = self.open_loaders(trainer, model, loaders)
            recorder = SliceRecorder(source, self.slices, self.task)

            def logits(batch: Batch) -> Tensor:
                return evaluator.task.logits(probe(*batch.args, **batch.kwargs))

            with preserve_state(model):
                new = evaluator.run([recorder], forward=logits)
            answers = self.reference.answers(evaluator, [source], new)
            check_classes(answers, evaluator)
        self._outputs.attach(model, probe.parts or ())
        names, slice_number = recorder.named(collective)
        rows = torch.searchsorted(source.index, positions)
        self._reference_results = ReferenceResults(
            loader,
            order=batches,
            passed=answers.passed[rows],
            label=new.label[rows],
            once=_first_occurrences(by_rank)[collective.rank],
            slice_number=slice_number[rows],
            slices=names,
            adapter=source.adapter,
        )
        return self._reference_results
