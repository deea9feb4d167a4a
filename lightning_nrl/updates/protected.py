"""`ProtectedIntact`, a release rule for samples that must stay right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lightning_nrl._utils.formatting import plural
from lightning_nrl.data.targets import Predicate, Target, target_in
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.updates.model_pair import ModelPair
from lightning_nrl.updates.predictions import Ids
from lightning_nrl.updates.rules import Rule, RuleResult, Verdict, ids_in
from lightning_nrl.updates.suite import RegressionSuite, Samples, SuiteSample

NAMED_SAMPLES = 5  # in the reason of a refusal


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
        unread = sorted(self._by_split(splits).keys() - set(splits))
        if unread:
            loaders = ", ".join(f"{split!r}: loader" for split in (*splits, *unread))
            raise ConfigurationError(
                f"{self._argument} names the split {', '.join(map(repr, unread))}, but the data "
                f"have {list(splits)}.",
                f"read all of them, such as by `trainer.test(model, {{{loaders}}})`.",
            )

    def check(self, pair: ModelPair) -> RuleResult:
        protected, needed, reasons = self._protected(pair)
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
            named += [f"{split} {at} ({reasons[split, at]})" for at in rows if reasons[split, at]]
        if named:
            reason += f"; wrong: {', '.join(named[:NAMED_SAMPLES])}"
            if len(named) > NAMED_SAMPLES:
                reason += f" and {len(named) - NAMED_SAMPLES:,} more"
        by_split: dict[str, Verdict] = {}
        for split in ids_in(pair, protected):
            by_split[split] = "NOT satisfied" if split in ids else "satisfied"
        missing = (
            "" if counts.passed or needed.any() else "a protected sample that was right before"
        )
        passed = not ids and not missing
        return RuleResult(str(self), passed, f"{reason}.", ids, missing, by_split)

    @property
    def _argument(self) -> str:
        return "`ids`" if isinstance(self.ids, (Mapping, list, tuple, type(None))) else f"`{self}`"

    def _by_split(self, splits: Sequence[str]) -> dict[str, dict[int, SuiteSample]]:
        by_split: dict[str, dict[int, SuiteSample]] = defaultdict(dict)
        for (split, at), entry in self._samples.items():
            if not split and len(splits) != 1:
                raise ConfigurationError(
                    f"`ids` names no split, but the data have {list(splits)}.",
                    f"write ids={{{splits[0]!r}: [...]}}.",
                )
            by_split[split or splits[0]][at] = entry
        return by_split

    def _protected(self, pair: ModelPair) -> tuple[Tensor, Tensor, dict[tuple[str, int], str]]:
        """Returns masks of protected samples and of those that must be right, and the reasons."""
        protected, needed = torch.zeros(2, len(pair.after), dtype=torch.bool)
        reasons = defaultdict(str)
        row_of = {sample: row for row, sample in enumerate(pair.after.samples)}
        changed = []
        for split, entries in self._by_split(pair.splits).items():
            missing = sorted(at for at in entries if (split, at) not in row_of)
            if missing:
                raise ConfigurationError(
                    f"{self._argument}: {len(missing):,} protected samples are not in `{split}` "
                    f"({missing[:5]}).",
                    "give positions in the data set; missing samples cannot be checked.",
                )
            for at, entry in entries.items():
                row = row_of[split, at]
                protected[row], needed[row] = True, bool(entry.since)
                reasons[split, at] = entry.reason
                label, key = int(pair.after.label[row]), pair.keys[row] if pair.keys else ""
                has_other_label = entry.label is not None and label not in (entry.label, -1)
                if has_other_label or (entry.key and key not in (entry.key, "")):
                    changed.append((split, at))
        if changed:
            raise ConfigurationError(
                f"{self._argument}: {len(changed):,} samples are not those in the suite, or have "
                f"another label ({', '.join(f'{split} {at}' for split, at in changed[:5])}).",
                "bring the data back into their order; or correct the lines of these samples.",
            )
        for target in self.targets:
            marked = pair.marked[target]
            if not marked.any():
                raise ConfigurationError(
                    f"`where`: '{target}' selects none of {len(marked):,} samples, "
                    "so nothing would be protected.",
                    "give data that have such samples, or leave the rule out.",
                )
            protected |= marked
        return protected, needed, reasons

    def __str__(self) -> str:
        protected = list(map(str, self.targets))
        if isinstance(self.ids, (str, Path)):
            protected.insert(0, str(self.ids))
        elif isinstance(self.ids, RegressionSuite):
            protected.insert(0, str(self.ids.path))
        elif self._samples:
            protected.insert(0, plural(len(self._samples), "sample"))
        return f"protected:{' and '.join(protected)}"


def _samples_of(ids: Ids | Sequence[int] | str | Path | RegressionSuite | None) -> Samples:
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
