"""Samples that must not break, whatever else an update does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_nrl._utils.strict_csv import read_csv
from lightning_nrl.data.targets import Predicate, Target, target_in
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.release.model_pair import ModelPair, check_splits
from lightning_nrl.release.rules import Finding, Rule

__all__ = ["ProtectedIntact", "read_ids"]

HINT = "give a CSV file with the columns split,id."

Ids = Mapping[str, Sequence[int]]
"""Data-set positions, by split."""


@dataclass(frozen=True, eq=False)
class ProtectedIntact(Rule):
    """Every protected sample that was right is right still.

    Attributes:
        ids: which samples, by split and position in the data set; a CSV file with the columns `split` and `id`; or
            positions alone where there is one split.
        where: samples chosen by what they are, also beside those of `ids`: a `Target`, a predicate on the raw batch, or
            its address; a target also as text, such as `label 3`.

    Raises:
        ConfigurationError: on construction, if neither is given or the file cannot be read.

    Example:
        >>> print(ProtectedIntact({"test": [3, 17]}))
        protected:2 samples
    """

    ids: Ids | Sequence[int] | str | Path | None = None
    where: Target | Predicate | str | None = None

    def __post_init__(self) -> None:
        if self.ids is None and self.where is None:
            raise ConfigurationError(
                "`ProtectedIntact` protects nothing.", "give `ids={'test': [3, 17]}`, a file of them, or `where`."
            )
        named = target_in(self.where) if isinstance(self.where, str) else None
        where = self.where if named is None else named
        target = where if where is None or isinstance(where, Target) else Target.where(where)
        object.__setattr__(self, "where", target)
        object.__setattr__(self, "_file", str(self.ids) if isinstance(self.ids, (str, Path)) else "")
        ids = read_ids(self.ids) if isinstance(self.ids, (str, Path)) else self.ids
        object.__setattr__(self, "ids", {"": ids} if isinstance(ids, Sequence) else ids)
        lists = (ids,) if isinstance(ids, Sequence) else (ids or {}).values()
        whole = all(isinstance(rows, Sequence) and all(isinstance(at, int) for at in rows) for rows in lists)
        check_kind("ids", ids, whole, "list of samples", "ids={'test': [3, 17]}")

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.where,) if isinstance(self.where, Target) else ()

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        check_splits("ids", tuple(self._ids(splits)), splits)

    def check(self, pair: ModelPair) -> Finding:
        chosen = self._chosen(pair)
        counts, bad = pair.flips.counts(chosen), chosen & pair.flips.broken
        text = f"{counts.broken:,} of {counts.passed:,} protected samples that were right broke"
        wrong = counts.failing + counts.repaired
        rest = f"; {wrong:,} more were wrong before, {counts.repaired:,} of these are right now" if wrong else ""
        ids = {split: rows for split, rows in pair.after.ids(bad).items() if rows}
        return Finding(str(self), not counts.broken, f"{text}{rest}.", ids)

    def _ids(self, splits: Sequence[str]) -> Ids:
        found: Ids = self.ids or {}  # type: ignore[assignment]
        if "" not in found:
            return found
        if len(splits) != 1:
            raise ConfigurationError(
                f"`ids` names no split, and the data have {list(splits)}.", f"write ids={{{splits[0]!r}: [...]}}."
            )
        return {splits[0]: found[""]}

    def _chosen(self, pair: ModelPair) -> Tensor:
        chosen = torch.zeros(len(pair.after), dtype=torch.bool)
        for split, ids in self._ids(pair.splits).items():
            wanted, rows = torch.as_tensor(list(ids), dtype=torch.int64), pair.after.of(split)
            there = pair.after.index[rows]
            missing = wanted[~torch.isin(wanted, there)].tolist()
            if missing:
                raise ConfigurationError(
                    f"`ids`: {len(missing):,} protected samples are not in `{split}` ({missing[:5]}).",
                    "give positions in the data set; what is not there cannot be checked.",
                )
            chosen[rows] |= torch.isin(there, wanted)
        for target in self.targets:
            if not pair.marked[target].any():
                raise ConfigurationError(
                    f"`where`: '{target}' chooses none of {len(chosen):,} samples, so nothing would be protected.",
                    "give data that have such samples, or leave the rule out.",
                )
            chosen |= pair.marked[target]
        return chosen

    def __str__(self) -> str:
        listed_ids: Ids = self.ids or {}  # type: ignore[assignment]
        n = sum(len(rows) for rows in listed_ids.values())
        listed = self._file or (f"{n:,} sample{'s' if n != 1 else ''}" if n else "")  # type: ignore[attr-defined]
        return "protected:" + " and ".join(filter(None, (listed, *map(str, self.targets))))


def read_ids(path: str | Path) -> dict[str, list[int]]:
    """Samples in a CSV file with the columns `split` and `id`.

    Raises:
        ConfigurationError: there is no such file, it holds no sample, or a line cannot be read; it is named.
    """
    found: dict[str, list[int]] = {}
    for line in read_csv("ids", path, ("split", "id")):
        found.setdefault(line.values["split"], []).append(line.whole_number("id"))
    if not found:
        raise ConfigurationError(f"`ids={str(path)!r}` holds no sample.", HINT)
    return found
