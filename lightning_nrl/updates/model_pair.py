"""`ModelPair`: the results of the old and the new model on the same samples, which the rules of a
release read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError, TargetError
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import Flips, SampleResults
from lightning_nrl.evaluation.slices import SliceRecorder, Slices, common_names
from lightning_nrl.updates.old_model import Reference
from lightning_nrl.updates.predictions import Predictions


@dataclass(frozen=True)
class ModelPair:
    """Results of the old and the new model on the same `N` samples, in the same order.

    Attributes:
        before: results of the old model.
        after: results of the new model.
        slices: names of the slices.
        group: `N` int64, index of each sample's slice in `slices`, or -1 if the sample is in no
            slice.
        marked: for each target in a rule, a mask, `N` bool, of the samples that the target selects,
            right or wrong.
        flips: how each sample changed from the old to the new model.
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
        return self.after.splits

    def rows(self, split: str) -> Tensor:
        mask = torch.zeros(len(self.after), dtype=torch.bool)
        mask[self.after.of(split)] = True
        return mask

    def slices_of(self, split: str) -> dict[str, Tensor]:
        """Returns, for each slice that has samples in the split, a mask of these samples, `N` bool,
        by slice name.
        """
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
    """Runs each model over the data once, batch by batch. Leaves models and random states
    unchanged.

    `new` holds the new model, its task and precision. `data` is this rank's share of the splits;
    every rank gets the results for all samples. `ModelPair.marked` gets a mask for each of the
    `targets`.
    """
    ranks = new.collective
    slicing = [SliceRecorder(source, slices, new.task) for source in data]
    recording: Sequence[Any] = slicing
    marking: dict[Target, list[SliceRecorder]] = {}
    for target in targets:
        # Each recorder reads from the one before, so that a single pass records all targets.
        recording = marking[target] = [
            SliceRecorder(source, target, new.task, "where") for source in recording
        ]
    with preserve_state(new.model):
        after = new.run(recording)
        before = old.answers(new, data, after)
    names, group = common_names([source.named(ranks) for source in slicing])
    marked = {
        target: torch.cat([mark.named(ranks)[1] >= 0 for mark in marks])
        for target, marks in marking.items()
    }
    return ModelPair(before, after, names, group, marked)


def pair_from_files(
    old: Predictions,
    new: Predictions,
    slices: Mapping[tuple[str, int], str] | None = None,
    targets: Sequence[Target] = (),
) -> ModelPair:
    """Pairs the predictions of two models on the samples in `new`. `old` may have more samples.

    `slices` maps (split, id) to the name of a sample's slice; an empty name means no slice. Raises
    a `ConfigurationError` if `old` lacks a sample, or if a split in `slices` has other samples
    there than in `old`.
    """
    given = slices or {}
    for split in sorted({split for split, _ in given}):
        own = {at for name, at in given if name == split}
        if apart := sorted(own ^ old.splits.get(split, {}).keys()):
            raise ConfigurationError(
                f"`slices`: {len(apart):,} samples of `{split}` are in only one of the files `slices` and `old` "
                f"({', '.join(map(str, apart[:5]))}).",
                "give a line for each sample that `old` predicts; leave `slice` empty for a sample in no slice.",
            )
    after = new.alone()
    before = old.results(after)
    samples = [
        (split, at) for split in after.splits for at in after.index[after.of(split)].tolist()
    ]
    names = tuple(sorted({name for name in given.values() if name.strip()}))
    number = {name: i for i, name in enumerate(names)}
    group = torch.tensor([number.get(given.get(sample, ""), -1) for sample in samples])
    marked = {target: _marked(target, before, after) for target in targets}
    return ModelPair(before, after, names, group.long(), marked)


def _marked(target: Target, before: SampleResults, after: SampleResults) -> Tensor:
    """Selects the samples of a target. A label is known only where the prediction of a model is
    right.
    """
    label = torch.where(
        before.passed, before.prediction, torch.where(after.passed, after.prediction, -1)
    )
    told = None if bool((before.passed & (label < 0)).any()) else label
    try:
        return target.select(Batch((), None, torch.arange(len(after))), told, None)
    except TargetError as error:
        raise ConfigurationError(
            f"the rule `protected:{target}`: the files do not say which samples it protects.",
            "give the column `prediction`, which tells the classes, or a file of ids, `protected:ids.csv`.",
        ) from error


def check_splits(argument: str, asked: Sequence[str], there: Sequence[str]) -> tuple[str, ...]:
    """Returns `asked`, or `there` if `asked` is empty. Raises a `ConfigurationError` if an asked
    split is unknown.
    """
    unknown = [name for name in asked if name not in there]
    if unknown:
        raise ConfigurationError(
            f"`{argument}` names the split {unknown[0]!r}, but the data have {list(there)}.",
            "name one of these.",
        )
    return tuple(asked) or tuple(there)


def check_missing(
    old: Predictions, new: Predictions, allowed: Collection[str] = ()
) -> dict[str, int]:
    """Counts the samples that only `old` predicts, for each split that has such samples.

    Raises a `ConfigurationError` if `allowed` lacks such a split, or names a split that `old`
    lacks.
    """
    missing = {
        split: sorted(rows.keys() - new.splits.get(split, {}).keys())
        for split, rows in old.splits.items()
    }
    check_splits("allow_missing", tuple(allowed), tuple(old.splits))
    for split, ids in missing.items():
        if ids and split not in allowed:
            raise ConfigurationError(
                f"`new`: {len(ids):,} of {len(old.splits[split]):,} samples of `{split}` that `old` predicts are "
                f"missing ({', '.join(map(str, ids[:5]))}), and any of them could be broken.",
                f"predict them too, or say that they may be missing: `--allow-missing {split}`.",
            )
    return {split: len(ids) for split, ids in missing.items() if ids}
