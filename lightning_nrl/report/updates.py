"""What became of the samples of one split from the replaced model to the new one, before and after the repair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.report.document import Row, Table
from lightning_nrl.report.splits import Role, SplitReport, pool, split_report
from lightning_nrl.report.tables import percent

__all__ = ["UpdateSplit", "pool_updates", "update_split", "update_table", "update_words"]


@dataclass(frozen=True)
class UpdateSplit:
    """One split under three models: the replaced one, the new one as training left it, and the new one now.

    Attributes:
        trained: from the replaced model to the new one as training left it; its `broken` are the regressions.
        now: from the replaced model to the new one as it is now.
    """

    trained: SplitReport
    now: SplitReport

    @property
    def split(self) -> str:
        """The name of the split."""
        return self.now.split

    @property
    def role(self) -> Role:
        """What was allowed to look at it."""
        return self.now.role


def update_split(
    split: str, role: Role, old: SampleResults, trained: SampleResults, now: SampleResults | None = None
) -> UpdateSplit:
    """Counts one split.

    Args:
        split: its name.
        role: what was allowed to look at it.
        old: what the replaced model does.
        trained: what the new one does as training left it.
        now: what it does now; None if its weights are unchanged.

    Raises:
        EvaluationError: the tables are not about the same samples in the same order.
    """
    first = split_report(split, role, old, trained)
    return UpdateSplit(first, first if now is None else split_report(split, role, old, now))


def pool_updates(splits: Sequence[UpdateSplit]) -> UpdateSplit:
    """The sum of several splits of one role."""
    return UpdateSplit(*(pool("all", [getattr(split, name) for split in splits]) for name in ("trained", "now")))


def update_table(splits: Sequence[UpdateSplit]) -> Table:
    """The new model beside the one that it replaces, as training left it and now."""
    columns: list[UpdateSplit] = []
    for role in ("known", "calibration", "unseen"):
        chosen = [split for split in splits if split.role == role]
        columns += [*chosen, pool_updates(chosen)] if len(chosen) > 1 else chosen

    def row(label: str, cell: Callable[[UpdateSplit], str], harm: bool = False, ends: bool = False) -> Row:
        return Row(label, tuple(map(cell, columns)), "harm" if harm else "", ends)

    def rate(split: SplitReport) -> str:
        return percent(split.broken / split.n if split.n else float("nan"))

    return Table(
        tuple((split.split, split.role) for split in columns),
        (
            row("accuracy of the replaced model", lambda s: percent(s.now.accuracy_before)),
            row("accuracy of the new one", lambda s: percent(s.trained.accuracy_after)),
            row("accuracy now", lambda s: percent(s.now.accuracy_after), ends=True),
            row("regressions (was right, now wrong) of the new one", lambda s: f"{s.trained.broken:,}"),
            row("regressions now", lambda s: f"{s.now.broken:,}", harm=True),
            row("negative flip rate of the new one", lambda s: rate(s.trained)),
            row("negative flip rate now", lambda s: rate(s.now), ends=True),
            row("improved (was wrong, now right) by the new one", lambda s: f"{s.trained.repaired:,}"),
            row("improved now", lambda s: f"{s.now.repaired:,}"),
        ),
    )


def update_words(splits: Sequence[UpdateSplit]) -> str:
    """A sentence on the known regressions; empty if no model was replaced."""
    known = [split for split in splits if split.role == "known"]
    if not known:
        return ""
    both = pool_updates(known)
    before, after, kept = both.trained.broken, both.now.broken, both.now.passed
    first = f"Of {kept:,} known samples that the replaced model gets right, the new one got {before:,} wrong"
    return f"{first}." if both.now == both.trained else f"{first} and gets {after:,} wrong now."
