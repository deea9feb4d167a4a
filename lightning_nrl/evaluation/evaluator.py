"""`Evaluator` runs a model over data and records the result of every sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_nrl._utils.checks import check_per_sample
from lightning_nrl._utils.device import Context, at_least_float32, is_out_of_memory
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import poll
from lightning_nrl._utils.state import State, device_of, temporary_weights
from lightning_nrl.data.adapters import adapter_hint, bind_adapter, describe
from lightning_nrl.data.batch import (
    Adapter,
    Batch,
    BatchTarget,
    RawBatch,
    Source,
    run_model,
    tensors_in,
    unpacked,
)
from lightning_nrl.data.targets import Classes, Target, classes_in
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    EvaluationError,
    ModelError,
    RepairError,
    UnusableSamplesError,
    check_kind,
    first_line,
)
from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Multiclass, Task, class_logits

Forward = Callable[[Batch], Tensor]
"""Computes the logits of a batch in place of the model."""
Table = dict[str, Tensor]
"""Maps column names to tensors with one row per sample."""

DTYPES = {
    "position": torch.int64,
    "label": torch.int64,
    "prediction": torch.int32,
    "loss": torch.float32,
    "margin": torch.float32,
    "confidence": torch.float32,
    "passed": torch.bool,
    "targeted": torch.bool,
    "in_target": torch.bool,
}
"""Data types of the columns of a split without samples."""
NO_CLASS = -100  # label of a sample that has no class although the task has classes


@dataclass(frozen=True)
class Evaluator:
    """Runs a model as it is deployed over data, and evaluates every sample by a task.

    Attributes:
        model: the model, in evaluation mode, on the device where it runs.
        task: decides which samples pass, and computes their losses and margins.
        context: creates the context in which every forward pass runs, such as autocast.
        collective: the ranks that share the data. All ranks must make the same calls in the same
            order.
        called: names of the layers that a prediction calls, in the order of the calls; None if
            unknown.
        argument: `model` or `reference`, the name of the model in errors.
        spare_batch: makes a batch to run, without counting it, while only other ranks have data
            left: ranks must run a sharded model equally often. None if the model is whole.
        is_proven: True if the model's own losses or metrics compare its logits with the labels;
            None if the model has no steps that could show it.
        logged: accuracies that the module itself logged, by split and name; counts that are far
            from them are refused.
        visited: is called with the number of samples of each forward pass without gradients.
    """

    model: nn.Module
    task: Task = field(default_factory=Multiclass)
    context: Context = nullcontext
    collective: Collective = field(default_factory=Collective)
    called: Sequence[str] | None = None
    argument: str = "model"
    spare_batch: Callable[[], Batch] | None = None
    is_proven: bool | None = None
    logged: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    visited: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        check_kind(
            "model",
            self.model,
            isinstance(self.model, nn.Module),
            "torch module",
            "model=torch.nn.Linear(2, 2)",
        )
        check_kind("task", self.task, isinstance(self.task, Task), "Task", "task=Multiclass()")

    @classmethod
    def of(cls, model: nn.Module | Evaluator) -> Evaluator:
        """Wraps a module as a multi-class model in one process, without autocast.

        Returns an `Evaluator` unchanged.
        """
        if isinstance(model, Evaluator):
            return model
        return cls(model)

    @property
    def precision(self) -> DeployedPrecision:
        return DeployedPrecision.of(self.model, self.context)

    def visit(self, n: int) -> None:
        """Counts a forward pass of `n` samples, unless it is a training step."""
        if self.visited is not None and not torch.is_grad_enabled():
            self.visited(n)

    def output(self, batch: Batch, forward: Forward | None = None) -> Tensor:
        """Computes the logits of a batch by the model, or by `forward` instead."""
        with self.context():
            if forward is not None:
                return forward(batch)
            self.visit(len(batch))
            return self.task.logits(run_model(self.model, batch.args, batch.kwargs))

    @torch.no_grad()
    def run(
        self,
        sources: Sequence[Source],
        target: Target | None = None,
        *,
        everywhere: bool = False,
        forward: Forward | None = None,
    ) -> SampleResults:
        """Runs the model once over all sources and records the result of each sample.

        Every sample counts exactly once, whatever the number of ranks, and every rank gets the same
        table.

        Args:
            sources: one source for each split, with this rank's share of the samples.
            target: selects the failures to repair (column `targeted`) and all samples of their kind
                (`in_target`); None selects no samples. If the target cannot be applied to a source
                with `failed=False`, a warning is given and `in_target` is True for all samples of
                the source.
            everywhere: True to mark failures in all sources, not only in those with `failed=True`.
            forward: computes the logits instead of the model.

        Raises:
            ConfigurationError: no source is given, a split is given twice, or a batch or target
                does not fit the task.
            EvaluationError: a sample is missing, occurs twice or has no class, or another rank
                failed.
            ModelError: the model or the task raised an error on a batch.
        """
        splits = tuple(source.split for source in sources)
        if not splits or len(set(splits)) < len(splits):
            raise ConfigurationError(
                f"`sources` has the splits {list(splits)}.",
                "give at least one source, and each source its own split name.",
            )
        tables = []
        for source in sources:
            marker = _TargetMarker(target, source.split, everywhere or source.failed)
            failed = f"`{source.split}` data could not be read on another rank."
            read = partial(self._read, source, marker, forward, failed)
            if self.spare_batch is None:  # else ranks exchange errors batch by batch
                read = partial(self.collective.all_or_none, read, failed)
            table = _gather_split(source, read(), self.collective)
            _check_classes(source, table)
            tables.append(table)
        sizes = tuple(len(source.index) for source in sources)
        columns: dict[str, Any] = {}
        for name in list(tables[0]):
            # One column at a time is joined and its parts are freed, to save memory.
            columns[name] = torch.cat([table.pop(name) for table in tables])
        return SampleResults(splits, sizes, **columns)

    def outputs(
        self, batches: Iterable[RawBatch], adapter: Adapter
    ) -> Iterator[tuple[Tensor, BatchTarget]]:
        """Yields logits and targets, checked by `Task.check`, of each `Batch` or raw batch.

        Raw batches are moved to the device and adapted.
        """
        adapter = bind_adapter(adapter, self.model)
        for args, kwargs, target in unpacked(batches, adapter, device_of(self.model)):
            with self.context():
                output = self.task.logits(run_model(self.model, args, kwargs))
            self.task.check(output, target)
            yield output, target

    def run_with(self, state: State, sources: Sequence[Source]) -> SampleResults:
        """Runs the model with the weights in `state`, then restores the model's weights."""
        with temporary_weights(self.model, state):
            return self.run(sources)

    def _read(
        self, source: Source, marker: _TargetMarker, forward: Forward | None, failed: str
    ) -> Table:
        parts: dict[str, list[Tensor]] = {name: [] for name in DTYPES}
        has_one_logit = False
        batches: Iterable[Batch] = source
        if self.spare_batch is not None:
            batches = self._in_step(source, self.spare_batch, forward, failed)
        for number, batch in enumerate(batches):
            poll()
            evaluate = partial(self._evaluate, number, batch, source, marker, forward)
            if self.spare_batch is not None:
                evaluate = partial(self.collective.all_or_none, evaluate, failed)
            output, columns = evaluate()
            has_one_logit = output.shape[1:] == (1,)
            for name, column in columns.items():
                parts[name].append(column)
        table = {}
        for name, dtype in DTYPES.items():
            column_parts = parts.pop(name) or [torch.zeros(0, dtype=dtype)]
            table[name] = torch.cat(column_parts).cpu()
        if has_one_logit:
            _warn_of_probabilities(source.split, table)
        return table

    def _in_step(
        self,
        source: Source,
        spare_batch: Callable[[], Batch],
        forward: Forward | None,
        failed: str,
    ) -> Iterator[Batch]:
        """Yields the batches of a source, and runs spare ones while only other ranks have some."""
        batches = iter(source)
        while True:
            batch = self.collective.all_or_none(lambda: next(batches, None), failed)
            if not self.collective.any(batch is not None):
                return
            if batch is not None:
                yield batch
            else:
                self.collective.all_or_none(partial(self.output, spare_batch(), forward), failed)

    def _evaluate(
        self,
        number: int,
        batch: Batch,
        source: Source,
        marker: _TargetMarker,
        forward: Forward | None,
    ) -> tuple[Tensor, Table]:
        """Returns the logits of a batch and the columns of its samples."""
        argument, name = self.argument, type(self.model).__name__
        try:
            output = self.output(batch, forward)
            argument, name = "task", type(self.task).__name__
            return output, _columns(batch, output, self.task, marker, is_first=number == 0)
        except Exception as error:
            if isinstance(error, RepairError) or is_out_of_memory(error):
                raise
            _check_devices(source.split, batch, device_of(self.model), error)
            place = f"batch {number} of `{source.split}` data"
            place += f", from sample {source.index[batch.position[0]]} on"
            raise ModelError(
                f"`{argument}`: {name} raised {type(error).__name__} on {place}: {error}\n"
                f"{describe(batch.raw)}",
                self._hint_on_failure(number, batch),
            ) from error

    def _hint_on_failure(self, number: int, batch: Batch) -> str:
        if number:
            return "the batches before it ran: correct its samples, or leave them out."
        if self.argument == "reference":
            return adapter_hint(batch.raw, "`reference=OldModel(old, adapter=f)`")
        return adapter_hint(batch.raw)


@dataclass
class _TargetMarker:
    target: Target | None
    split: str
    targets_failures: bool
    applies: bool = True  # False once the target has raised an error

    def check(self, n_classes: int) -> None:
        if self.target is None:
            return
        last_class = max(classes_in(self.target), default=-1)
        if last_class >= n_classes:
            raise ConfigurationError(
                f"`target='{self.target}'`: there is no class {last_class}.",
                f"the model has the classes 0 to {n_classes - 1}; name one of these.",
            )

    def __call__(
        self, batch: Batch, label: Classes, prediction: Classes, passed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns masks of the targeted samples, and of all samples in the target."""
        nothing = torch.zeros_like(passed)
        if self.target is None:
            return nothing, nothing
        if self.targets_failures:
            selected = self.target.select(batch, label, prediction).to(passed.device)
            covered = self.target.covers(batch, label, prediction).to(passed.device)
            return ~passed & selected, covered
        if self.applies:
            try:
                covered = self.target.covers(batch, label, prediction)
                return nothing, covered.to(passed.device)
            except Exception as error:
                self.applies = False
                problem = (
                    f"`target` cannot be applied to `{self.split}` data, whose samples all count "
                    f"as in it: {first_line(error)}"
                )
                warnings.warn(DataWarning(problem), stacklevel=2)
        # This mask only serves gates on samples in the target, which become stricter if all are.
        return nothing, ~nothing


def _warn_of_probabilities(split: str, table: Table) -> None:
    """Warns if outputs are in [0, 1], and the threshold 0.5 is more accurate than one class."""
    is_1 = table["label"] == 1
    output = torch.where(is_1, table["margin"], -table["margin"])
    if not ((output >= 0) & (output <= 1)).all():
        return
    n_right = int(((output > 0.5) == is_1).sum())
    n_1 = int(is_1.sum())
    if n_right > max(n_1, len(is_1) - n_1):
        problem = (
            f"`task`: all outputs on `{split}` data are from 0 to 1, but count as logits: above 0 "
            "is class 1."
        )
        warnings.warn(
            DataWarning(problem, "if they are probabilities, return the sigmoid's inputs."),
            stacklevel=2,
        )


def _check_classes(source: Source, table: Table) -> None:
    ids = source.index[table["label"] == NO_CLASS].tolist()
    if ids:
        ellipsis = " ..." if len(ids) > 10 else ""
        raise UnusableSamplesError(
            f"`{source.split}` data: {len(ids)} samples have labels below 0 or above the last "
            f"class ({ids[:10]}{ellipsis}).",
            "leave samples without a class out of the data, such as those with the label -100, "
            "which a loss ignores.",
            {source.split: ids},
        )


def _check_devices(split: str, batch: Batch, device: torch.device, error: Exception) -> None:
    tensors = tensors_in((batch.args, batch.kwargs, batch.target))
    elsewhere = sorted({str(x.device) for x in tensors} - {str(device)})
    if elsewhere:
        raise ConfigurationError(
            f"`{split}` data are on {' and '.join(elsewhere)}, but the model is on {device}.",
            f"set the model's device: `TensorSource(..., device={str(device)!r})`.",
        ) from error


def _columns(
    batch: Batch,
    output: Tensor,
    task: Task,
    marker: _TargetMarker,
    *,
    is_first: bool,
) -> Table:
    n = len(batch)
    if output.shape[:1] != (n,):
        raise ConfigurationError(
            f"`task`: the model returned {list(output.shape)} for {n} targets.\n"
            f"{describe(batch.raw)}",
            f"the first dimension of the output must count samples; {adapter_hint(batch.raw)}",
        )
    target, unusable = _fill_missing_classes(batch.target, output, task, is_first)
    task.check(output, target)
    label = task.label(target)
    prediction = task.prediction(output)
    margin = task.margin(output, target)
    passed = task.passed(output, target)
    loss = task.loss(output, target)
    name = type(task).__name__
    check_per_sample(f"`task`: `passed` of {name}", passed, n, "bool", tensors_only=True)
    numbers = {"loss": loss, "label": label, "prediction": prediction, "margin": margin}
    for method, values in numbers.items():
        if values is not None:
            check_per_sample(f"`task`: `{method}` of {name}", values, n, tensors_only=True)
    loss = at_least_float32(loss)
    no_number = torch.full_like(loss, torch.nan)
    confidence = no_number
    if task.by_arg_max:
        logits = class_logits(output)
        marker.check(logits.shape[1])
        confidence = at_least_float32(logits).softmax(1).amax(1)
    targeted, in_target = marker(batch, label, prediction, passed)
    no_class = torch.full_like(passed, -1, dtype=torch.int64)
    columns = {
        "position": batch.position,
        "label": no_class if label is None else label.long(),
        "prediction": (no_class if prediction is None else prediction).int(),
        "loss": loss,
        "margin": no_number if margin is None else at_least_float32(margin),
        "confidence": confidence,
        "passed": passed,
        "targeted": targeted,
        "in_target": in_target,
    }
    if unusable is not None:
        columns["label"] = columns["label"].masked_fill(unusable, NO_CLASS)
    return columns


def _fill_missing_classes(
    target: BatchTarget,
    output: Tensor,
    task: Task,
    is_first: bool,
) -> tuple[BatchTarget, Tensor | None]:
    """Replaces unusable labels by class 0, and returns a mask of them, or None without any.

    A label is unusable if it is negative or above the model's last class. In the first batch, a
    label that is too large hints at a wrong argument: it stays, and `Task.check` raises an error.
    """
    label = task.label(target)
    if label is None:
        return target, None
    unusable = label < 0
    if (
        isinstance(target, Tensor)
        and not target.is_floating_point()
        and target.shape == label.shape
    ):
        if task.by_arg_max and not is_first:
            unusable |= label >= class_logits(output).shape[1]
        target = target.where(~unusable, 0)  # `masked_fill` knows no unsigned dtypes
    return target, unusable


def _gather_split(source: Source, part: Table, collective: Collective) -> Table:
    table = {name: torch.cat(collective.gather(part.pop(name))) for name in DTYPES}
    position = table.pop("position")
    expected = torch.arange(len(source.index))
    if torch.equal(position, expected):  # as one rank reads; saves memory
        return {"index": source.index, **table}
    order = position.argsort()
    if not torch.equal(position[order], expected):
        raise EvaluationError(
            f"`{source.split}` data: read {len(position)} samples instead of each of "
            f"{len(expected)} once.",
            "over all ranks, no sample may be missing or occur twice; a collate function must keep "
            "all samples.",
        )
    columns = {name: column[order] for name, column in table.items()}
    return {"index": source.index, **columns}


Need = Literal["margins", "classes", "recording"]


def check_needs(
    needs: Collection[Need],
    results: SampleResults,
    task: Task,
    by: str = "`method='convex'`",
    hint: str = "use `method='finetune-polish'`, or leave `method` at 'auto'.",
) -> None:
    """Raises a `ConfigurationError` if the task lacks margins or classes named in `needs`.

    `by` names the method.
    """
    name = type(task).__name__
    if "margins" in needs and len(results) and not results.has_margins:
        raise ConfigurationError(
            f"`task`: {name} has no `margin` that the method could increase.",
            "give it a `margin`, or repair with `method='swarm'`, which needs no gradients.",
        )
    if "classes" in needs and not (task.by_arg_max and (results.label >= 0).all()):
        raise ConfigurationError(
            f"{by} needs a logit for each class, and the task {name} has none.", hint
        )
