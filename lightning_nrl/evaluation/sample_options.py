"""`SampleOptions` gives samples weights, slices and roles, such as protected."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_nrl._utils.checks import is_class
from lightning_nrl.data import Batch, Source, Target
from lightning_nrl.data.batch import RecordingSource
from lightning_nrl.data.columns import Column, find_column, numbers
from lightning_nrl.errors import ConfigurationError, check_choice, check_real, check_whole
from lightning_nrl.evaluation.evaluator import Evaluator, Forward
from lightning_nrl.evaluation.sample_names import sample_names
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.evaluation.slices import (
    GroupRecorder,
    Quota,
    SliceRecorder,
    checked_quotas,
    common_names,
    normalise_weights,
)
from lightning_nrl.tasks import Task

DOUBTFUL = "doubtful"
"""Value of `set_aside` for failures whose label looks wrong
(`lightning_nrl.evaluation.head_features.doubtful`).
"""

Keep = Literal["both", "reference"]
"""Choices for `SampleOptions.keep`."""
KEEPS: tuple[Keep, ...] = get_args(Keep)

# Words that an option takes, and types of values that name samples by id.
OPTION_WORDS = {"importance": ("focal",), "protected": (), "set_aside": (DOUBTFUL,)}
BY_ID: dict[str, type | tuple[type, ...]] = {
    "importance": Mapping,
    "protected": (Mapping, list, tuple),
    "set_aside": (Mapping, list, tuple),
}


@dataclass(frozen=True)
class Focal:
    """Weights each failure by (1 - p)^gamma, where p is the probability of its true class.

    This is the factor of the focal loss (Lin et al., 2017). p is computed as exp(-loss), which is
    exact for cross entropy. With `gamma=0` all failures have the same weight; larger values favour
    hard failures.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_real("Focal.gamma", self.gamma, "exponent", "give a finite number from 0.", least=0)

    def weigh(self, results: SampleResults) -> Tensor:
        """Returns the weight of each of `N` samples, float64."""
        probability = torch.exp(-results.loss.double().clamp_min(0))
        tiny = torch.finfo(torch.float32).tiny
        return (1 - probability).clamp_min(tiny) ** self.gamma


@dataclass(frozen=True)
class SampleOptions:
    """Says which samples matter most, which must not break, and which are left out of the repair.

    A *column* below is a key or an index into your batches, a function of a batch that returns a
    value for each sample, or the address of such a function, `package.module:function`.

    Attributes:
        importance: value of repairing each failed sample: a column of numbers above 0; numbers by
            id, `{id: number}` or `{split: {id: number}}`; or `"focal"` or `Focal(gamma)`, which
            favour hard samples. None: equal values.
        slices: slice of each sample: a column of names, numbers or bools, or a target, whose
            samples form one slice. Each slice has a row in the report.
        quotas: for some slices, the number or share of the targets that must be repaired, such as
            `{"night": 5, "truck": "50%"}`. If fewer are repaired, the repair is refused.
        protected: passed samples of known and calibration data that must never break, whatever the
            gate: a column of bools, a target, or ids by split. Whole numbers instead of bools are
            costs of breaking samples (default: 1).
        risk: severity of confusions, as in the methods Athena and DRWeightMerge: whole numbers from
            1 by true class, or by true and predicted class, `{7: 2, (3, 5): 4}`, in YAML `"3 -> 5":
            4`. Severities (default: 1) multiply the value of repairing a confusion. A class's
            highest severity multiplies the cost of breaking its samples.
        set_aside: failures in the target that are not to be repaired: a column of bools, a target,
            ids, or `"doubtful"` for failures whose label looks wrong. The report lists these
            failures.
        groups: group of each sample: a column of whole numbers or names, such as patients, whose
            samples resemble each other. The same value in two splits is the same group. Groups are
            held out as a whole, and confidence limits and tests count groups instead of samples.
        keep: samples that must not break if there is an old model: all that the new model gets
            right (`both`), or only those that the old model gets right too (`reference`). Then
            at most one other sample may break per repaired regression.
        sample_id: your name of each sample: a column of names or whole numbers, such as file names.
            Reports show it beside the position. It need not be unique, and None is no name.

    Example:
        >>> SampleOptions(slices="camera", quotas={"night": "50%"}, protected="must_pass").quotas
        {'night': 0.5}
    """

    importance: Any = None
    slices: Any = None
    quotas: Mapping[str, Quota] | None = None
    protected: Any = None
    risk: Mapping[Any, int] | None = None
    set_aside: Any = None
    groups: Any = None
    keep: Keep = "both"
    sample_id: Any = None

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, KEEPS)
        _columns_among(self._options())
        for name in ("slices", "groups", "sample_id"):
            if vars(self)[name] is not None:
                find_column(name, vars(self)[name])
        if self.risk is not None:
            _risk_levels(self.risk)
        if self.quotas is not None:
            object.__setattr__(self, "quotas", checked_quotas(self.quotas))
            if self.slices is None:
                raise ConfigurationError(
                    f"`quotas={self.quotas!r}` needs slices, but `slices` is not given.",
                    "give the slice of each sample with `slices`.",
                )

    def columns(self) -> SampleOptions:
        """Returns a copy with only the options read from batches, to check a few samples."""
        columns: dict[str, Any] = {**_columns_among(self._options())}
        return SampleOptions(
            slices=self.slices, groups=self.groups, sample_id=self.sample_id, **columns
        )

    def _options(self, known: bool = True) -> dict[str, Any]:
        options = {"protected": self.protected}
        if known:
            options |= {"importance": self.importance, "set_aside": self.set_aside}
        return options

    def evaluate(
        self,
        evaluator: Evaluator,
        sources: Sequence[Source],
        target: Target | None = None,
        *,
        everywhere: bool = False,
        known: bool = True,
        forward: Forward | None = None,
    ) -> tuple[SampleResults, Tensor]:
        """Evaluates the model and applies the options.

        Failures set aside are not targeted in the results. `known=False`, for data that the repair
        only evaluates, ignores `importance` and `set_aside`. The other arguments are those of
        `Evaluator.run`.

        Returns:
            The results, and a mask of failures set aside, `N` bool.
        """
        if self.sample_id is not None:
            for source in sources:
                sample_names(self.sample_id, source, [], evaluator)  # refuses a wrong column
        options = self._options(known)
        columns = _columns_among(options)
        slices = None
        if self.slices is not None:
            slices = find_column("slices", self.slices)
        recorders = [_column_recorder(source, columns, evaluator.task) for source in sources]
        slicers = [SliceRecorder(recorder, slices, evaluator.task) for recorder in recorders]
        groupers: list[GroupRecorder] = []
        if self.groups is not None:
            column = find_column("groups", self.groups)
            groupers = [
                GroupRecorder(slicer, column, evaluator.task, "groups") for slicer in slicers
            ]
        results = evaluator.run(groupers or slicers, target, everywhere=everywhere, forward=forward)
        ranks = evaluator.collective
        if groupers:
            group = torch.cat([grouper.gathered(ranks) for grouper in groupers])
            results = replace(results, group=group)
        if slices is not None:
            names, number = common_names([slicer.named(ranks) for slicer in slicers])
            results = replace(results, slices=names, slice_number=number)
        table = torch.cat([recorder.gathered(ranks) for recorder in recorders])
        values: dict[str, Tensor] = dict(zip(columns, table.T, strict=True))
        for name, value in options.items():
            if isinstance(value, BY_ID[name]):
                splits = [
                    source.split for source in sources if source.failed or name == "protected"
                ]
                values[name] = _values_by_id(name, value, results, splits, strict=known)
        return self._applied(results, values, known)

    def _applied(
        self, results: SampleResults, values: Mapping[str, Tensor], known: bool
    ) -> tuple[SampleResults, Tensor]:
        set_aside = results.targeted & (values.get("set_aside", torch.zeros(1)) > 0)
        cost = _breaking_costs(results, values.get("protected"))
        importance = values.get("importance")
        if self.importance == "focal":
            importance = Focal().weigh(results)
        elif isinstance(self.importance, Focal):
            importance = self.importance.weigh(results)
        if self.risk is not None:
            worth, class_cost = _weigh_risk(self.risk, results)
            cost = torch.where(results.passed, cost * class_cost, cost)
            if importance is not None:
                worth *= importance
            importance = worth
        results = replace(results, targeted=results.targeted & ~set_aside, weight=cost)
        if known and importance is not None:
            results = _with_repair_worth(results, importance)
        return results, set_aside


def _columns_among(options: Mapping[str, object]) -> dict[str, Column]:
    """Parses the options that are columns of batches; raises an error for invalid values."""
    columns = {}
    for name, value in options.items():
        is_word = isinstance(value, str) and value in OPTION_WORDS[name]
        if value is not None and not is_word and not isinstance(value, (Focal, BY_ID[name])):
            columns[name] = find_column(name, value)
    return columns


def _risk_levels(risk: Mapping[object, int]) -> dict[tuple[int, ...], int]:
    """Returns the levels by `(true,)` and then by `(true, predicted)`."""
    if not isinstance(risk, Mapping):
        raise ConfigurationError(
            f"`risk={risk!r}` is no mapping.", "write `risk={(3, 5): 4, 7: 2}`."
        )
    levels = {}
    for key, level in risk.items():
        check_whole(f"risk[{key!r}]", level, 1)
        classes = key if isinstance(key, tuple) else (key,)
        if isinstance(key, str) and re.fullmatch(r"\s*\d+\s*(->\s*\d+\s*)?", key):
            classes = tuple(map(int, key.split("->")))
        n = len(classes)
        if n not in (1, 2) or not all(map(is_class, classes)) or len(set(classes)) < n:
            raise ConfigurationError(
                f"`risk` has the key {key!r}.",
                "give a true class, or the pair of a true and a predicted class: `risk={7: 2, "
                "(3, 5): 4}`, in YAML `'3 -> 5': 4`.",
            )
        levels[classes] = level
    return dict(sorted(levels.items(), key=lambda item: len(item[0])))


def _weigh_risk(risk: Mapping[object, int], results: SampleResults) -> tuple[Tensor, Tensor]:
    """Returns the value of repairing each sample, and the cost of breaking it.

    The cost is the highest level of the sample's class.
    """
    if (results.label < 0).all():
        raise ConfigurationError(
            "`risk` is for confusions of classes, but the task has no classes.",
            "use `importance` and `protected`.",
        )
    worth, cost = torch.ones(2, len(results), dtype=torch.float64)
    for classes, level in _risk_levels(risk).items():
        rows = results.label == classes[0]
        cost[rows] = cost[rows].clamp_min(level)
        if len(classes) == 2:
            rows &= results.prediction == classes[1]
        worth[rows] = level
    return worth, cost


def _column_recorder(source: Source, columns: Mapping[str, Column], task: Task) -> RecordingSource:
    def note(batch: Batch) -> Tensor:
        table = torch.empty(len(batch), len(columns), dtype=torch.float64)
        for i, (name, column) in enumerate(columns.items()):
            table[:, i] = numbers(name, column, batch, task.label(batch.target))
        return table

    return RecordingSource(source, note, torch.empty(0, len(columns), dtype=torch.float64))


def _with_repair_worth(results: SampleResults, importance: Tensor) -> SampleResults:
    is_valid = importance.isfinite() & (importance > 0)
    wrong = results.targeted & ~is_valid
    if wrong.any():
        raise ConfigurationError(
            f"`importance` is {float(importance[wrong][0])} for {int(wrong.sum())} failed samples "
            f"({_ids(results, wrong)}).",
            "give finite numbers above 0; to leave out failures, choose another `target`.",
        )
    weight = torch.where(results.targeted, importance, results.weight)
    return normalise_weights(replace(results, weight=weight))


def _breaking_costs(results: SampleResults, protected: Tensor | None) -> Tensor:
    if protected is None:
        return results.weight
    cost = protected
    # Numbers that are all 0 or 1 mark the protected samples; other numbers are costs.
    if ((protected == 0) | (protected == 1)).all():
        cost = torch.where(protected > 0, torch.inf, 1.0)
    is_whole = cost.isinf() | (cost == cost.round())
    wrong = results.passed & ~((cost >= 1) & is_whole)
    if wrong.any():
        raise ConfigurationError(
            f"`protected` is {float(cost[wrong][0])} for {int(wrong.sum())} passed samples "
            f"({_ids(results, wrong)}).",
            "give bools, or whole numbers from 1, the costs of breaking a sample; infinity "
            "protects it.",
        )
    return torch.where(results.passed, cost, 1.0)


def _values_by_id(
    argument: str,
    value: Any,
    results: SampleResults,
    splits: Sequence[str],
    *,
    strict: bool,
) -> Tensor:
    """Converts an option that names samples by id to `N` float64, one value per sample.

    A listed id gets 1, an id in a mapping gets its number. Other samples get 1 for importance and
    costs, else 0. `strict=False` ignores unknown splits and ids without a split.
    """
    has_numbers = argument == "importance"
    if argument == "protected" and isinstance(value, Mapping):
        has_numbers = not all(isinstance(ids, (list, tuple)) for ids in value.values())
    default = 1.0 if has_numbers else 0.0
    values = torch.full((len(results),), default, dtype=torch.float64)
    for split, ids in _ids_by_split(argument, value, splits, strict).items():
        if split not in results.splits:
            if not strict or argument == "protected":
                continue
            raise ConfigurationError(
                f"`{argument}` names the split {split!r}.", f"there are {list(results.splits)}."
            )
        ids_of_split = results.index[results.of(split)].tolist()
        row_of = {index: row for row, index in enumerate(ids_of_split, results.start(split))}
        number_of = ids if isinstance(ids, Mapping) else dict.fromkeys(ids, 1.0)
        for index, number in number_of.items():
            if index not in row_of:
                raise ConfigurationError(
                    f"`{argument}`: {split!r} data have no sample {index!r}.",
                    "ids are positions in the data set, as reports give them.",
                )
            values[row_of[index]] = float(number)
    return values


def _ids_by_split(
    argument: str, value: Any, splits: Sequence[str], strict: bool
) -> Mapping[str, Any]:
    """Returns ids by split; ids without a split belong to the only split in `splits`."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return value
    if not strict:
        return {}
    if len(splits) == 1:
        return {splits[0]: value}
    hint = "set `failed=True` in a source."
    if splits:
        hint = f"name the split: `{argument}={{{splits[0]!r}: ...}}`."
    raise ConfigurationError(
        f"`{argument}`: the ids do not say which of the splits {list(splits)} they are in.", hint
    )


def _ids(results: SampleResults, rows: Tensor) -> str:
    by_split = results.ids(rows).items()
    return "; ".join(f"{split}: {ids[:5]}" for split, ids in by_split if ids)
