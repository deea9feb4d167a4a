"""Release rules, which a new model must satisfy to replace the old one: base classes, counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._utils.formatting import percent
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.gate import Gate, allowance
from lightning_nrl.release.model_pair import ModelPair, check_splits
from lightning_nrl.updates.predictions import Ids

Verdict = Literal["satisfied", "NOT satisfied", "undecided"]


@dataclass(frozen=True)
class RuleResult:
    """Result of one rule: if the new model satisfies it, and why.

    Attributes:
        rule: the rule as text.
        passed: True if the new model satisfies the rule.
        reason: sentences with the counts.
        ids: by split, data-set positions of the samples that violate the rule.
        missing: if the rule fails only for lack of samples, what more would satisfy it; else empty.
        by_split: verdict on each split that the rule judged; empty if it judged all together.
    """

    rule: str
    passed: bool
    reason: str
    ids: Ids = field(default_factory=dict)
    missing: str = ""
    by_split: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        if self.passed:
            return "satisfied"
        return "undecided" if self.missing else "NOT satisfied"

    @property
    def explanation(self) -> str:
        if self.missing:
            return f"{self.reason} Missing: {self.missing}."
        return self.reason

    def __post_init__(self) -> None:
        passed = self.passed
        if isinstance(passed, (np.generic, Tensor)):
            passed = passed.item()
        check_kind("passed", passed, isinstance(passed, bool), "bool", "passed=bool(...)")
        object.__setattr__(self, "passed", passed)


class Rule(ABC):
    """Base class of release rules. Your own is a frozen dataclass with `check` and `__str__`."""

    is_statistical: bool = False  # True if the rule infers from samples, so each counts once

    @abstractmethod
    def check(self, pair: ModelPair) -> RuleResult:
        """Judges the new model.

        Raises:
            ConfigurationError: the rule cannot be applied to the samples.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Returns the rule as text, as in a report."""

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        """Called before any model runs.

        Args:
            splits: the splits of the data.
            sliced: True if slices are given.

        Raises:
            ConfigurationError: the rule names another split, or needs slices that are not given.
        """
        return None

    @property
    def targets(self) -> tuple[Target, ...]:
        """Targets whose samples the rule reads. `ModelPair.marked` gets a mask for each target."""
        return ()


class Part(NamedTuple):
    """Samples that a rule counts together: a whole split or one slice of it."""

    split: str
    name: str  # of the split, or of the split and the slice
    rows: Tensor  # N bool, mask of the samples
    counts: FlipCounts


class SplitRule(Rule):
    """Base class of rules that count flips in splits or their slices."""

    splits: tuple[str, ...]
    whole_splits: bool = True  # True if the rule counts flips in each whole split
    each_slice: bool = False  # True if the rule counts flips in each slice
    needs_right: bool = True  # True if the rule says nothing where no sample was right before

    @property
    @abstractmethod
    def text(self) -> str:
        """The rule as text, without the names of its splits."""

    def __post_init__(self) -> None:
        fits = isinstance(self.splits, (tuple, list))
        check_kind("splits", self.splits, fits, "list of splits", "splits=('test',)")
        object.__setattr__(self, "splits", tuple(self.splits))

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        check_splits(str(self), self.splits, splits)
        if self.each_slice and not sliced:
            raise ConfigurationError(
                f"the rule `{self}` needs slices, but `slices` is not given.",
                "say which slice each sample is in, such as `slices=lambda batch: batch[1]`, "
                "or leave the rule out.",
            )

    @abstractmethod
    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        """True if a part (split or slice) with these counts violates the rule.

        The rule checks `n_parts` parts in all.
        """

    def missing(self, counts: FlipCounts) -> str:
        """Returns what more samples would satisfy the rule in a part that violates it.

        It is empty if the part violates the rule for another reason than a lack of samples.
        """
        return ""

    def objections(self, pair: ModelPair) -> Tensor:
        """Marks the samples, `N` bool, that the rule names in a part that violates it."""
        return pair.flips.broken

    @abstractmethod
    def sentences(self, parts: Sequence[Part]) -> list[str]:
        """Returns sentences about the parts, without full stops. `RuleResult.reason` joins them."""

    def check(self, pair: ModelPair) -> RuleResult:
        parts: list[Part] = []
        missing = []
        unchecked = torch.zeros(len(pair.after), dtype=torch.bool)
        by_split: dict[str, Verdict] = {}
        for split in check_splits(str(self), self.splits, pair.splits):
            parts += self._parts(pair, split)
            unchecked |= pair.rows(split)
            by_split[split] = "satisfied"
            if self.needs_right and not pair.flips.counts(pair.rows(split)).passed:
                missing.append(f"{split}: a sample that was right before")
                by_split[split] = "undecided"
        checked = unchecked.clone()
        violating = torch.zeros_like(unchecked)
        for part in parts:
            unchecked &= ~part.rows
            if self.is_worse(part.counts, len(parts)):
                violating |= part.rows
                more = self.missing(part.counts)
                missing.append(f"{part.name}: {more}")
                if not more:
                    by_split[part.split] = "NOT satisfied"
                elif by_split[part.split] == "satisfied":
                    by_split[part.split] = "undecided"
        sentences = self.sentences(parts)
        n_repeated = int((checked & ~pair.distinct).sum())
        if self.is_statistical and n_repeated:
            sentences.append(f"{n_repeated:,} repeated samples do not count")
        n_unchecked = int(unchecked.sum())
        if n_unchecked:
            sentences.append(f"{n_unchecked:,} samples are in no slice and were not checked")
        needs = "; ".join(missing) if "NOT satisfied" not in by_split.values() else ""
        reason = f"{'. '.join(sentences)}."
        ids = ids_in(pair, violating & self.objections(pair))
        return RuleResult(str(self), not missing, reason, ids, needs, by_split)

    def count(self, pair: ModelPair, rows: Tensor) -> FlipCounts:
        """Counts what the rule needs on the samples in a mask, `N` bool."""
        return pair.flips.counts(rows)

    def _parts(self, pair: ModelPair, split: str) -> list[Part]:
        masks = {}
        if self.whole_splits:
            masks[split] = pair.rows(split)
        if self.each_slice:
            slices = pair.slices_of(split)
            if not slices:
                raise self._has_nothing_to_check(f"`{split}` has no sample in a slice")
            for name, rows in slices.items():
                masks[f"{split}, slice {name!r}"] = rows
        parts = []
        for name, rows in masks.items():
            counted = rows & pair.distinct if self.is_statistical else rows
            if not counted.any():
                raise self._has_nothing_to_check(f"`{split}` has no sample")
            parts.append(Part(split, name, rows, self.count(pair, counted)))
        return parts

    def _has_nothing_to_check(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"the rule `{self}` has nothing to check: {reason}.",
            f"leave the rule out, or name the splits that it is for: `{self.text} in SPLIT`.",
        )

    def __str__(self) -> str:
        if self.splits:
            return f"{self.text} in {', '.join(self.splits)}"
        return self.text


def limited_to(rule: Rule, splits: tuple[str, ...]) -> Rule:
    """Returns the rule for these splits only, if it is for all splits."""
    if isinstance(rule, SplitRule) and is_dataclass(rule) and not rule.splits:
        return replace(rule, splits=splits)
    return rule


def ids_in(pair: ModelPair, mask: Tensor) -> Ids:
    """Returns the ids of the samples in a mask, `N` bool, for each split that has any."""
    return {split: ids for split, ids in pair.after.ids(mask).items() if ids}


def accuracies(counts: FlipCounts) -> str:
    """Formats the accuracies of the old and of the new model."""
    return f"accuracy {percent(counts.accuracy_before)}, now {percent(counts.accuracy_after)}"


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
