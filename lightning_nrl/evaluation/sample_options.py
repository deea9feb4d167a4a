"""How much each sample counts: options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_nrl.data import Source, Target
from lightning_nrl.data.columns import find_column
from lightning_nrl.errors import ConfigurationError, check_choice, check_real
from lightning_nrl.evaluation._quotas import Quota, checked_quotas
from lightning_nrl.evaluation._risk import RiskTable
from lightning_nrl.evaluation._sample_weights import (
    breaking_costs,
    column_recorder,
    values_by_id,
    with_repair_worth,
    with_slices,
)
from lightning_nrl.evaluation._slices import SliceRecorder
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["DOUBTFUL", "KEEPS", "Focal", "Keep", "SampleOptions"]

DOUBTFUL = "doubtful"
"""Sets aside the failures whose label looks wrong (`lightning_nrl.evaluation._neighbors.doubtful`)."""

Keep = Literal["both", "reference"]
"""In an update, what may not break: what either model gets right, or only what the replaced one does too."""
KEEPS: tuple[Keep, ...] = get_args(Keep)

NAMED_CHOICES = {"importance": ("focal",), "set_aside": (DOUBTFUL,)}


@dataclass(frozen=True)
class Focal:
    """Hard failures count more: each (1 - p)^gamma, p the probability that the model gives the truth.

    The factor of the focal loss (Lin et al., 2017). p is exp(-loss), which for cross entropy is that probability.

    Attributes:
        gamma: 0 makes all alike; the larger, the more the hard ones count.

    Raises:
        ConfigurationError: on construction, for a gamma that is not a finite number from 0.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_real("Focal.gamma", self.gamma, "exponent", "give a finite number from 0.", least=0)

    def weigh(self, results: SampleResults) -> Tensor:
        """`N` float64, above 0 wherever the loss is."""
        tiny = torch.finfo(torch.float32).tiny
        return (1 - torch.exp(-results.loss.double().clamp_min(0))).clamp_min(tiny) ** self.gamma


@dataclass(frozen=True)
class SampleOptions:
    """What each sample counts: failures that matter more, samples that may not break, slices, labels in doubt.

    A column is a key or a place in your batches, a function of a batch, or its address, `package.module:function`.

    Attributes:
        importance: what repairing each failed sample is worth, beside the others: a column of numbers above 0, ids as
            `{id: number}` or `{split: {id: number}}`, or `"focal"` or `Focal(gamma)`: hard ones count more. None: all
            alike.
        slices: the slice that each sample is in, likewise a column, of names, numbers or bools, or a target; the report
            has a row for each.
        quotas: how many targets of a slice must be repaired for a repair to be accepted:
            `{"night": 5, "truck": "50%"}`.
        protected: passed samples that may not break, whatever the gate tolerates, on known and calibration data: a
            column of bools, a target, or ids by split. Whole numbers say how many other samples one counts for.
        risk: how bad confusions are, as Athena and DRWeightMerge have it: whole numbers from 1 by the pair of the true
            class and the one that it is taken for, or by true class, `{(3, 5): 4, 7: 2}`, in YAML `"3 -> 5": 4`; all
            others have 1. Repairing a failure is worth its pair's, breaking a passed sample costs the highest that its
            class can come to. With `importance` and `protected` both are multiplied.
        set_aside: failed samples that are no targets although they are in the target: a column of bools, a target, ids,
            or `"doubtful"`, those whose label looks wrong. They are listed in the report.
        keep: in an update, what may not break: `both`, what the new model or the replaced one gets right, or
            `reference`, only what both of them get right.

    Raises:
        ConfigurationError: on construction, for what is no column, no mapping by id and no known word.
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
        for name in ("importance", "slices", "protected", "set_aside"):
            value = getattr(self, name)
            by_id = isinstance(value, Mapping) if name == "importance" else isinstance(value, (Mapping, list, tuple))
            if name != "slices" and (by_id or value in NAMED_CHOICES.get(name, ()) or isinstance(value, Focal)):
                continue
            if value is not None:
                find_column(name, value)
        if self.risk is not None:
            RiskTable.parse(self.risk)
        if self.quotas is not None:
            object.__setattr__(self, "quotas", checked_quotas(self.quotas))
            if self.slices is None:
                raise ConfigurationError(
                    f"`quotas={self.quotas!r}` needs slices, and there are none.",
                    "say with `slices` which slice each sample is in.",
                )

    def columns(self) -> SampleOptions:
        """Those of the options that are columns of batches, for a check on a few samples."""
        names = ("importance", "protected", "set_aside")
        own = {name: getattr(self, name) for name in names if self._is_column(name, getattr(self, name))}
        return SampleOptions(slices=self.slices, **own)

    def evaluate(
        self,
        evaluator: Evaluator,
        sources: Sequence[Source],
        target: Target | None = None,
        *,
        everywhere: bool = False,
        known: bool = True,
    ) -> tuple[SampleResults, Tensor]:
        """The results with slices and weights, and without the targets that are set aside.

        Args:
            evaluator: the model and what judges it.
            sources: this rank's share of the splits.
            target: which failed samples are marked as targeted; None marks none.
            everywhere: whether those of all sources are marked, not only of those whose failures may be repaired.
            known: whether these are known data. Of others only slices and protected samples matter.

        Returns:
            The results, and `N` bool, the failed samples that are set aside.

        Raises:
            ConfigurationError: a column or an id is not there, or has values that mean nothing.
        """
        asked = {"protected": self.protected}
        asked |= {"importance": self.importance, "set_aside": self.set_aside} if known else {}
        columns = {name: find_column(name, value) for name, value in asked.items() if self._is_column(name, value)}
        slices = None if self.slices is None else find_column("slices", self.slices)
        recording = [column_recorder(source, columns, evaluator.task) for source in sources] if columns else []
        slicing = [SliceRecorder(source, slices, evaluator.task) for source in recording or sources]
        results = evaluator.run(slicing, target, everywhere=everywhere)
        if slices is not None:
            results = with_slices(results, [one.named(evaluator.collective) for one in slicing])
        noted = torch.cat([one.gathered(evaluator.collective) for one in recording]) if columns else torch.zeros(0, 0)
        values = dict(zip(columns, noted.T, strict=True))
        for name, value in asked.items():
            if value is not None and name not in columns and not isinstance(value, (str, Focal)):
                splits = [source.split for source in sources if source.failed or name == "protected"]
                values[name] = values_by_id(name, value, results, splits, strict=known)
        set_aside = torch.zeros_like(results.targeted)
        if "set_aside" in values:
            set_aside = results.targeted & (values["set_aside"] > 0)
        cost = breaking_costs(results, values.get("protected"))
        risk: Tensor | None = None
        if self.risk is not None:
            risk, at_worst = RiskTable.parse(self.risk).weigh(results)
            cost = torch.where(results.passed, cost * at_worst, cost)
        results = replace(results, targeted=results.targeted & ~set_aside, weight=cost)
        focal = Focal() if self.importance == "focal" else self.importance
        importance = focal.weigh(results) if isinstance(focal, Focal) else values.get("importance")
        if risk is not None:
            importance = risk if importance is None else importance * risk
        if known and importance is not None:
            results = with_repair_worth(results, importance)
        return results, set_aside

    def _is_column(self, name: str, value: Any) -> bool:
        word = isinstance(value, str) and value in NAMED_CHOICES.get(name, ())
        return value is not None and not word and not isinstance(value, (Mapping, list, tuple, Focal))
