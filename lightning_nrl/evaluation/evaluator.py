"""`Evaluator` runs a model over data and records the result of every sample."""

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
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    EvaluationError,
    UnusableSamplesError,
    check_kind,
)
from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Multiclass, Task, class_logits

Forward = Callable[..., Any]
"""A model, or a function to call in its place with the same arguments."""
Table = dict[str, Tensor]
"""Maps column names to tensors with one row per sample."""

DTYPES = {
    **dict.fromkeys(("position", "label", "prediction"), torch.int64),
    **dict.fromkeys(("loss", "margin"), torch.float32),
    **dict.fromkeys(("passed", "targeted", "in_target"), torch.bool),
}
NO_CLASS = -100  # label of a sample that has no class although the task has classes


@dataclass(frozen=True)
class Evaluator:
    """Runs a model, in the form in which it is deployed, over data, and evaluates every sample by a
    task.

    Attributes:
        model: the model, in evaluation mode, on the device where it runs.
        task: decides which samples pass, and computes their losses and margins.
        context: creates the context in which every forward pass runs, such as autocast.
        collective: the ranks that share the data. All ranks must make the same calls in the same
            order.
        called: names of the layers that a prediction calls, in the order of the calls; None if
            unknown.
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
        """Returns an `Evaluator` unchanged. Wraps a module as a multi-class model in one process,
        without autocast.
        """
        return model if isinstance(model, Evaluator) else cls(model)

    @property
    def precision(self) -> DeployedPrecision:
        return DeployedPrecision.of(self.model, self.context)

    def output(self, batch: Batch, forward: Forward | None = None) -> Tensor:
        """Computes the logits of a batch. If `forward` is given, it is called instead of the model."""
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

        Every sample counts exactly once, whatever the number of ranks, and every rank gets the same
        table.

        Args:
            sources: one source for each split, with this rank's share of the samples.
            target: selects the failures to repair (column `targeted`) and all samples of their kind
                (`in_target`); None selects no samples. If the target cannot be applied to a source
                with `failed=False`, a warning is given and `in_target` is True for all samples of
                the source.
            everywhere: True to mark failures in all sources, not only in those with `failed=True`.
            forward: is called instead of the model.

        Raises:
            ConfigurationError: no source is given, a split is given twice, or a batch or target
                does not fit the task.
            EvaluationError: a sample is missing, occurs twice or has no class, or another rank
                failed.
        """
        splits = tuple(source.split for source in sources)
        if not splits or len(set(splits)) < len(splits):
            problem = f"`sources` has the splits {list(splits)}."
            raise ConfigurationError(
                problem, "give at least one source, and each source its own split name."
            )
        tables = []
        for source in sources:
            marker = _TargetMarker(target, source.split, everywhere or source.failed)
            tables.append(
                _gather_split(source, partial(self._read, source, marker, forward), self.collective)
            )
            _check_classes(source, tables[-1])
        columns: dict[str, Any] = {
            name: torch.cat([table.pop(name) for table in tables]) for name in list(tables[0])
        }
        return SampleResults(splits, tuple(len(source.index) for source in sources), **columns)

    def outputs(
        self, batches: Source | Iterable[Any], adapter: Adapter
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yields logits and targets, checked by `Task.check`. Moves raw batches to the device and
        adapts them.
        """
        bound = bind_adapter(adapter, self.model)
        for args, kwargs, target in unpacked(batches, bound, device_of(self.model)):
            with self.context():
                output = self.task.logits(run_model(self.model, args, kwargs))
            self.task.check(output, target)
            yield output, target

    def run_with(self, state: State, sources: Sequence[Source]) -> SampleResults:
        """Runs the model with the weights in `state` over the sources, then restores the model's
        weights.
        """
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
        # One column at a time is joined and its parts are freed, to save memory.
        table = {
            name: torch.cat(parts.pop(name) or [torch.zeros(0, dtype=DTYPES[name])]).cpu()
            for name in DTYPES
        }
        if output is not None and output.shape[1:] == (1,):
            _warn_of_probabilities(source.split, table)
        return table


@dataclass
class _TargetMarker:
    target: Target | None
    split: str
    targets_failures: bool
    applies: bool = True  # False once the target has raised an error

    def check(self, n_classes: int) -> None:
        most = -1 if self.target is None else max(classes_in(self.target), default=-1)
        if most >= n_classes:
            hint = f"the model has the classes 0 to {n_classes - 1}; name one of these."
            raise ConfigurationError(f"`target='{self.target}'`: there is no class {most}.", hint)

    def __call__(
        self, batch: Batch, label: Tensor | None, prediction: Tensor | None, passed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns two bool masks of the batch: its targeted samples, and all of its samples in the
        target.
        """
        nothing, target = torch.zeros_like(passed), self.target
        if target is None:
            return nothing, nothing
        if self.targets_failures:
            chosen, covered = (
                target.select(batch, label, prediction),
                target.covers(batch, label, prediction),
            )
            return ~passed & chosen.to(passed.device), covered.to(passed.device)
        if self.applies:
            try:
                return nothing, target.covers(batch, label, prediction).to(passed.device)
            except Exception as error:
                # This mask only serves gates on samples in the target, which become stricter if it
                # is all True.
                self.applies, reason = False, str(error).partition("\n")[0]
                problem = f"`target` cannot be applied to `{self.split}` data, whose samples all count as in it: {reason}"
                warnings.warn(DataWarning(problem), stacklevel=2)
        return nothing, ~nothing


def _warn_of_probabilities(split: str, table: Table) -> None:
    """Warns if outputs look like probabilities: in [0, 1], and the threshold 0.5 is more accurate
    than one class.
    """
    is_1, margin = table["label"] == 1, table["margin"]
    output, most = torch.where(is_1, margin, -margin), max(int(is_1.sum()), int((~is_1).sum()))
    if bool(((output >= 0) & (output <= 1)).all()) and int(((output > 0.5) == is_1).sum()) > most:
        problem = f"`task`: all outputs on `{split}` data are from 0 to 1, but count as logits: above 0 is class 1."
        warnings.warn(
            DataWarning(problem, "if they are probabilities, return the sigmoid's inputs."),
            stacklevel=2,
        )


def _check_count(batch: Batch, output: Tensor) -> None:
    if output.shape[:1] != (len(batch),):
        raise ConfigurationError(
            f"`task`: the model returned {list(output.shape)} for {len(batch)} targets.\n{describe(batch.raw)}",
            f"the first dimension of the output must count samples; {adapter_hint(batch.raw)}",
        )


def _fill_missing_classes(
    batch: Batch, output: Tensor, task: Task, check: bool
) -> tuple[Batch, Tensor | None]:
    """Replaces unusable labels by class 0. Returns the batch, and a mask of these labels or None if
    all are usable.

    A label is unusable if it is negative or, unless `check` is True, above the model's last class.
    `check` is True for the first batch: there, a label that is too large hints at a wrong argument,
    and `Task.check` raises an error.
    """
    target, label = batch.target, task.label(batch.target)
    if label is None:
        return batch, None
    unusable = label < 0
    is_plain = (
        isinstance(target, Tensor)
        and not target.is_floating_point()
        and target.shape == label.shape
    )
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
            f"`{source.split}` data: {len(without)} samples have labels below 0 or above the last class ({some}).",
            "leave samples without a class out of the data, such as those with the label -100, which a loss ignores.",
            {source.split: without},
        )


def _check_devices(split: str, batch: Batch, device: torch.device, error: RuntimeError) -> None:
    held = {x.device for x in tensors_in((batch.args, batch.kwargs, batch.target))}
    elsewhere = sorted(str(own) for own in held if own != device)
    if elsewhere:
        raise ConfigurationError(
            f"`{split}` data are on {' and '.join(elsewhere)}, but the model is on {device}.",
            f"set the model's device: `TensorSource(..., device={str(device)!r})`.",
        ) from error


def _columns(batch: Batch, output: Tensor, task: Task, marker: _TargetMarker) -> Table:
    n = len(batch)
    label, prediction, margin = (
        task.label(batch.target),
        task.prediction(output),
        task.margin(output, batch.target),
    )
    passed, loss = task.passed(output, batch.target), task.loss(output, batch.target)
    given = {
        "passed": passed,
        "loss": loss,
        "label": label,
        "prediction": prediction,
        "margin": margin,
    }
    for name, column in given.items():
        if column is not None:
            kind: Kind = "bool" if name == "passed" else "number"
            check_per_sample(
                f"`task`: `{name}` of {type(task).__name__}", column, n, kind, tensors_only=True
            )
    unknown, loss = torch.full_like(passed, -1, dtype=torch.int64), at_least_float32(loss)
    if prediction is not None and (
        isinstance(task, Multiclass) or (output.ndim == 2 and output.shape[1] > 1)
    ):
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
    mine = collective.all_or_none(read, f"`{source.split}` data could not be read on another rank.")
    whole = {name: torch.cat(collective.gather(mine.pop(name))) for name in list(mine)}
    position, expected = whole.pop("position"), torch.arange(len(source.index))
    if not torch.equal(position, expected):
        order = position.argsort()
        if not torch.equal(position[order], expected):
            raise EvaluationError(
                f"`{source.split}` data: read {len(position)} samples instead of each of {len(source.index)} once.",
                "over all ranks, no sample may be missing or occur twice; a collate function must keep all samples.",
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
    """Raises a `ConfigurationError` if the task lacks margins or classes named in `needs`. `by`
    names the method.
    """
    name = type(task).__name__
    if "margins" in needs and len(results) and bool(results.margin.isnan().all()):
        raise ConfigurationError(
            f"`task`: {name} has no `margin` that the method could increase.",
            "give it a `margin`, or repair with `method='swarm'`, which needs no gradients.",
        )
    if "classes" in needs and bool((results.label < 0).any()):
        raise ConfigurationError(
            f"{by} needs a class for each sample, but the task {name} has none.", hint
        )
