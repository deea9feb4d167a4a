"""Both models' predictions from files as what the rules look at: no model is needed to decide on a release."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch

from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.evaluation.evaluator import SampleResults
from lightning_nrl.reference.predictions import Predictions
from lightning_nrl.release.model_pair import ModelPair

__all__ = ["read_slices", "seen_in_files"]

Slices = Mapping[tuple[str, int], str]
"""Names of slices by split and data-set position."""


def seen_in_files(old: Predictions, new: Predictions, slices: Slices | None = None) -> ModelPair:
    """What two models did on the samples that the new one has predictions for.

    Args:
        old: of the model in use; it needs each of these samples.
        new: of the new model. Both need `passed`.
        slices: which slice each sample is in; samples that are not there are in none.

    Raises:
        ConfigurationError: samples are missing, or of one it is not known whether it was right.
    """
    after = _table(new)
    samples = [(split, at) for split in after.splits for at in after.index[after.of(split)].tolist()]
    names = tuple(sorted(set((slices or {}).values())))
    number = {name: i for i, name in enumerate(names)}
    group = torch.tensor([number[slices[sample]] if slices and sample in slices else -1 for sample in samples])
    return ModelPair(old.evidence(after), after, names, group.long())


def read_slices(path: str | Path) -> dict[tuple[str, int], str]:
    """Slices in a CSV file with the columns `split`, `id` and `slice`.

    Raises:
        ConfigurationError: there is no such file, or a line cannot be read; it is named.
    """
    hint = "give a CSV file with the columns split,id,slice."
    try:
        lines = list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(explain(f"`slices={str(path)!r}` cannot be read ({error}).", hint)) from error
    found: dict[tuple[str, int], str] = {}
    for at, line in enumerate(lines, 2):
        try:
            found[line["split"], int(line["id"])] = line["slice"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(explain(f"`slices={str(path)!r}`, line {at}: {error!r}.", hint)) from error
    return found


def _table(predictions: Predictions) -> SampleResults:
    rows = [(split, at, *found) for split, own in predictions.splits.items() for at, found in sorted(own.items())]
    unknown = [(split, at) for split, at, _, passed in rows if passed is None]
    if unknown or not rows:
        problem = f"of {len(unknown):,} samples, such as {unknown[0]}, it" if rows else "of no sample it"
        raise ConfigurationError(
            explain(f"`new`: {problem} is known whether the prediction was right.", "give the column `passed`, 1 or 0.")
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
