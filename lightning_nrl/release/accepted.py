"""Compares an old model that the new code runs with what it predicted when it was accepted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_nrl._utils.checkpoint import load_mapping
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.release.model_pair import ModelPair
from lightning_nrl.report import RepairReport
from lightning_nrl.updates.old_model import OldModel, Reference
from lightning_nrl.updates.predictions import Predictions

# Share of the samples that another device or precision may make right or wrong.
MOST_BORDERLINE = 0.01
HINT = "compare with the predictions of its own release, `reference='release/predictions.csv'`."


def predictions_beside(path: str | Path) -> Path:
    """Returns the file to which an accepted release writes the predictions of a checkpoint."""
    return Path(f"{path}.predictions.csv")


def check_accepted(
    old: Reference, weights: str, pair: ModelPair, data: Mapping[str, object]
) -> tuple[str, ...]:
    """Returns a caveat if nothing shows that a checkpoint predicts what it predicted once.

    Raises:
        ConfigurationError: more than a few samples are right that were wrong when the checkpoint,
            whose weights have the hash `weights`, was accepted, or the reverse. `data` are the
            identities of the splits (`Provenance.data`).
    """
    if not isinstance(old, OldModel) or not isinstance(old.model, (str, Path)):
        return ()
    was_right = _right_once(old.model, weights, pair, data)
    n_unknown = len(pair.before) - len(was_right)
    n_changed = 0
    for sample, is_right in zip(pair.before.samples, pair.before.right.tolist(), strict=True):
        n_changed += was_right.get(sample, is_right) != is_right
    if n_changed > 1 + MOST_BORDERLINE * len(was_right):
        raise ConfigurationError(
            f"`reference`: {n_changed:,} samples are right or wrong that were not when its "
            "checkpoint was accepted, so the code has changed.",
            HINT,
        )
    if not n_unknown:
        return ()
    return (
        f"The new code ran the old model; for {n_unknown:,} samples nothing shows that it predicts "
        f"what it predicted when it was accepted. To be sure, {HINT}",
    )


def _right_once(
    path: str | Path, weights: str, pair: ModelPair, data: Mapping[str, object]
) -> dict[tuple[str, int], bool]:
    """Returns by sample if it was right when a checkpoint was accepted, where this is known.

    A repair writes its report into the checkpoint, a release writes predictions beside it.
    """
    samples = pair.before.samples
    was_right: dict[tuple[str, int], bool] = {}
    for report in reports_in(load_mapping("reference", path, HINT)):
        if report.hashes is None or report.hashes.model_after != weights:
            continue
        for split in report.splits:
            is_same = report.provenance.data.get(split.split) == data.get(split.split, "no data")
            if is_same and split.split not in report.leaked:  # leaked samples are not counted
                wrong = {*split.failed_ids, *split.broken_ids} - {*split.repaired_ids}
                was_right |= {
                    sample: sample[1] not in wrong for sample in samples if sample[0] == split.split
                }
    if predictions_beside(path).is_file():
        record = Predictions.read(predictions_beside(path))
        for sample, key in zip(samples, pair.keys, strict=False):
            if key and record.keys.get(sample) == key and record.weights == weights:
                split_name, at = sample
                was_right[sample] = bool(record.splits[split_name][at][1])
    return was_right


def reports_in(checkpoint: Mapping[str, Any]) -> Iterator[RepairReport]:
    """Yields the reports of repairs in a checkpoint."""
    states = checkpoint.get("callbacks")
    if not isinstance(states, Mapping):
        return
    for key, state in states.items():
        is_repair = str(key).startswith("RegressionFreeRepair") and isinstance(state, Mapping)
        if is_repair and isinstance(state.get("report"), str):
            yield RepairReport.from_json(state["report"])
