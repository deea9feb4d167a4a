"""`SampleOptions` gives samples weights, slices and roles, such as protected."""

from __future__ import annotations

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
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.evaluation.slices import (
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

OPTION_WORDS = {"importance": ("focal",), "set_aside": (DOUBTFUL,)}  # words that an option takes
BY_ID: dict[str, tuple[type, ...]] = {  # types of values that name samples by id
    "importance": (Mapping,),
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
        tiny = torch.finfo(torch.float32).tiny
        return (1 - torch.exp(-results.loss.double().clamp_min(0))).clamp_min(tiny) ** self.gamma


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
        keep: samples that must not break if there is an old model: all that the new model gets
            right (`both`), or only those that the old model gets right too (`reference`).

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
    keep: Keep = "both"

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, KEEPS)
        self._columns("importance", "slices", "protected", "set_aside")
        if self.risk is not None:
            _risk_levels(self.risk)
        if self.quotas is not None:
            object.__setattr__(self, "quotas", checked_quotas(self.quotas))
            if self.slices is None:
                problem = f"`quotas={self.quotas!r}` needs slices, but `slices` is not given."
                raise ConfigurationError(problem, "give the slice of each sample with `slices`.")

    def columns(self) -> SampleOptions:
        """Returns a copy with only those options that are read from batches, to check them on a few
        samples.
        """
        own = self._columns("importance", "protected", "set_aside")
        return SampleOptions(slices=self.slices, **{name: getattr(self, name) for name in own})

    def evaluate(
        self,
        evaluator: Evaluator,
        sources: Sequence[Source],
        target: Target | None = None,
        *,
        everywhere: bool = False,
        known: bool = True,
    ) -> tuple[SampleResults, Tensor]:
        """Evaluates the model and applies the options. Returns the results and a mask of failures
        set
        aside, `N` bool.

        Failures set aside are not targeted in the results. `known=False`, for data that the repair
        only evaluates, ignores `importance` and `set_aside`. The other arguments are those of
        `Evaluator.run`.
        """
        asked = ("protected", "importance", "set_aside") if known else ("protected",)
        columns, slices = self._columns(*asked), self._columns("slices").get("slices")
        recording = (
            [_column_recorder(source, columns, evaluator.task) for source in sources]
            if columns
            else []
        )
        slicing = [SliceRecorder(source, slices, evaluator.task) for source in recording or sources]
        results = evaluator.run(slicing, target, everywhere=everywhere)
        if slices is not None:
            names, group = common_names([one.named(evaluator.collective) for one in slicing])
            results = replace(results, names=names, group=group)
        noted = (
            torch.cat([one.gathered(evaluator.collective) for one in recording])
            if columns
            else torch.zeros(0, 0)
        )
        values = dict(zip(columns, noted.T, strict=True))
        for name in asked:
            if isinstance(getattr(self, name), BY_ID[name]):
                splits = [
                    source.split for source in sources if source.failed or name == "protected"
                ]
                values[name] = _values_by_id(
                    name, getattr(self, name), results, splits, strict=known
                )
        set_aside = torch.zeros_like(results.targeted)
        if "set_aside" in values:
            set_aside = results.targeted & (values["set_aside"] > 0)
        cost = _breaking_costs(results, values.get("protected"))
        risk: Tensor | None = None
        if self.risk is not None:
            risk, at_worst = _weigh_risk(_risk_levels(self.risk), results)
            cost = torch.where(results.passed, cost * at_worst, cost)
        results = replace(results, targeted=results.targeted & ~set_aside, weight=cost)
        focal = Focal() if self.importance == "focal" else self.importance
        importance = focal.weigh(results) if isinstance(focal, Focal) else values.get("importance")
        if risk is not None:
            importance = risk if importance is None else importance * risk
        if known and importance is not None:
            results = _with_repair_worth(results, importance)
        return results, set_aside

    def _columns(self, *names: str) -> dict[str, Column]:
        """Returns those of the named options that are columns of batches; raises an error for
        invalid values.
        """
        found = {}
        for name in names:
            value = getattr(self, name)
            is_word = isinstance(value, Focal) or (
                isinstance(value, str) and value in OPTION_WORDS.get(name, ())
            )
            if value is not None and not is_word and not isinstance(value, BY_ID.get(name, ())):
                found[name] = find_column(name, value)
        return found


def _risk_levels(risk: Any) -> dict[int, dict[int | None, int]]:
    """Converts `risk` to `{true: {predicted: level}}`; the predicted class None stands for all that
    are not listed.
    """
    if not isinstance(risk, Mapping):
        raise ConfigurationError(
            f"`risk={risk!r}` is no mapping.", "write `risk={(3, 5): 4, 7: 2}`."
        )
    levels: dict[int, dict[int | None, int]] = {}
    for key, level in risk.items():
        check_whole(f"risk[{key!r}]", level, 1)
        pair: Sequence[Any] = key if isinstance(key, tuple) else (key,)
        if isinstance(key, str) and all(part.strip().isdecimal() for part in key.split("->")):
            pair = [int(part) for part in key.split("->")]
        if len(pair) not in (1, 2) or not all(map(is_class, pair)) or len({*pair}) < len(pair):
            raise ConfigurationError(
                f"`risk` has the key {key!r}.",
                "give a true class, or the pair of a true and a predicted class: `risk={7: 2, (3, 5): 4}`, in YAML "
                "`'3 -> 5': 4`.",
            )
        levels.setdefault(pair[0], {})[pair[1] if len(pair) == 2 else None] = level
    return levels


def _weigh_risk(
    levels: Mapping[int, Mapping[int | None, int]], results: SampleResults
) -> tuple[Tensor, Tensor]:
    """Returns for each sample the value of repairing it and the cost of breaking it (highest level
    of its class).
    """
    if bool((results.label < 0).all()):
        raise ConfigurationError(
            "`risk` is for confusions of classes, but the task has no classes.",
            "use `importance` and `protected`.",
        )
    worth, cost = torch.ones(2, len(results), dtype=torch.float64)
    for true, own in levels.items():
        mine = results.label == true
        worth[mine] = own.get(None, 1)
        cost[mine] = max(own.values())
        for predicted, level in own.items():
            if predicted is not None:
                worth[mine & (results.prediction == predicted)] = level
    return worth, cost


def _column_recorder(source: Source, columns: Mapping[str, Column], task: Task) -> RecordingSource:
    def note(batch: Batch) -> Tensor:
        label = task.label(batch.target)
        return torch.stack(
            [numbers(name, column, batch, label) for name, column in columns.items()], 1
        )

    return RecordingSource(source, note, torch.zeros(0, len(columns), dtype=torch.float64))


def _with_repair_worth(results: SampleResults, importance: Tensor) -> SampleResults:
    wrong = results.targeted & ~(importance.isfinite() & (importance > 0))
    if wrong.any():
        raise ConfigurationError(
            f"`importance` is {float(importance[wrong][0])} for {int(wrong.sum())} failed samples "
            f"({_ids(results, wrong)}).",
            "give finite numbers above 0; to leave out failures, choose another `target`.",
        )
    return normalise_weights(
        replace(results, weight=torch.where(results.targeted, importance, results.weight))
    )


def _breaking_costs(results: SampleResults, protected: Tensor | None) -> Tensor:
    if protected is None:
        return results.weight
    # Numbers that are all 0 or 1 mark the protected samples; other numbers are costs.
    marks = bool(((protected == 0) | (protected == 1)).all())
    cost = torch.where(protected > 0, torch.inf, 1.0) if marks else protected
    wrong = results.passed & ~((cost >= 1) & (cost.isinf() | (cost == cost.round())))
    if wrong.any():
        raise ConfigurationError(
            f"`protected` is {float(cost[wrong][0])} for {int(wrong.sum())} passed samples ({_ids(results, wrong)}).",
            "give bools, or whole numbers from 1, the costs of breaking a sample; infinity protects it.",
        )
    return torch.where(results.passed, cost, 1.0)


def _values_by_id(
    argument: str, value: Any, results: SampleResults, splits: Sequence[str], *, strict: bool
) -> Tensor:
    """Converts an option that names samples by id to `N` float64, one value per sample.

    A listed id gets 1, an id in a mapping gets its number. Other samples get 1 for importance and
    costs, else 0. Ids without a split belong to the only split in `splits`. `strict=False` ignores
    unknown splits and ids without a split.
    """
    by_key = isinstance(value, Mapping)
    has_costs = (
        argument == "protected"
        and by_key
        and not all(isinstance(v, (list, tuple)) for v in value.values())
    )
    values = torch.full(
        (len(results),), 1.0 if has_costs or argument == "importance" else 0.0, dtype=torch.float64
    )
    named = by_key and all(isinstance(key, str) for key in value)
    if not named and len(splits) != 1 and strict:
        raise ConfigurationError(
            f"`{argument}`: the ids do not say which of the splits {list(splits)} they are in.",
            f"name the split: `{argument}={{{splits[0]!r}: ...}}`."
            if splits
            else "set `failed=True` in a source.",
        )
    tables = value if named else {split: value for split in splits[:1] if strict}
    for split, own in tables.items():
        if split not in results.splits:
            if strict and argument != "protected":
                problem = f"`{argument}` names the split {split!r}."
                raise ConfigurationError(problem, f"there are {list(results.splits)}.")
            continue
        pairs = own.items() if isinstance(own, Mapping) else ((i, 1.0) for i in own)
        place = {index: row for row, index in enumerate(results.index[results.of(split)].tolist())}
        start = results.start(split)
        for index, number in pairs:
            if index not in place:
                raise ConfigurationError(
                    f"`{argument}`: {split!r} data have no sample {index!r}.",
                    "ids are positions in the data set, as reports give them.",
                )
            values[start + place[index]] = float(number)
    return values


def _ids(results: SampleResults, rows: Tensor) -> str:
    return "; ".join(f"{split}: {ids[:5]}" for split, ids in results.ids(rows).items() if ids)
