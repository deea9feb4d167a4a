"""`Evaluator`: a model with its task, precision and ranks, evaluated sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_nrl._utils.checks import Kind, check_per_sample
from lightning_nrl._utils.device import Context, at_least_float32
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import poll
from lightning_nrl._utils.state import State, device_of, temporary_weights
from lightning_nrl.data.adapters import adapter_hint, bind_adapter, describe
from lightning_nrl.data.batch import Adapter, Batch, Source, run_model, tensors_in, unpacked
from lightning_nrl.data.targets import Target, classes_in
from lightning_nrl.errors import ConfigurationError, DataWarning, EvaluationError, UnusableSamplesError, check_kind
from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Multiclass, Task, class_logits

Forward = Callable[..., Any]
"""A model, or a function that calls it."""
Table = dict[str, Tensor]
"""Columns by name, one row a sample."""

DTYPES = {
    **dict.fromkeys(("position", "label", "prediction"), torch.int64),
    **dict.fromkeys(("loss", "margin"), torch.float32),
    **dict.fromkeys(("passed", "targeted", "in_target"), torch.bool),
}
NO_CLASS = -100  # label of a sample without a class in a task with classes


@dataclass(frozen=True)
class Evaluator:
    """A deployed model with its task; makes all passes over data.

    Attributes:
        model: in evaluation mode on its device.
        task: defines passed, loss and margin.
        context: entered around every forward pass, such as autocast.
        collective: the ranks that share the data; all of them make the same calls in the same order.
        called: names of the layers that a prediction calls, in order; None if unknown.
    """

    model: nn.Module
    task: Task = field(default_factory=Multiclass)
    context: Context = nullcontext
    collective: Collective = field(default_factory=Collective)
    called: Sequence[str] | None = None

    def __post_init__(self) -> None:
        is_module = isinstance(self.model, nn.Module)
        check_kind("model", self.model, is_module, "torch module", "model=torch.nn.Linear(2, 2)")
        check_kind("task", self.task, isinstance(self.task, Task), "Task", "task=Multiclass()")

    @classmethod
    def of(cls, model: nn.Module | Evaluator) -> Evaluator:
        """Returns an evaluator unchanged; wraps a classifier in full precision on a single process."""
        return model if isinstance(model, Evaluator) else cls(model)

    @property
    def precision(self) -> DeployedPrecision:
        return DeployedPrecision.of(self.model, self.context)

    def output(self, batch: Batch, forward: Forward | None = None) -> Tensor:
        """Computes the logits of a batch on the model's device; `forward` replaces the model."""
        with self.context():
            if forward is None:
                return self.task.logits(run_model(self.model, batch.args, batch.kwargs))
            return self.task.logits(forward(*batch.args, **batch.kwargs))

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

        Every sample counts exactly once, whatever the number of ranks, and every rank gets the same table.

        Args:
            sources: the splits, this rank's share of each.
            target: selects targeted failures and samples in the target; None selects none. If it cannot be applied to a
                source without targets, all its samples count as in the target.
            everywhere: mark failures in all sources, not only those whose failures may be repaired.
            forward: replaces the model.

        Raises:
            ConfigurationError: there is no source, a name occurs twice, or a batch or the target does not fit the task.
            EvaluationError: a sample is missing or repeated, has no class, or another rank failed.
        """
        splits = tuple(source.split for source in sources)
        if not splits or len(set(splits)) < len(splits):
            problem = f"`sources` has the splits {list(splits)}."
            raise ConfigurationError(problem, "give at least one source, each with a name of its own.")
        tables = []
        for source in sources:
            marker = _TargetMarker(target, source.split, everywhere or source.failed)
            tables.append(_gather_split(source, partial(self._read, source, marker, forward), self.collective))
            _check_classes(source, tables[-1])
        columns: dict[str, Any] = {name: torch.cat([table.pop(name) for table in tables]) for name in list(tables[0])}
        return SampleResults(splits, tuple(len(source.index) for source in sources), **columns)

    def outputs(self, batches: Source | Iterable[Any], adapter: Adapter) -> Iterator[tuple[Tensor, Any]]:
        """Yields logits and targets, checked by the task; raw batches are moved and unpacked."""
        bound = bind_adapter(adapter, self.model)
        for args, kwargs, target in unpacked(batches, bound, device_of(self.model)):
            with self.context():
                output = self.task.logits(run_model(self.model, args, kwargs))
            self.task.check(output, target)
            yield output, target

    def run_with(self, state: State, sources: Sequence[Source]) -> SampleResults:
        """Runs the model on data with other weights, then restores its own."""
        with temporary_weights(self.model, state):
            return self.run(sources)

    def _read(self, source: Source, marker: _TargetMarker, forward: Forward | None) -> Table:
        parts: dict[str, list[Tensor]] = {name: [] for name in DTYPES}
        output: Tensor | None = None
        for number, batch in enumerate(source):
            poll()
            try:
                output = self.output(batch, forward)
                _check_count(batch, output)
                batch, unusable = _fill_missing_classes(batch, output, self.task, check=number == 0)
                self.task.check(output, batch.target)
                columns = _columns(batch, output, self.task, marker)
                if unusable is not None:
                    columns["label"] = columns["label"].masked_fill(unusable, NO_CLASS)
            except RuntimeError as error:
                _check_devices(source.split, batch, device_of(self.model), error)
                raise
            for name, column in columns.items():
                parts[name].append(column)
        # Column by column, to save memory.
        table = {name: torch.cat(parts.pop(name) or [torch.zeros(0, dtype=DTYPES[name])]).cpu() for name in DTYPES}
        if output is not None and output.shape[1:] == (1,):
            _warn_of_probabilities(source.split, table)
        return table


@dataclass
class _TargetMarker:
    target: Target | None
    split: str
    targets_failures: bool
    applies: bool = True  # False after the target has failed

    def check(self, n_classes: int) -> None:
        most = -1 if self.target is None else max(classes_in(self.target), default=-1)
        if most >= n_classes:
            hint = f"the model has the classes 0 to {n_classes - 1}; name one of these."
            raise ConfigurationError(f"`target='{self.target}'`: there is no class {most}.", hint)

    def __call__(
        self, batch: Batch, label: Tensor | None, prediction: Tensor | None, passed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns masks on the device of `passed`, `n` bool: targeted samples, and all samples in the target."""
        nothing, target = torch.zeros_like(passed), self.target
        if target is None:
            return nothing, nothing
        if self.targets_failures:
            chosen, covered = target.select(batch, label, prediction), target.covers(batch, label, prediction)
            return ~passed & chosen.to(passed.device), covered.to(passed.device)
        if self.applies:
            try:
                return nothing, target.covers(batch, label, prediction).to(passed.device)
            except Exception as error:
                # Only a gate on the target needs it here; counting all samples as in the target is the safe side.
                self.applies, reason = False, str(error).partition("\n")[0]
                problem = (
                    f"`target`: all `{self.split}` samples count as in the target, since it cannot be applied: {reason}"
                )
                warnings.warn(DataWarning(problem), stacklevel=2)
        return nothing, ~nothing


def _warn_of_probabilities(split: str, table: Table) -> None:
    """Warns if single logits look like probabilities: in [0, 1], and better split at 0.5 than by a constant."""
    is_1, margin = table["label"] == 1, table["margin"]
    output, most = torch.where(is_1, margin, -margin), max(int(is_1.sum()), int((~is_1).sum()))
    if bool(((output >= 0) & (output <= 1)).all()) and int(((output > 0.5) == is_1).sum()) > most:
        problem = f"`task`: all outputs on `{split}` data are from 0 to 1 and taken for logits, above 0 is class 1."
        warnings.warn(DataWarning(problem, "for probabilities return what the sigmoid gets."), stacklevel=2)


def _check_count(batch: Batch, output: Tensor) -> None:
    if output.shape[:1] != (len(batch),):
        raise ConfigurationError(
            f"`task`: the model returned {list(output.shape)} for {len(batch)} targets.\n{describe(batch.raw)}",
            f"its first dimension must count samples; {adapter_hint(batch.raw)}",
        )


def _fill_missing_classes(batch: Batch, output: Tensor, task: Task, check: bool) -> tuple[Batch, Tensor | None]:
    """Replaces missing classes by class 0; returns the batch and their mask, `n` bool, or None if none is missing.

    In the first batch (`check`) only negative labels count as missing: labels above all classes hint at a wrong
    argument.
    """
    target, label = batch.target, task.label(batch.target)
    if label is None:
        return batch, None
    unusable = label < 0
    is_plain = isinstance(target, Tensor) and not target.is_floating_point() and target.shape == label.shape
    if is_plain and output.ndim == 2 and not check:
        unusable = unusable | (label >= class_logits(output).shape[1])
    if not bool(unusable.any()):
        return batch, None
    if not is_plain:
        return batch, unusable
    return replace(batch, target=target.masked_fill(unusable.to(target.device), 0)), unusable


def _check_classes(source: Source, table: Table) -> None:
    without = source.index[table["label"] == NO_CLASS].tolist()
    if without:
        some = f"{without[:10]}{' ...' if len(without) > 10 else ''}"
        raise UnusableSamplesError(
            f"`{source.split}` data: {len(without)} samples have labels below 0 or above the model's ({some}).",
            "leave samples without a class, such as those that a loss ignores with -100, out of the data.",
            {source.split: without},
        )


def _check_devices(split: str, batch: Batch, device: torch.device, error: RuntimeError) -> None:
    held = {x.device for x in tensors_in((batch.args, batch.kwargs, batch.target))}
    elsewhere = sorted(str(own) for own in held if own != device)
    if elsewhere:
        raise ConfigurationError(
            f"`{split}` data lie on {' and '.join(elsewhere)}, the model on {device}.",
            f"name the model's device: `TensorSource(..., device={str(device)!r})`.",
        ) from error


def _columns(batch: Batch, output: Tensor, task: Task, marker: _TargetMarker) -> Table:
    n = len(batch)
    label, prediction, margin = task.label(batch.target), task.prediction(output), task.margin(output, batch.target)
    passed, loss = task.passed(output, batch.target), task.loss(output, batch.target)
    given = {"passed": passed, "loss": loss, "label": label, "prediction": prediction, "margin": margin}
    for name, column in given.items():
        if column is not None:
            kind: Kind = "bool" if name == "passed" else "number"
            check_per_sample(f"`task`: `{name}` of {type(task).__name__}", column, n, kind, tensors_only=True)
    unknown, loss = torch.full_like(passed, -1, dtype=torch.int64), at_least_float32(loss)
    if prediction is not None and (isinstance(task, Multiclass) or (output.ndim == 2 and output.shape[1] > 1)):
        marker.check(class_logits(output).shape[1])
    targeted, in_target = marker(batch, label, prediction, passed)
    return {
        "position": batch.position,
        "label": unknown if label is None else label.long(),
        "prediction": unknown if prediction is None else prediction.long(),
        "loss": loss,
        "margin": torch.full_like(loss, torch.nan) if margin is None else at_least_float32(margin),
        "passed": passed,
        "targeted": targeted,
        "in_target": in_target,
    }


def _gather_split(source: Source, read: Callable[[], Table], collective: Collective) -> Table:
    """Gathers a split from all ranks, in order. If one rank fails, all fail, so none waits forever."""
    mine = collective.all_or_none(read, f"`{source.split}` data could not be read on another rank.")
    whole = {name: torch.cat(collective.gather(mine.pop(name))) for name in list(mine)}
    position, expected = whole.pop("position"), torch.arange(len(source.index))
    if not torch.equal(position, expected):
        order = position.argsort()
        if not torch.equal(position[order], expected):
            raise EvaluationError(
                f"`{source.split}` data: {len(position)} samples came for {len(source.index)} in the data set.",
                "over all ranks each must come once; a collate function must neither drop nor add samples.",
            )
        whole = {name: column[order] for name, column in whole.items()}
    return {"index": source.index, **whole}


Need = Literal["margins", "classes", "recording"]


def check_needs(
    needs: Collection[Need],
    results: SampleResults,
    task: Task,
    by: str = "`method='convex'`",
    hint: str = "use `method='linearized'` for one layer, or leave `method` at 'auto'.",
) -> None:
    """Raises `ConfigurationError` if a task lacks what a method needs; `by` names the method, `hint` a remedy."""
    name = type(task).__name__
    if "margins" in needs and len(results) and bool(results.margin.isnan().all()):
        raise ConfigurationError(
            f"`task`: {name} has no `margin`, so there is nothing that steps could improve.",
            "give it a `margin`, or repair with `method='swarm'`, which needs no gradients.",
        )
    if "classes" in needs and bool((results.label < 0).any()):
        raise ConfigurationError(f"{by} needs a class for each sample, the task {name} has none.", hint)
