"""What a repair did slice by slice, and which failures were set aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_nrl.evaluation.flips import Flips
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.report.document import Row, Table
from lightning_nrl.report.splits import Role

__all__ = ["SetAside", "SliceReport", "aside_facts", "set_aside", "slice_reports", "slice_table"]

MOST = 50
"""Samples that Markdown lists."""


@dataclass(frozen=True)
class SliceReport:
    """Counts of one slice of the data of one role, before a repair against after it.

    Attributes:
        name: the slice.
        role: of the data, `known`, `calibration` or `unseen`.
        n: samples.
        targeted: failed samples that were to be repaired.
        repaired_in_target: those of them that are right after.
        repaired: samples wrong before and right after, targeted or not.
        broken: samples right before and wrong after.
        quota: how many targets had to be repaired; None: any number.
    """

    name: str
    role: Role
    n: int
    targeted: int
    repaired_in_target: int
    repaired: int
    broken: int
    quota: int | None = None


@dataclass(frozen=True)
class SetAside:
    """A failed sample that was in the target and was set aside.

    Attributes:
        split: its split.
        id: its position in the data set.
        label: its label, -1 where the task has none.
        prediction: what the model says.
        why: in words.
    """

    split: str
    id: int
    label: int
    prediction: int
    why: str


def slice_reports(
    role: Role, before: SampleResults, after: SampleResults | None = None, needed: Mapping[str, int] | None = None
) -> tuple[SliceReport, ...]:
    """Counts what became of the samples of each slice; samples in no slice are left out.

    Args:
        role: of the data.
        before: the original model, with slices; its `targeted` marks I_neg.
        after: the model after the repair; None if its weights are unchanged.
        needed: quotas by slice.
    """
    flips = Flips.between(before, before if after is None else after)
    found = []
    for number, name in enumerate(before.names):
        rows = before.group == number
        counts = flips.counts(rows)
        found.append(
            SliceReport(
                name,
                role,
                counts.n,
                int((before.targeted & rows).sum()),
                int((flips.repaired & before.targeted & rows).sum()),
                counts.repaired,
                counts.broken,
                (needed or {}).get(name),
            )
        )
    return tuple(found)


def set_aside(before: SampleResults, rows: Tensor, why: str) -> tuple[SetAside, ...]:
    """The samples of some rows, `N` bool, with the reason."""
    splits = [split for split, size in zip(before.splits, before.sizes, strict=True) for _ in range(size)]
    return tuple(
        SetAside(splits[row], int(before.index[row]), int(before.label[row]), int(before.prediction[row]), why)
        for row in rows.nonzero().flatten().tolist()
    )


def aside_facts(samples: Sequence[SetAside]) -> tuple[tuple[str, str], ...]:
    """Each sample that was set aside and why, the first few."""
    facts = [
        (f"{one.split} {one.id}", f"label {one.label}, the model says {one.prediction}: {one.why}")
        for one in samples[:MOST]
    ]
    return (*facts, *((("further", f"{len(samples) - MOST:,}, all in report.json"),) if samples[MOST:] else ()))


def slice_table(slices: Sequence[SliceReport]) -> Table:
    """A row a slice; by role how many were targeted, repaired of these, and broken."""
    roles = [role for role in ("known", "calibration", "unseen") if any(s.role == role for s in slices)]
    quotas = any(s.quota is not None for s in slices)
    columns: list[tuple[str, str]] = []
    for role in roles:
        columns += [(name, role) for name in ("targeted", "repaired", "broken")]
        columns += [("quota", role)] if quotas and role == "known" else []
    rows = []
    for name in dict.fromkeys(s.name for s in slices):
        own: dict[str, SliceReport] = {s.role: s for s in slices if s.name == name}
        cells: list[str] = []
        for role in roles:
            one = own.get(role)
            cells += (
                ["-"] * 3 if one is None else [f"{x:,}" for x in (one.targeted, one.repaired_in_target, one.broken)]
            )
            if quotas and role == "known":
                cells.append("-" if one is None or one.quota is None else f"{one.quota:,}")
        rows.append(Row(name, tuple(cells)))
    return Table(tuple(columns), tuple(rows))
