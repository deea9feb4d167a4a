"""What a new model must satisfy to replace the old one: rules on what became of each sample."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError, check_choice, check_kind
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.gate.gates import Gate, allowance
from lightning_nrl.release.model_pair import ModelPair, check_splits
from lightning_nrl.report._formatting import percent
from lightning_nrl.stats import Bound, binomial_cdf
from lightning_nrl.stats.binomial import check_confidence, percent_up, show_confidence

__all__ = ["AtMostBroken", "Finding", "MaxNegativeFlipRate", "NoSliceWorse", "Rule", "sign_test"]


@dataclass(frozen=True)
class Finding:
    """What one rule says: whether the new model satisfies it, and why, in figures.

    `ids` are data-set positions of the samples that it objects to, by split; empty if it passed.
    """

    rule: str
    passed: bool
    reason: str
    ids: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Rule(ABC):
    """One condition on an update. A rule of your own is a frozen dataclass with `check` and `__str__`."""

    @abstractmethod
    def check(self, pair: ModelPair) -> Finding:
        """Whether the new model satisfies it.

        Raises:
            ConfigurationError: the rule asks for what the data do not have.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The rule, as text."""

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        """Refuses data for which the rule has no meaning, before any model runs, by a `ConfigurationError`.

        Args:
            splits: the names of the splits.
            sliced: whether slices are told apart.
        """
        return None

    @property
    def targets(self) -> tuple[Target, ...]:
        """What the rule wants to know of the samples: `ModelPair.marked` has the answers."""
        return ()


@dataclass(frozen=True)
class AtMostBroken(Rule):
    """In each split no more samples are broken than a gate allows.

    Attributes:
        gate: `instance`: none, for data that must not break; `accuracy`: no more than are repaired, which is to say
            that accuracy does not fall; `tolerance:3` or `tolerance:1%`; or a `Gate`.
        splits: on which splits; empty: on each.

    Raises:
        ConfigurationError: on construction, if `gate` is none.

    Example:
        >>> print(AtMostBroken("accuracy", splits=("test",)))
        accuracy in test
    """

    gate: Gate | str = "instance"
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        gate = Gate.parse(self.gate)
        gate.excess_of(FlipCounts(0, 0, 0, 0))  # Refuses one that needs a target.
        object.__setattr__(self, "gate", gate)
        object.__setattr__(self, "splits", _names(self.splits))

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        check_splits(str(self), self.splits, splits)

    def check(self, pair: ModelPair) -> Finding:
        assert isinstance(self.gate, Gate)
        words, bad = [], torch.zeros(len(pair.after), dtype=torch.bool)
        for split in check_splits(str(self), self.splits, pair.splits):
            rows = pair.rows(split)
            counts = pair.flips.counts(rows)
            if self.gate.excess_of(counts):
                bad |= rows & pair.flips.broken
            words.append(
                f"{split}: {counts.broken:,} of {counts.passed:,} that were right broke; "
                f"{allowance(self.gate, counts)} (accuracy {_accuracies(counts)})"
            )
        return _finding(self, pair, bad, bool(bad.any()), words)

    def __str__(self) -> str:
        return _with_splits(str(self.gate), self.splits)


@dataclass(frozen=True)
class MaxNegativeFlipRate(Rule):
    """In each split the negative flip rate, broken of all, is below a limit with a confidence.

    What must be within it is the upper limit of Clopper and Pearson (see `lightning_nrl.stats`). It speaks of data to
    come only if the split is a sample of them that nothing has looked at: no training, no choice of a model.

    If several splits, or slices, must all be below the limit, each is held to the confidence by itself: a wrong model
    passes all with a probability of 1 - confidence at most, since it must pass where it is wrong.

    Attributes:
        limit: on the rate, in (0, 1).
        confidence: in (0, 1).
        each_slice: whether every slice must be below the limit, and not only the whole split.
        splits: on which splits; empty: on each.

    Raises:
        ConfigurationError: on construction, for a number out of its range.

    Example:
        >>> print(MaxNegativeFlipRate(0.01, 0.99))
        nfr:1%:99%
    """

    limit: float
    confidence: float = 0.95
    each_slice: bool = False
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_confidence(self.limit, "limit")
        check_confidence(self.confidence)
        object.__setattr__(self, "splits", _names(self.splits))

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        check_splits(str(self), self.splits, splits)
        if self.each_slice:
            _check_sliced(self, sliced)

    def check(self, pair: ModelPair) -> Finding:
        words, bad, passed = [], torch.zeros(len(pair.after), dtype=torch.bool), True
        for split in check_splits(str(self), self.splits, pair.splits):
            parts = {split: pair.rows(split)}
            if self.each_slice:
                parts |= {f"{split}, slice {name!r}": rows for name, rows in pair.slices_of(split).items()}
            found = {name: self._bound(pair, rows) for name, rows in parts.items()}
            above = [name for name, bound in found.items() if bound.upper > self.limit]
            for name in above:
                bad |= parts[name] & pair.flips.broken
                words.append(self._words(name, found[name]))
            passed = passed and not above
            if not above:
                worst = max(found, key=lambda name: found[name].upper)
                words.append(self._words(worst, found[worst]) + (", the highest" if len(found) > 1 else ""))
        return _finding(self, pair, bad, not passed, words)

    def _bound(self, pair: ModelPair, rows: Tensor) -> Bound:
        counts = pair.flips.counts(rows)
        return Bound.of(counts.broken, counts.n, self.confidence)

    def _words(self, name: str, bound: Bound) -> str:
        text = (
            f"{name}: negative flip rate {percent(bound.rate)} ({bound.broken:,} of {bound.n:,}), with "
            f"{show_confidence(self.confidence)} confidence at most {percent_up(bound.upper)}"
        )
        if bound.upper <= self.limit:
            return text
        needed = math.ceil(math.log(1 - self.confidence) / math.log1p(-self.limit))
        few = f"; that takes {needed:,} samples even where none breaks" if bound.n < needed else ""
        return f"{text}, not within {_share(self.limit)}{few}"

    def __str__(self) -> str:
        sure = "" if self.confidence == 0.95 else f":{_share(self.confidence)}"
        return _with_splits(f"{'slice-' if self.each_slice else ''}nfr:{_share(self.limit)}{sure}", self.splits)


@dataclass(frozen=True)
class NoSliceWorse(Rule):
    """No slice is worse than before.

    By *test*, for data that are a sample: a slice is worse if so many more of its samples broke than were repaired that
    chance alone makes it so with a probability below `level` (the exact sign test, one-sided, which is McNemar's; the
    level is divided by the number of slices, so that an update that makes none worse fails in at most that share of
    cases). That it passes is no proof: of small slices the test can say little, and the finding names those of which it
    can say nothing. What proves something of a slice is `MaxNegativeFlipRate(each_slice=True)`.

    By *count*, for data that are the whole matter, such as a suite of cases: a slice is worse if fewer of its samples
    are right than before. On a sample, chance makes some slice of most updates worse by count.

    Attributes:
        by: `test` or `count`.
        level: of the test, in (0, 1).
        splits: on which splits; empty: on each.

    Raises:
        ConfigurationError: on construction, for another word or a level out of its range.

    Example:
        >>> print(NoSliceWorse("count"))
        slices:count
    """

    by: Literal["test", "count"] = "test"
    level: float = 0.05
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("by", self.by, ("test", "count"))
        check_confidence(self.level, "level")
        object.__setattr__(self, "splits", _names(self.splits))

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        check_splits(str(self), self.splits, splits)
        _check_sliced(self, sliced)

    def check(self, pair: ModelPair) -> Finding:
        parts = {
            f"{split}, slice {name!r}": rows
            for split in check_splits(str(self), self.splits, pair.splits)
            for name, rows in pair.slices_of(split).items()
        }
        counts = {name: pair.flips.counts(rows) for name, rows in parts.items()}
        level = self.level / max(1, len(parts))
        worse = [name for name, found in counts.items() if self._is_worse(found, level)]
        bad = torch.zeros(len(pair.after), dtype=torch.bool)
        for name in worse:
            bad |= parts[name] & pair.flips.broken
        words = [self._words(name, counts[name], level) for name in worse]
        if not worse:
            words = [f"none of {len(parts):,} slices is worse by {self.by}"]
        mute = [name for name, found in counts.items() if sign_test(found.passed, 0) >= level]
        if self.by == "test" and mute:
            named = "; ".join(mute[:5]) + (f" and {len(mute) - 5:,} more" if mute[5:] else "")
            words.append(f"of {len(mute):,} with too few samples the test can say nothing ({named})")
        return _finding(self, pair, bad, bool(worse), words)

    def _is_worse(self, counts: FlipCounts, level: float) -> bool:
        if self.by == "count":
            return counts.broken > counts.repaired
        return sign_test(counts.broken, counts.repaired) < level

    def _words(self, name: str, counts: FlipCounts, level: float) -> str:
        text = f"{name} is worse: {counts.broken:,} broke, {counts.repaired:,} repaired (accuracy {_accuracies(counts)}"
        if self.by == "count":
            return f"{text})"
        return f"{text}; p = {sign_test(counts.broken, counts.repaired):.2g}, below {level:.2g})"

    def __str__(self) -> str:
        level = "" if self.level == 0.05 or self.by == "count" else f":{_share(self.level)}"
        return _with_splits(f"slices{':count' if self.by == 'count' else level}", self.splits)


def sign_test(broken: int, repaired: int) -> float:
    """P(Bin(broken + repaired, 1/2) >= broken): how likely chance alone breaks so many of the samples that changed.

    In (0, 1]; 1 if none changed.

    Example:
        >>> sign_test(5, 0)
        0.03125
    """
    changed = broken + repaired
    return binomial_cdf(repaired, changed, 0.5) if changed else 1.0


def _finding(rule: Rule, pair: ModelPair, bad: Tensor, failed: bool, words: Sequence[str]) -> Finding:
    ids = {split: rows for split, rows in pair.after.ids(bad).items() if rows}
    text = ". ".join(words)
    return Finding(str(rule), not failed, f"{text}.", ids)


def _accuracies(counts: FlipCounts) -> str:
    if not counts.n:
        return "of no sample"
    return f"{percent(counts.passed / counts.n)}, now {percent(counts.right / counts.n)}"


def _check_sliced(rule: Rule, sliced: bool) -> None:
    if not sliced:
        raise ConfigurationError(
            f"the rule `{rule}` needs slices, and `slices` is not given.",
            "say which slice each sample is in, such as `slices=lambda batch: batch[1]`, or leave the rule out.",
        )


def _names(splits: object) -> tuple[str, ...]:
    names = (splits,) if isinstance(splits, str) else splits
    fits = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    check_kind("splits", splits, fits, "list of splits", "splits=('test',)")
    return tuple(names)  # type: ignore[arg-type]


def _with_splits(text: str, splits: Sequence[str]) -> str:
    return f"{text} in {', '.join(splits)}" if splits else text


def _share(share: float) -> str:
    return f"{100 * share:.12g}%"
