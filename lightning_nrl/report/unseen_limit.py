"""What unseen data say of the share of samples that a repair breaks elsewhere."""

from __future__ import annotations

from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.splits import SplitReport
from lightning_nrl.stats.binomial import percent_up, show_confidence, upper_limit

__all__ = ["UNSEEN_CONFIDENCE", "unseen_limit", "unseen_text"]

UNSEEN_CONFIDENCE = 0.95


def unseen_limit(report: RepairReport) -> float | None:
    """At most this share of samples like the unseen ones breaks, with `UNSEEN_CONFIDENCE`, in (0, 1].

    Of those that were right before, or of those that the replaced model got right. It is the limit of Clopper and
    Pearson, and holds since nothing was chosen by unseen data. None if no weights changed, or nothing is unseen.
    """
    counted = _counted(report)
    return None if counted is None else upper_limit(counted.broken, counted.passed, UNSEEN_CONFIDENCE)


def unseen_text(report: RepairReport) -> str:
    """The same in words; empty if there is no limit."""
    counted, limit = _counted(report), unseen_limit(report)
    if counted is None or limit is None:
        return ""
    text = (
        f"broken {counted.broken:,} of {counted.passed:,} that were right; "
        f"with {show_confidence(UNSEEN_CONFIDENCE)} confidence at most {percent_up(limit)} of samples like these"
    )
    known = sum(report.leaked.values())
    return f"{text} (too good a limit: {known:,} of them are known too)" if known else text


def _counted(report: RepairReport) -> SplitReport | None:
    update = report.pooled_update("unseen")
    counted = report.pooled("unseen") if update is None else update.now
    return counted if report.status == "repaired" and counted is not None and counted.passed else None
