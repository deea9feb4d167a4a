"""What a model does on data: one row a sample, the same table on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.precision import Context, at_least_float32
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError, EvaluationError, explain
from lightning_nrl.tasks import Task

__all__ = ["SampleResults", "collect", "non_finite"]

Forward = Callable[..., Any]
Table = dict[str, Tensor]
"""Columns by name, one row a sample."""

DTYPES = {
    "position": torch.int64,
    "label": torch.int64,
    "prediction": torch.int64,
    "loss": torch.float32,
    "margin": torch.float32,
    "passed": torch.bool,
    "targeted": torch.bool,
}


@dataclass(frozen=True)
class SampleResults:
    """One row a sample, split by split, within a split in the order of the data set. On the CPU.

    Attributes:
        splits: names of the splits, `S` of them.
        sizes: samples in each split.
        index: `N` int64, each sample's position in its data set: the id that reports give.
        label: `N` int64, the true class, -1 where the task has none.
        prediction: `N` int64, the predicted class, -1 where the task has none.
        loss: `N` float, each sample's loss.
        passed: `N` bool.
        targeted: `N` bool, failed samples that the target selects; on known data I_neg.
        margin: `N` float, how far each sample is from being wrong, NaN where the task has no such number.
        weight: `N` float64, what each sample counts: of a targeted one its repair, 1 on average; of a passed one its
            breaking, a whole number from 1, infinite where it may not break at all. 1 for all others, and by default.
        names: names of the slices, `G` of them.
        group: `N` int64, the number of each sample's slice, -1 where it is in none, and by default.
    """

    splits: tuple[str, ...]
    sizes: tuple[int, ...]
    index: Tensor
    label: Tensor
    prediction: Tensor
    loss: Tensor
    passed: Tensor
    targeted: Tensor
    margin: Tensor
    weight: Tensor = None  # type: ignore[assignment]
    names: tuple[str, ...] = ()
    group: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.weight is None:
            object.__setattr__(self, "weight", torch.ones(len(self.passed), dtype=torch.float64))
        if self.group is None:
            object.__setattr__(self, "group", torch.full((len(self.passed),), -1))

    def __len__(self) -> int:
        return len(self.passed)

    def rows(self, split: str, position: Tensor) -> Tensor:
        """Rows of the samples at these positions (`Batch.position`) of a split."""
        return position + self.start(split)

    def start(self, split: str) -> int:
        """The first row of a split."""
        return sum(self.sizes[: self.splits.index(split)])

    def of(self, split: str) -> slice:
        """The rows of a split."""
        start = self.start(split)
        return slice(start, start + self.sizes[self.splits.index(split)])

    @property
    def weighted(self) -> bool:
        """Whether not all samples count alike."""
        return bool((self.weight != 1).any())

    @property
    def protected(self) -> Tensor:
        """`N` bool, passed samples that may not break at all."""
        return self.passed & self.weight.isinf()

    @property
    def finite_weight(self) -> Tensor:
        """`N`, the weights, those of protected samples as large as all others of passed samples together and 1 more."""
        infinite = self.weight.isinf()
        return torch.where(infinite, 1 + self.weight[self.passed & ~infinite].sum(), self.weight)

    def gain(self, repaired: Tensor) -> float:
        """What repairs, `N` bool, are worth: how many targets are among them where all count alike."""
        return float(self.weight[repaired & self.targeted].sum())

    def harm(self, broken: Tensor) -> float:
        """What broken samples, `N` bool, cost: how many they are where all count alike."""
        return float(self.weight[broken].sum())

    def ids(self, mask: Tensor) -> dict[str, list[int]]:
        """Data-set positions of the marked rows, by split."""
        return {split: self.index[self.of(split)][mask[self.of(split)]].tolist() for split in self.splits}


@torch.no_grad()
def collect(
    forward: Forward,
    sources: Sequence[Source],
    *,
    task: Task,
    target: Target | None = None,
    everywhere: bool = False,
    context: Context = nullcontext,
    collective: Collective | None = None,
) -> SampleResults:
    """Runs the model once over all sources and writes down what it did on each sample.

    Every sample is counted exactly once, whatever the number of ranks, and every rank gets the same table.

    Args:
        forward: the model in evaluation mode, or a function that calls it.
        sources: the splits, this rank's share of each.
        task: what passed and loss mean.
        target: which failed samples are marked as targeted; None marks none.
        everywhere: whether the failed samples of all sources are marked, not only of those whose failures are
            candidates for repair.
        context: entered around every forward pass, such as autocast.
        collective: the ranks that share the work.

    Returns:
        The evidence, on the CPU.

    Raises:
        ConfigurationError: no source, two of one name, a batch or a target that does not suit the task.
        EvaluationError: a split's samples are not there exactly once, some have no class, or another rank could not
            read its share.
    """
    collective = collective or Collective()
    splits = tuple(source.split for source in sources)
    if not splits or len(set(splits)) < len(splits):
        raise ConfigurationError(
            explain(
                f"`sources` has the splits {list(splits)}.", "give at least one source, each with a name of its own."
            )
        )
    tables = []
    for source in sources:
        wanted = target if everywhere or source.failed else None
        tables.append(_exchanged(source, partial(_read, forward, source, task, wanted, context), collective))
    columns: dict[str, Any] = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
    return SampleResults(splits, tuple(len(source.index) for source in sources), **columns)


def non_finite(evidence: SampleResults) -> dict[str, list[int]]:
    """Data-set positions of the samples whose loss is NaN or infinite, by split; splits without any are left out."""
    return {split: ids for split, ids in evidence.ids(~evidence.loss.isfinite()).items() if ids}


def _read(forward: Forward, source: Source, task: Task, target: Target | None, context: Context) -> Table:
    """This rank's rows of one split, on the CPU, in the order in which they came."""
    parts: dict[str, list[Tensor]] = {name: [] for name in DTYPES}
    lowest = -1  # where the task has no classes
    for batch in source:
        with context():
            output = task.logits(forward(*batch.args, **batch.kwargs))
        task.check(output, batch.target)
        lowest = -1 if task.label(batch.target) is None else 0
        for name, column in _columns(batch, output, task, target).items():
            parts[name].append(column)
    table = {
        name: torch.cat(rows).cpu() if rows else torch.zeros(0, dtype=DTYPES[name]) for name, rows in parts.items()
    }
    nameless = source.index[table["position"][table["label"] < lowest]].tolist()
    if nameless:
        raise EvaluationError(
            explain(
                f"`{source.split}` data: {len(nameless)} samples have labels below 0 ({nameless[:10]}).",
                "leave samples without a class, such as those that a loss ignores with -100, out of the data.",
            )
        )
    return table


def _columns(batch: Batch, output: Tensor, task: Task, target: Target | None) -> Table:
    n = len(batch)
    label, prediction = task.label(batch.target), task.prediction(output)
    passed = _checked("passed", task.passed(output, batch.target), n, task)
    loss = _checked("loss", task.loss(output, batch.target), n, task)
    if passed.dtype != torch.bool:
        raise ConfigurationError(
            explain(f"`task`: `passed` of {type(task).__name__} gave {passed.dtype}.", "return one bool a sample.")
        )
    unknown = torch.full_like(passed, -1, dtype=torch.int64)
    margin = task.margin(output, batch.target)
    if target is None:
        targeted = torch.zeros_like(passed)
    else:
        targeted = ~passed & target.select(batch, label, prediction).to(passed.device)
    return {
        "position": batch.position,
        "label": unknown if label is None else _checked("label", label, n, task).long(),
        "prediction": unknown if prediction is None else _checked("prediction", prediction, n, task).long(),
        "loss": at_least_float32(loss),
        "margin": torch.full_like(at_least_float32(loss), torch.nan)
        if margin is None
        else at_least_float32(_checked("margin", margin, n, task)),
        "passed": passed,
        "targeted": targeted,
    }


def _checked(name: str, column: Tensor, n: int, task: Task) -> Tensor:
    """Refuses what would be spread out silently, such as `n x 1` against `n`."""
    if column.shape == (n,):
        return column
    raise ConfigurationError(
        explain(
            f"`task`: `{name}` of {type(task).__name__} gave {list(column.shape)} for a batch of {n} samples.",
            f"return one value a sample, [{n}]; the model's output and the target must count the same samples.",
        )
    )


def _exchanged(source: Source, read: Callable[[], Table], collective: Collective) -> Table:
    """The whole split from every rank's rows, in order. If one rank fails all do, so that none waits for ever."""
    mine = collective.all_or_none(read, f"`{source.split}` data could not be read on another rank.")
    whole = {name: torch.cat(collective.gather(column)) for name, column in mine.items()}
    position = whole.pop("position")
    order = position.argsort()
    if not torch.equal(position[order], torch.arange(len(source.index))):
        raise EvaluationError(
            explain(
                f"`{source.split}` data: {len(position)} samples came for {len(source.index)} in the data set.",
                "over all ranks each must come once; a collate function must neither drop nor add samples.",
            )
        )
    return {"index": source.index, **{name: column[order] for name, column in whole.items()}}
