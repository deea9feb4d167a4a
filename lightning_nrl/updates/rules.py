"""Release rules, which a new model must satisfy to replace the old one: base classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.formatting import percent
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.updates.model_pair import ModelPair, check_splits
from lightning_nrl.updates.predictions import Ids


@dataclass(frozen=True)
class RuleResult:
    """Result of one rule: if the new model satisfies it, and why."""

    rule: str  # the rule as text
    passed: bool  # True if the new model satisfies the rule
    reason: str
    # By split, data-set positions of the broken samples that violate the rule.
    ids: Ids = field(default_factory=dict)


class Rule(ABC):
    """Base class of release rules. Your own is a frozen dataclass with `check` and `__str__`."""

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

    @property
    @abstractmethod
    def text(self) -> str:
        """The rule as text, without the names of its splits."""

    def __post_init__(self) -> None:
        names = (self.splits,) if isinstance(self.splits, str) else self.splits
        fits = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
        check_kind("splits", self.splits, fits, "list of splits", "splits=('test',)")
        object.__setattr__(self, "splits", tuple(names))

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

    @abstractmethod
    def sentences(self, parts: Sequence[Part]) -> list[str]:
        """Returns sentences about the parts, without full stops. `RuleResult.reason` joins them."""

    def check(self, pair: ModelPair) -> RuleResult:
        parts = self._parts(pair)
        worse = [part for part in parts if self.is_worse(part.counts, len(parts))]
        violating = torch.zeros(len(pair.after), dtype=torch.bool)
        for part in worse:
            violating |= part.rows
        sentences = self.sentences(parts)
        splits = {part.split for part in parts}
        n_in_splits = sum(int(pair.rows(split).sum()) for split in splits)
        n_unchecked = n_in_splits - sum(part.counts.n for part in parts)
        if n_unchecked > 0:
            sentences.append(f"{n_unchecked:,} samples are in no slice and were not checked")
        ids = broken_ids(pair, violating)
        return RuleResult(str(self), not worse, f"{'. '.join(sentences)}.", ids)

    def _parts(self, pair: ModelPair) -> list[Part]:
        parts = []
        for split in check_splits(str(self), self.splits, pair.splits):
            for name, rows in self._masks(pair, split).items():
                parts.append(Part(split, name, rows, pair.flips.counts(rows)))
        return parts

    def _masks(self, pair: ModelPair, split: str) -> dict[str, Tensor]:
        """Returns masks of the parts of a split by name."""
        all_rows, slices = pair.rows(split), pair.slices_of(split)
        if not (slices if self.each_slice else all_rows.any()):
            sample = "sample in a slice" if self.each_slice else "sample"
            raise ConfigurationError(
                f"the rule `{self}` has nothing to check: `{split}` has no {sample}.",
                f"leave the rule out, or name the splits that it is for: `{self.text} in SPLIT`.",
            )
        masks = {}
        if self.whole_splits:
            masks[split] = all_rows
        if self.each_slice:
            for name, rows in slices.items():
                masks[f"{split}, slice {name!r}"] = rows
        return masks

    def __str__(self) -> str:
        return f"{self.text} in {', '.join(self.splits)}" if self.splits else self.text


def broken_ids(pair: ModelPair, rows: Tensor) -> Ids:
    """Returns, for each split that has any, the ids of the broken samples in a mask, `N` bool."""
    return {split: ids for split, ids in pair.after.ids(rows & pair.flips.broken).items() if ids}


def accuracies(counts: FlipCounts) -> str:
    """Formats the accuracies of the old and of the new model."""
    return f"accuracy {percent(counts.accuracy_before)}, now {percent(counts.accuracy_after)}"


def exact_percent(share: float) -> str:
    """Formats a share so that `read_number` reads the same share."""
    return f"{100 * share:.12g}%"
