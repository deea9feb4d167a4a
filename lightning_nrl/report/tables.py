"""The parts of a report as tables and facts, in words that need no paper beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_nrl.report.document import Row, Table
from lightning_nrl.report.splits import SplitReport, pool
from lightning_nrl.report.stages import Hashes, LocalizationReport, SearchReport, Step
from lightning_nrl.report.weight_change import WeightChange

__all__ = [
    "change_words",
    "from_here",
    "hash_facts",
    "id_facts",
    "localization_words",
    "outcome_table",
    "rates_table",
    "search_words",
    "sentence",
    "setting_facts",
    "steps_table",
    "unchanged_table",
]

Fact = tuple[str, str]
MOST_IDS = 20
RATES = {
    "repair_rate": "repair rate: repaired of the targeted",
    "break_rate": "break rate: broken of those right before",
    "negative_flip_rate": "negative flip rate: broken of all",
    "positive_flip_rate": "positive flip rate: repaired of all",
    "negative_flip_impact": "negative flip impact: broken of those wrong now",
    "backward_trust_compatibility": "backward trust compatibility: kept of those right before",
    "backward_error_compatibility": "backward error compatibility: failing of those wrong now",
}


def outcome_table(splits: Sequence[SplitReport]) -> Table:
    """What a change of weights did to each split and, where there are several of a role, to all of them."""
    columns = with_totals(splits)
    return _table(
        columns,
        _row("samples", columns, lambda s: _count(s.n)),
        _row("accuracy before", columns, lambda s: percent(s.accuracy_before)),
        _row("accuracy after", columns, lambda s: percent(s.accuracy_after), ends_group=True),
        _row("failures to repair (the target)", columns, lambda s: _count(s.targeted)),
        _row("repaired of these", columns, lambda s: _count(s.repaired_in_target), tone="gain", ends_group=True),
        _row("repaired (was wrong, now right)", columns, lambda s: _count(s.repaired)),
        _row("broken (was right, now wrong)", columns, lambda s: _count(s.broken), tone="harm"),
        _row("kept (right before and after)", columns, lambda s: _count(s.kept)),
        _row("failing (wrong before and after)", columns, lambda s: _count(s.failing)),
    )


def unchanged_table(splits: Sequence[SplitReport]) -> Table:
    """The model as it is, for splits under unchanged weights."""
    columns = with_totals(splits)
    return _table(
        columns,
        _row("samples", columns, lambda s: _count(s.n)),
        _row("accuracy", columns, lambda s: percent(s.accuracy_after)),
        _row("right", columns, lambda s: _count(s.kept)),
        _row("wrong", columns, lambda s: _count(s.failing)),
        _row("failures to repair (the target)", columns, lambda s: _count(s.targeted)),
    )


def rates_table(splits: Sequence[SplitReport]) -> Table:
    """The rates that the literature gives for updates."""
    columns = with_totals(splits)
    rates = [split.rates for split in columns]
    rows = [Row(label, tuple(percent(rate[name]) for rate in rates)) for name, label in RATES.items()]
    relative = tuple(_number(rate["relative_negative_flip_rate"]) for rate in rates)
    rows.append(Row("relative negative flip rate: 1 if old and new errors were independent", relative))
    return _table(columns, *rows)


def steps_table(steps: Sequence[Step]) -> Table:
    """What a method did, step by step."""
    columns = (("repaired", "of the target"), ("broken", "known"), ("seconds", ""), ("", ""))
    rows = [Row(s.name, (_count(s.repaired), _count(s.broken), f"{s.seconds:,.1f}", s.note)) for s in steps]
    return Table(columns, tuple(rows), notes=True)


def with_totals(splits: Sequence[SplitReport]) -> list[SplitReport]:
    """The splits by role, known first, each role of several followed by their sum."""
    columns: list[SplitReport] = []
    for role in ("known", "calibration", "unseen"):
        chosen = [split for split in splits if split.role == role]
        columns += [*chosen, pool("all", chosen)] if len(chosen) > 1 else chosen
    return columns


def id_facts(splits: Sequence[SplitReport], where: str) -> tuple[Fact, ...]:
    """Which samples were broken and repaired, by split: data-set positions, the first few.

    Args:
        splits: the splits that are meant.
        where: where all of them can be read.
    """
    facts = []
    for kind in ("broken", "repaired"):
        for split in splits:
            ids = getattr(split, f"{kind}_ids")
            shown = ", ".join(map(str, ids[:MOST_IDS])) + (
                f" ... all {len(ids):,} in {where}" if ids[MOST_IDS:] else ""
            )
            facts.append((f"{kind} in {split.split}", shown or "none"))
    return tuple(facts)


def localization_words(localization: LocalizationReport) -> str:
    """How many weights were searched, of how many, and how they were found."""
    sizes = localization.sizes
    found = f"{sizes.get('localized', 0):,}"
    if "total" in sizes:
        found += f" of {sizes['total']:,}"
    if localization.requested is not None and localization.requested != sizes.get("localized"):
        found += f", the nearest to the {localization.requested:,} asked for"
    if {"failed", "passed", "both"} <= sizes.keys():
        found += (
            f"; {sizes['failed']:,} matter for the failed data, {sizes['passed']:,} for the passed, "
            f"{sizes['both']:,} for both (the top {localization.n_g:,} by each impact)"
        )
    return found


def search_words(search: SearchReport, seconds: float | None) -> str:
    """How long the search took, on what and with what gain."""
    took = f" in {seconds:,.1f} s" if seconds is not None else ""
    if search.n_failed is not None and search.n_passed is not None:
        took += f", scored on {search.n_failed:,} failed and {search.n_passed:,} passed samples"
    plural = "s" if search.iterations != 1 else ""
    return (
        f"{search.iterations:,} iteration{plural}{took}, fitness {_number(search.original_fitness)} -> "
        f"{_number(search.fitness)}; stopped: {search.stopped}"
    )


def change_words(change: WeightChange) -> str:
    """How many weights differ and by how much."""
    share = f" ({percent(change.relative)} of the layers' norm)" if math.isfinite(change.relative) else ""
    return (
        f"{change.changed:,} of {change.total:,}, by at most {_number(change.largest)}; "
        f"norm of the change {_number(change.l2)}{share}"
    )


def hash_facts(hashes: Hashes) -> tuple[Fact, ...]:
    """SHA-256 of the weights before and after; one line where they are the same."""
    facts = []
    for name, before, after in (
        ("layers", hashes.layers_before, hashes.layers_after),
        ("whole model", hashes.model_before, hashes.model_after),
    ):
        if before is not None and before == after:
            facts.append((f"sha256 of the {name}, unchanged", before))
        elif before is not None and after is not None:
            facts += [(f"sha256 of the {name} before", before), (f"sha256 of the {name} after", after)]
    return tuple(facts)


def setting_facts(settings: Mapping[str, Any]) -> tuple[Fact, ...]:
    """The arguments, those in groups as `name=value`."""
    return tuple((name, _setting(value)) for name, value in settings.items())


def percent(share: float) -> str:
    """Two decimals, never rounded to none or to all; `-` where undefined."""
    if not math.isfinite(share):
        return "-"
    text = f"{100 * share:.2f} %"
    if text == "0.00 %" and share > 0:
        return "< 0.01 %"
    return "> 99.99 %" if text == "100.00 %" and share < 1 else text


def from_here(path: str) -> str:
    """The path as one would type it in the working directory: relative if it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def sentence(text: str) -> str:
    """The text with a capital first and a full stop last."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _table(columns: Sequence[SplitReport], *rows: Row) -> Table:
    return Table(tuple((split.split, split.role) for split in columns), rows)


def _row(label: str, columns: Sequence[SplitReport], cell: Callable[[SplitReport], str], **style: Any) -> Row:
    return Row(label, tuple(cell(split) for split in columns), **style)


def _count(n: int) -> str:
    return f"{n:,}"


def _number(x: float) -> str:
    return f"{x:.4g}" if math.isfinite(x) else "-"


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_setting(item)}" for key, item in value.items())
    return str(value)
