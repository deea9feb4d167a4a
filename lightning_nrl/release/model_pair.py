"""What two models do on the same data, sample by sample: what the rules of a release look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.preserve import preserve
from lightning_nrl.data.batch import Source
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import Flips, SampleResults
from lightning_nrl.evaluation.slices import SliceRecorder, Slices, renumbered
from lightning_nrl.reference.old_model import Reference

__all__ = ["ModelPair", "check_splits", "evaluate_pair"]


@dataclass(frozen=True)
class ModelPair:
    """Both models on `N` samples, row by row.

    Attributes:
        before: what the old model does.
        after: what the new one does on the same samples.
        slices: names of the slices, `S` of them.
        group: `N` int64, the number of each sample's slice; -1: in none.
        marked: `N` bool for each target that a rule asks about: which samples it chooses, right or wrong.
        flips: what became of each sample.
    """

    before: SampleResults
    after: SampleResults
    slices: tuple[str, ...]
    group: Tensor
    marked: Mapping[Target, Tensor] = field(default_factory=dict)
    flips: Flips = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flips", Flips.between(self.before, self.after))

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return self.after.splits

    def rows(self, split: str) -> Tensor:
        """`N` bool, the samples of a split."""
        mask = torch.zeros(len(self.after), dtype=torch.bool)
        mask[self.after.of(split)] = True
        return mask

    def slices_of(self, split: str) -> dict[str, Tensor]:
        """`N` bool for each slice that has samples in a split: these samples."""
        own = self.rows(split)
        masks = {name: own & (self.group == number) for number, name in enumerate(self.slices)}
        return {name: mask for name, mask in masks.items() if mask.any()}


def evaluate_pair(
    new: Evaluator,
    old: Reference,
    data: Sequence[Source],
    *,
    slices: Slices | None = None,
    targets: Sequence[Target] = (),
) -> ModelPair:
    """One pass of each model over the data, batch by batch. Models and random states are left as found.

    Each rank gives its share of the splits and gets the same tables. The evaluator holds the new model and what judges
    both; targets say what else is to be noted of the samples.

    Raises:
        ConfigurationError: the data, the slices, a target or the old model do not fit.
        EvaluationError: a split's samples are not there exactly once.
    """
    ranks = new.collective
    slicing = [SliceRecorder(source, slices, new.task) for source in data]
    recording: Sequence[Any] = slicing
    marking: dict[Target, list[SliceRecorder]] = {}
    for target in targets:
        # One around the other, so that a single pass notes all.
        recording = marking[target] = [SliceRecorder(source, target, new.task, "where") for source in recording]
    with preserve(new.model):
        after = new.run(recording)
        before = old.answers(new, data, after)
    names, group = _with_common_names([source.named(ranks) for source in slicing])
    marked = {target: torch.cat([mark.named(ranks)[1] >= 0 for mark in marks]) for target, marks in marking.items()}
    return ModelPair(before, after, names, group, marked)


def check_splits(argument: str, asked: Sequence[str], there: Sequence[str]) -> tuple[str, ...]:
    """The splits that are asked for, all if none is named; a `ConfigurationError` if one is not there."""
    unknown = [name for name in asked if name not in there]
    if unknown:
        raise ConfigurationError(
            f"`{argument}` names the split {unknown[0]!r}, the data have {list(there)}.", "name one of these."
        )
    return tuple(asked) or tuple(there)


def _with_common_names(parts: Sequence[tuple[tuple[str, ...], Tensor]]) -> tuple[tuple[str, ...], Tensor]:
    """The slices of all splits under common numbers."""
    names = tuple(sorted({name for own, _ in parts for name in own}))
    return names, torch.cat([renumbered(own, group, names) for own, group in parts])
