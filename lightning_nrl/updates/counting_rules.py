"""Release rules that count broken samples: `AtMostBroken` and `ProtectedIntact`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lightning_nrl._utils.formatting import plural
from lightning_nrl.data.targets import Predicate, Target, target_in
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.gate.gates import Gate, allowance
from lightning_nrl.updates.model_pair import ModelPair, check_splits
from lightning_nrl.updates.predictions import Ids, parse_ids
from lightning_nrl.updates.rules import (
    Part,
    Rule,
    RuleResult,
    SplitRule,
    Verdict,
    accuracies,
    broken_ids,
)


@dataclass(frozen=True)
class AtMostBroken(SplitRule):
    """Allows in each split at most as many broken samples as a gate allows.

    Attributes:
        gate: a `Gate`, or its text. `instance` allows no broken sample; `accuracy` allows as many
            as are repaired, so that the accuracy does not fall; `tolerance:3` allows 3;
            `tolerance:1%` allows 1 % of the passed samples.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(AtMostBroken("accuracy", splits=("test",)))
        accuracy in test
    """

    gate: Gate | str = "instance"
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gate", Gate.parse(self.gate))
        self.is_worse(FlipCounts(0, 0, 0, 0), 1)  # raises an error for a gate that needs a target

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        return Gate.parse(self.gate).excess_of(counts) > 0

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        sentences = []
        for part in parts:
            counts = part.counts
            broken = f"{counts.broken:,} of {counts.passed:,} that were right broke"
            limit = allowance(Gate.parse(self.gate), counts)
            sentences.append(f"{part.name}: {broken}; {limit} ({accuracies(counts)})")
        return sentences

    @property
    def text(self) -> str:
        return str(self.gate)


@dataclass(frozen=True, eq=False)
class ProtectedIntact(Rule):
    """Requires that no protected sample breaks.

    Attributes:
        ids: protected samples: lists of data-set positions by split, a single list if there is one
            split, or a CSV file with the columns `split` and `id`.
        where: more protected samples: a `Target`, its text (`label 3`), a predicate on raw batches,
            or its address.

    Example:
        >>> print(ProtectedIntact({"test": [3, 17]}))
        protected:2 samples
    """

    ids: Ids | Sequence[int] | str | Path | None = None
    where: Target | Predicate | str | None = None
    _ids: Ids = field(init=False, repr=False)

    def __post_init__(self) -> None:
        where = self.where
        if isinstance(where, str):
            target = target_in(where)
            where = where if target is None else target
        if where is not None and not isinstance(where, Target):
            where = Target.where(where)
        object.__setattr__(self, "where", where)
        ids = parse_ids(self.ids)
        if where is None and not any(ids.values()):
            raise ConfigurationError(
                "`ProtectedIntact` protects nothing.",
                "give `ids={'test': [3, 17]}`, a CSV file of ids, or `where`.",
            )
        object.__setattr__(self, "_ids", ids)

    @property
    def targets(self) -> tuple[Target, ...]:
        if isinstance(self.where, Target):
            return (self.where,)
        return ()

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        check_splits("ids", tuple(self._by_split(splits)), splits)

    def check(self, pair: ModelPair) -> RuleResult:
        protected = self._protected(pair)
        counts = pair.flips.counts(protected)
        reason = f"{counts.broken:,} of {counts.passed:,} protected samples that were right broke"
        n_wrong = counts.failing + counts.repaired
        if n_wrong:
            reason += (
                f"; {n_wrong:,} more were wrong before, {counts.repaired:,} of these are right now"
            )
        ids = broken_ids(pair, protected)
        by_split: dict[str, Verdict] = {}
        for split, rows in pair.after.ids(protected).items():
            if rows:
                by_split[split] = "NOT satisfied" if split in ids else "satisfied"
        return RuleResult(str(self), not counts.broken, f"{reason}.", ids, by_split=by_split)

    def _by_split(self, splits: Sequence[str]) -> Ids:
        if "" not in self._ids:
            return self._ids
        if len(splits) != 1:
            raise ConfigurationError(
                f"`ids` names no split, but the data have {list(splits)}.",
                f"write ids={{{splits[0]!r}: [...]}}.",
            )
        return {splits[0]: self._ids[""]}

    def _protected(self, pair: ModelPair) -> Tensor:
        protected = torch.zeros(len(pair.after), dtype=torch.bool)
        for split, ids in self._by_split(pair.splits).items():
            wanted = torch.as_tensor(list(ids), dtype=torch.int64)
            rows = pair.after.of(split)
            present = pair.after.index[rows]
            missing = wanted[~torch.isin(wanted, present)].tolist()
            if missing:
                raise ConfigurationError(
                    f"`ids`: {len(missing):,} protected samples are not in `{split}` "
                    f"({missing[:5]}).",
                    "give positions in the data set; missing samples cannot be checked.",
                )
            protected[rows] |= torch.isin(present, wanted)
        for target in self.targets:
            marked = pair.marked[target]
            if not marked.any():
                raise ConfigurationError(
                    f"`where`: '{target}' selects none of {len(marked):,} samples, "
                    "so nothing would be protected.",
                    "give data that have such samples, or leave the rule out.",
                )
            protected |= marked
        return protected

    def __str__(self) -> str:
        protected = list(map(str, self.targets))
        n_ids = sum(map(len, self._ids.values()))
        if isinstance(self.ids, (str, Path)):
            protected.insert(0, str(self.ids))
        elif n_ids:
            protected.insert(0, plural(n_ids, "sample"))
        return f"protected:{' and '.join(protected)}"
