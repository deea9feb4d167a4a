"""What a repair did to the samples of one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_nrl.evaluation.flips import Flips
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.metrics.functional import flip_rates

__all__ = ["Role", "SplitReport", "pool", "split_report"]

Role = Literal["known", "calibration", "unseen"]
"""Whether the search was allowed to look at a split (`known`), only the choice of a strength, or nothing at all."""


@dataclass(frozen=True)
class SplitReport:
    """Counts and samples of one split, before a repair against after it.

    Attributes:
        split: its name, such as `train`.
        role: `known` if the search was allowed to look at it, `calibration` if only the choice of a strength was, else
            `unseen`.
        kept: samples right before and after.
        broken: samples right before and wrong after.
        repaired: samples wrong before and right after.
        failing: samples wrong before and after.
        targeted: failed samples that were to be repaired (I_neg).
        repaired_in_target: those of them that are right after.
        targeted_ids: data-set positions of the targeted samples.
        repaired_ids: data-set positions of the repaired samples, targeted or not.
        broken_ids: data-set positions of the broken samples.
    """

    split: str
    role: Role
    kept: int
    broken: int
    repaired: int
    failing: int
    targeted: int
    repaired_in_target: int
    targeted_ids: tuple[int, ...] = ()
    repaired_ids: tuple[int, ...] = ()
    broken_ids: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """All samples."""
        return self.kept + self.broken + self.repaired + self.failing

    @property
    def passed(self) -> int:
        """Samples right before."""
        return self.kept + self.broken

    @property
    def accuracy_before(self) -> float:
        """Share of samples right before, in [0, 1]; NaN without samples."""
        return self.passed / self.n if self.n else float("nan")

    @property
    def accuracy_after(self) -> float:
        """Share of samples right after, in [0, 1]; NaN without samples."""
        return (self.kept + self.repaired) / self.n if self.n else float("nan")

    @property
    def rates(self) -> dict[str, float]:
        """The numbers of `lightning_nrl.metrics`, by the names of its functions; undefined ones are NaN.

        `repair_rate` is that of the target, repaired in I_neg / |I_neg|; all others are of the whole split.
        """
        flips = torch.tensor([self.kept, self.broken, self.repaired, self.failing], dtype=torch.float64)
        rates = {name: float(rate) for name, rate in flip_rates(flips).items()}
        rates["repair_rate"] = self.repaired_in_target / self.targeted if self.targeted else float("nan")
        return rates

    @property
    def numbers(self) -> dict[str, float]:
        """Every number of the split by name, as loggers take them: counts, accuracies, rates."""
        counts = ("n", "kept", "broken", "repaired", "failing", "targeted", "repaired_in_target")
        return {name: getattr(self, name) for name in (*counts, "accuracy_before", "accuracy_after")} | self.rates


def split_report(split: str, role: Role, before: SampleResults, after: SampleResults | None = None) -> SplitReport:
    """Counts what became of the samples of one split.

    Args:
        split: the name of a split that both tables have.
        role: what was allowed to look at it.
        before: the original model; its `targeted` marks I_neg.
        after: the model after the repair; None if its weights are unchanged.

    Raises:
        EvaluationError: the tables are not about the same samples in the same order.
    """
    flips = Flips.between(before, before if after is None else after)
    rows = before.of(split)
    counts = flips.counts(rows)
    return SplitReport(
        split=split,
        role=role,
        kept=counts.kept,
        broken=counts.broken,
        repaired=counts.repaired,
        failing=counts.failing,
        targeted=int(before.targeted[rows].sum()),
        repaired_in_target=int((flips.repaired & before.targeted)[rows].sum()),
        targeted_ids=tuple(before.ids(before.targeted)[split]),
        repaired_ids=tuple(before.ids(flips.repaired)[split]),
        broken_ids=tuple(before.ids(flips.broken)[split]),
    )


def pool(name: str, splits: Sequence[SplitReport]) -> SplitReport:
    """The sum of several splits of one role. It has no ids, since those of different data sets do not mix."""
    counts = ("kept", "broken", "repaired", "failing", "targeted", "repaired_in_target")
    return SplitReport(name, splits[0].role, *(sum(getattr(split, count) for split in splits) for count in counts))
