"""Two repairs of one model side by side: the samples that only one of them gets right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_nrl._utils.formatting import list_ids, plural
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.stats import evidence_of, sign_test
from lightning_nrl.records import RepairRecord
from lightning_nrl.records.splits import ROLES, Role, SplitReport
from lightning_nrl.report.page import Block, FactList, Heading, Page, Row, Table, Text
from lightning_nrl.report.tables import flipped_splits


@dataclass(frozen=True)
class _SharedSplit:
    split: str
    role: Role
    n: int
    first_alone: tuple[int, ...]  # ids of samples that only the first repair gets right
    second_alone: tuple[int, ...]


def side_by_side(first: RepairRecord, second: RepairRecord, names: tuple[str, str]) -> Page:
    """Compares two repairs of one model sample by sample, and by the sign test on unseen data.

    A repair that was not accepted is compared by the weights that it would have given.

    Raises:
        ConfigurationError: the repairs do not start from one model, or share no split.
    """
    splits = list(_shared(first, second))
    starts = [report.hashes.model_before for report in (first, second) if report.hashes]
    is_other_model = len(starts) == 2 and None not in starts and starts[0] != starts[1]
    if is_other_model or not splits:
        raise ConfigurationError(
            "the repairs do not start from the same model and data, so samples cannot be compared.",
            "give two reports of repairs of one checkpoint on the same data.",
        )
    rows = []
    ids = []
    for split in splits:
        alone = (split.first_alone, split.second_alone)
        n_alone = map(len, alone)
        rows.append(Row(f"{split.split} ({split.role})", [f"{n:,}" for n in (split.n, *n_alone)]))
        for name, positions in zip(names, alone, strict=True):
            ids.append((f"{split.split}, {name} alone", list_ids(positions, "its report.json")))
    columns = (("samples", ""), *((name, "alone right") for name in names))
    blocks: list[Block] = [
        Heading("Side by side", 1),
        *(Text(_judgement(role, splits, names)) for role in ROLES if _has(role, splits)),
        Table(columns, tuple(rows)),
        FactList(tuple(ids)),
    ]
    return Page(tuple(blocks))


def _shared(first: RepairRecord, second: RepairRecord) -> Iterator[_SharedSplit]:
    splits_of_second = {split.split: split for split in flipped_splits(second)}
    for split in flipped_splits(first):
        name = split.split
        second_split = splits_of_second.get(name)
        data = [report.provenance.data.get(name) for report in (first, second)]
        if second_split is not None and split.n == second_split.n and data[0] == data[1]:
            alone = (_alone(split, second_split), _alone(second_split, split))
            yield _SharedSplit(name, split.role, split.n, *alone)


def _alone(split: SplitReport, other: SplitReport) -> tuple[int, ...]:
    """Returns the ids of samples that are right after one repair and wrong after the other."""
    repaired = set(split.repaired_ids) - set(other.repaired_ids)
    kept = set(other.broken_ids) - set(split.broken_ids)
    return tuple(sorted(repaired | kept))


def _has(role: Role, splits: list[_SharedSplit]) -> bool:
    return any(split.role == role for split in splits)


def _judgement(role: Role, splits: list[_SharedSplit], names: tuple[str, str]) -> str:
    of_role = [split for split in splits if split.role == role]
    n_first = sum(len(split.first_alone) for split in of_role)
    n_second = sum(len(split.second_alone) for split in of_role)
    counts = (
        f"{plural(n_first, 'sample')} right in {names[0]} alone, {n_second:,} in {names[1]} alone"
    )
    if role != "unseen":
        return f"{role.capitalize()} data: {counts}."
    evidence = evidence_of(n_first, n_second)
    better = {"better": names[0], "worse": names[1]}.get(evidence)
    verdict = "no difference shown" if better is None else f"{better} is better"
    return f"Unseen data: {verdict}; {counts} (sign test, p = {sign_test(n_first, n_second):.2g})."
