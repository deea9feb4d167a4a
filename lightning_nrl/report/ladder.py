"""The rungs of the default's ladder and the price of the guarantee, as tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.report._formatting import count, percent, plural, rough_percent
from lightning_nrl.report.page import Row, Table, Tone
from lightning_nrl.report.run_records import PricePoint, Rung
from lightning_nrl.stats.binomial import lower_limit, upper_limit

__all__ = ["choice_text", "estimate_text", "price_table", "price_text", "rungs_table"]

NO_ESTIMATE = "-"

ONE_SIDED_CONFIDENCE = 0.95
"""Of each end of an interval, so that 90 % of all intervals hold the rate."""


def rungs_table(rungs: Sequence[Rung]) -> Table:
    """A column for each rung, the taken one marked; of held-out samples what the same procedure did without them."""

    def row(label: str, cell: Callable[[Rung], str], tone: Tone = "", ends_group: bool = False) -> Row:
        return Row(label, tuple(map(cell, rungs)), tone, ends_group)

    held_out = [_held_out(rung.held_out) for rung in rungs]
    return Table(
        tuple((rung.name, "taken" * rung.taken) for rung in rungs),
        (
            row("targets repaired", lambda rung: count(rung.repaired_in_target), "gain"),
            row("known samples repaired", lambda rung: count(rung.repaired)),
            row("known samples broken", lambda rung: count(rung.broken), "harm", ends_group=True),
            Row("held-out failures repaired", tuple(repaired for repaired, _, _ in held_out)),
            Row("held-out passed samples broken", tuple(broken for _, broken, _ in held_out)),
            Row("held-out accuracy, points", tuple(points for _, _, points in held_out), ends_group=True),
            row("weights changed", lambda rung: count(rung.weights_changed)),
            row("seconds", lambda rung: f"{rung.seconds:,.1f}"),
        ),
    )


def choice_text(rungs: Sequence[Rung], choice: str) -> str:
    """Why a rung was taken, in a sentence; `choice` is what the method says, for where there are no estimates."""
    number = next((i for i, rung in enumerate(rungs) if rung.taken), None)
    if number is None or rungs[number].held_out is None:
        return choice
    name = f"`{rungs[number].name}`"
    later = rungs[number + 1 :]
    if not later:
        return f"{name} is taken: of the rungs that held-out samples do not speak against, it changes the most."
    return f"{name} is taken: {', '.join(_against(rung, rungs[number]) for rung in later)}."


def price_table(price: Sequence[PricePoint]) -> Table:
    """The most that was repaired, by how many known passed samples may break; levels that buy nothing are left out."""
    columns = (
        ("targets", "repaired"),
        ("known", "repaired"),
        ("known", "broken"),
        ("held out", "repaired"),
        ("held out", "broken"),
        ("held out", "points"),
    )
    bought = [point for i, point in enumerate(price) if not i or _counts(point) != _counts(price[i - 1])]
    rows = [Row(_level(point.allowed), (*map(count, _counts(point)), *_held_out(point.held_out))) for point in bought]
    return Table(columns, tuple(rows))


def price_text(price: Sequence[PricePoint]) -> str:
    """What it costs here that no known sample may break, in a sentence; empty where that is not known."""
    if not price or price[0].allowed:
        return ""
    none, most = price[0], max(price, key=lambda point: (point.repaired_in_target, -point.broken))
    further = most.repaired_in_target - none.repaired_in_target
    if further <= 0:
        return "nothing: of all that was tried, nothing repairs more targets by breaking known samples"
    return (
        f"{plural(further, 'target')}: {count(most.repaired_in_target)} instead of {count(none.repaired_in_target)} "
        f"would be repaired if {plural(most.broken, 'known sample')} might break"
    )


def estimate_text(held_out: TargetCounts | None, unseen: FlipCounts | None = None) -> str:
    """What held-out samples say of unseen data like them, and what came of the unseen ones; empty without the first.

    In brackets the interval of Clopper and Pearson in which a rate is expected: few samples say little.
    """
    if held_out is None:
        return ""
    counted = "" if unseen is None else f"; counted on unseen data: {_shares(unseen, of_rate=_share_only)}"
    return _shares(held_out, of_rate=_share_and_interval) + counted


def _shares(counts: FlipCounts, of_rate: Callable[[int, int], str]) -> str:
    failed = counts.repaired + counts.failing
    repaired = f"{count(counts.repaired)} of {count(failed)} failures repaired{of_rate(counts.repaired, failed)}"
    broken = f"{count(counts.broken)} of {count(counts.passed)} passed samples broken"
    return f"{repaired}, {broken}{of_rate(counts.broken, counts.passed)}, {_points(counts)} points"


def _share_only(k: int, n: int) -> str:
    return f" ({rough_percent(k / n)})" if n else ""


def _share_and_interval(k: int, n: int) -> str:
    if not n:
        return ""
    low, high = lower_limit(k, n, ONE_SIDED_CONFIDENCE), upper_limit(k, n, ONE_SIDED_CONFIDENCE)
    return f" ({rough_percent(k / n)}; {rough_percent(low)} to {rough_percent(high)} at 90 % confidence)"


def _against(rung: Rung, taken: Rung) -> str:
    """Why a rung was not taken that changes more than the one that was."""
    if not rung.repaired_in_target:
        given_up = rung.held_out is not None and rung.held_out.broken > rung.held_out.repaired
        return f"held-out samples speak against `{rung.name}`" if given_up else f"`{rung.name}` repairs no target"
    if rung.held_out is None:
        return f"`{rung.name}` breaks more than the gate allows"
    if rung.repaired_in_target < taken.repaired_in_target:
        return f"`{rung.name}` repairs fewer targets"
    return f"held-out samples speak against `{rung.name}`"


def _counts(point: PricePoint) -> tuple[int, int, int]:
    return point.repaired_in_target, point.repaired, point.broken


def _held_out(counts: TargetCounts | None) -> tuple[str, str, str]:
    if counts is None:
        return NO_ESTIMATE, NO_ESTIMATE, NO_ESTIMATE
    failed = counts.repaired + counts.failing
    shares = f"{count(counts.repaired)} of {count(failed)}", f"{count(counts.broken)} of {count(counts.passed)}"
    return *shares, _points(counts)


def _points(counts: FlipCounts) -> str:
    return f"{100 * (counts.accuracy_after - counts.accuracy_before):+.1f}"


def _level(allowed: float) -> str:
    if not allowed:
        return "none may break"
    return "any may break" if allowed == 1 else f"{percent(allowed)} may break"
