"""`ProtectedIntact`, a release rule for samples that must stay right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lightning_nrl._utils.formatting import list_ids, plural
from lightning_nrl.data.targets import Predicate, Target, target_in
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.release.model_pair import ModelPair, check_splits
from lightning_nrl.release.rules import Rule, RuleResult, Verdict, ids_in
from lightning_nrl.release.suite import RegressionSuite, Samples, SuiteSample, rows_of
from lightning_nrl.updates.predictions import Ids


@dataclass(frozen=True, eq=False)
class ProtectedIntact(Rule):
    """Requires that no protected sample breaks.

    Samples of a suite that have a day must be right, whether or not the old model is.

    Attributes:
        ids: protected samples: lists of data-set positions by split, a single list if there is one
            split, a `RegressionSuite` or the path of its CSV file.
        where: more protected samples: a `Target`, its text (`label 3`), a predicate on raw batches,
            or its address.

    Example:
        >>> print(ProtectedIntact({"test": [3, 17]}))
        protected:2 samples
    """

    ids: Ids | Sequence[int] | str | Path | RegressionSuite | None = None
    where: Target | Predicate | str | None = None
    _samples: Samples = field(init=False, repr=False)

    def __post_init__(self) -> None:
        where = self.where
        if isinstance(where, str):
            target = target_in(where)
            where = where if target is None else target
        if where is not None and not isinstance(where, Target):
            where = Target.where(where)
        object.__setattr__(self, "where", where)
        samples = _samples_of(self.ids)
        if where is None and not samples:
            raise ConfigurationError(
                "`ProtectedIntact` protects nothing.",
                "give `ids={'test': [3, 17]}`, a CSV file of ids, or `where`.",
            )
        object.__setattr__(self, "_samples", samples)

    @property
    def targets(self) -> tuple[Target, ...]:
        if isinstance(self.where, Target):
            return (self.where,)
        return ()

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        asked = sorted({split for split, _ in self._in(splits)})
        loaders = ", ".join(f"{split!r}: loader" for split in dict.fromkeys((*splits, *asked)))
        hint = f"read all of them, such as by `trainer.test(model, {{{loaders}}})`."
        check_splits(str(self), asked, splits, hint)

    def check(self, pair: ModelPair) -> RuleResult:
        samples = self._in(pair.splits)
        protected, needed = self._protected(pair, samples)
        counts = pair.flips.counts(protected)
        reason = f"{counts.broken:,} of {counts.passed:,} protected samples that were right broke"
        n_wrong = counts.failing + counts.repaired
        if n_wrong:
            reason += (
                f"; {n_wrong:,} more were wrong before, {counts.repaired:,} of these are right now"
            )
        violating = (protected & pair.flips.broken) | (needed & ~pair.after.passed)
        ids = ids_in(pair, violating)
        named = []
        for split, rows in ids.items():
            for at in rows:
                entry = samples.get((split, at), SuiteSample())
                if entry.reason:
                    named.append(f"{split} {at} ({entry.reason})")
        if named:
            reason += f"; wrong: {list_ids(named, 'the JSON')}"
        by_split: dict[str, Verdict] = {}
        for split in ids_in(pair, protected):
            by_split[split] = "NOT satisfied" if split in ids else "satisfied"
        missing = (
            "" if counts.passed or needed.any() else "a protected sample that was right before"
        )
        passed = not ids and not missing
        return RuleResult(str(self), passed, f"{reason}.", ids, missing, by_split)

    def _in(self, splits: Sequence[str]) -> Samples:
        """Returns the protected samples; those without a split are in the only one."""
        samples = {}
        for (split, at), entry in self._samples.items():
            if not split and len(splits) != 1:
                raise ConfigurationError(
                    f"`ids` names no split, but the data have {list(splits)}.",
                    f"write ids={{{splits[0]!r}: [...]}}.",
                )
            samples[split or splits[0], at] = entry
        return samples

    def _protected(self, pair: ModelPair, samples: Samples) -> tuple[Tensor, Tensor]:
        """Returns masks of protected samples and of those that must be right."""
        protected, needed = torch.zeros(2, len(pair.after), dtype=torch.bool)
        rows = rows_of(str(self), samples, pair.after, pair.keys)
        protected[rows] = True
        needed[rows] = torch.tensor([entry.since != "" for entry in samples.values()]).bool()
        for target in self.targets:
            marked = pair.marked[target]
            if not marked.any():
                raise ConfigurationError(
                    f"`where`: '{target}' selects none of {len(marked):,} samples, "
                    "so nothing would be protected.",
                    "give data that have such samples, or leave the rule out.",
                )
            protected |= marked
        return protected, needed

    def __str__(self) -> str:
        protected = list(map(str, self.targets))
        if isinstance(self.ids, (str, Path, RegressionSuite)):
            protected.insert(0, str(self.ids))
        elif self._samples:
            protected.insert(0, plural(len(self._samples), "sample"))
        return f"protected:{' and '.join(protected)}"


def _samples_of(ids: Ids | Sequence[int] | str | Path | RegressionSuite | None) -> Samples:
    if isinstance(ids, RegressionSuite) and ids.samples:
        return ids.samples
    if isinstance(ids, (str, Path, RegressionSuite)):
        return RegressionSuite.read(ids).samples
    by_split = ids or {}
    if not isinstance(by_split, Mapping):
        by_split = {"": by_split}
    samples = {}
    for split, rows in by_split.items():
        fits = isinstance(rows, Sequence) and all(isinstance(at, int) for at in rows)
        check_kind("ids", by_split, fits, "list of samples", "ids={'test': [3, 17]}")
        samples.update(dict.fromkeys(((split, at) for at in rows), SuiteSample()))
    return samples
