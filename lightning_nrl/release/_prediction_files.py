"""Both models' predictions from files as what the rules look at: no model is needed to decide on a release."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from lightning_nrl._utils.strict_csv import read_csv
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.reference.predictions import Predictions
from lightning_nrl.release.model_pair import ModelPair, check_splits

__all__ = ["check_missing", "pair_from_files", "read_slices"]

Slices = Mapping[tuple[str, int], str]
"""Names of slices by split and data-set position."""


def pair_from_files(old: Predictions, new: Predictions, slices: Slices | None = None) -> ModelPair:
    """What two models did on the samples that the new one has predictions for; those in no slice have none.

    Raises:
        ConfigurationError: samples are missing in `old`, or of one it is not known whether it was right.
    """
    after = _table(new)
    samples = [(split, at) for split in after.splits for at in after.index[after.of(split)].tolist()]
    names = tuple(sorted(set((slices or {}).values())))
    number = {name: i for i, name in enumerate(names)}
    group = torch.tensor([number[slices[sample]] if slices and sample in slices else -1 for sample in samples])
    return ModelPair(old.results(after), after, names, group.long())


def read_slices(path: str | Path) -> dict[tuple[str, int], str]:
    """Slices in a CSV file with the columns `split`, `id` and `slice`.

    Raises:
        ConfigurationError: there is no such file, or a line cannot be read; it is named.
    """
    found: dict[tuple[str, int], str] = {}
    for line in read_csv("slices", path, ("split", "id", "slice")):
        sample = line.values["split"], line.whole_number("id")
        if sample in found:
            raise line.refused(f"sample {sample[1]} of {sample[0]!r} is there twice")
        found[sample] = line.values["slice"]
    return found


def check_missing(old: Predictions, new: Predictions, allowed: Collection[str] = ()) -> dict[str, int]:
    """How many samples have old predictions and no new ones, by split; what is left out could be what broke.

    Raises:
        ConfigurationError: samples are missing of a split that is not `allowed`, or such a split does not exist.
    """
    missing = {split: sorted(rows.keys() - new.splits.get(split, {}).keys()) for split, rows in old.splits.items()}
    check_splits("allow_missing", tuple(allowed), tuple(old.splits))
    for split, ids in missing.items():
        if ids and split not in allowed:
            raise ConfigurationError(
                f"`new`: {len(ids):,} of {len(old.splits[split]):,} samples of `{split}` that `old` predicts are "
                f"missing ({', '.join(map(str, ids[:5]))}), and any of them could be broken.",
                f"predict them too, or say that they may be missing: `--allow-missing {split}`.",
            )
    return {split: len(ids) for split, ids in missing.items() if ids}


def _table(predictions: Predictions) -> SampleResults:
    rows = [(split, at, *found) for split, own in predictions.splits.items() for at, found in sorted(own.items())]
    unknown = [(split, at) for split, at, _, passed in rows if passed is None]
    if unknown or not rows:
        problem = f"of {len(unknown):,} samples, such as {unknown[0]}, it" if rows else "of no sample it"
        raise ConfigurationError(
            f"`new`: {problem} is known whether the prediction was right.", "give the column `passed`, 1 or 0."
        )
    passed = torch.tensor([row[3] for row in rows], dtype=torch.bool)
    nothing = torch.full((len(rows),), -1)
    return SampleResults(
        splits=tuple(predictions.splits),
        sizes=tuple(map(len, predictions.splits.values())),
        index=torch.tensor([row[1] for row in rows]),
        label=nothing,
        prediction=torch.tensor([row[2] for row in rows]),
        loss=(~passed).float(),
        passed=passed,
        targeted=torch.zeros_like(passed),
        margin=torch.full((len(rows),), torch.nan),
    )
