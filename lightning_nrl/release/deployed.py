"""`recount`, which says if a repair's promise holds for the deployed model."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.gate import Gate, GateDecision, judge
from lightning_nrl.records.repair_record import RepairRecord
from lightning_nrl.updates.predictions import Predictions


def recount(report: RepairRecord, predictions: Predictions) -> GateDecision:
    """Judges the deployed model, such as after quantisation or export, by the gate of a repair.

    A gate for the target counts all samples, since predictions do not tell the target.

    Args:
        report: the report of the repair.
        predictions: the deployed model's predictions of all known samples, with `passed`.

    Raises:
        ConfigurationError: a known sample has no prediction, or the report does not say which
            samples were wrong before the repair.
    """
    if report.settings.get("keep") == "reference" or report.settings.get("protected"):
        raise ConfigurationError(
            "`report`: its repair had protected samples or kept those of a reference, and a report "
            "does not name them.",
            "count the predictions by `lightning-nrl release`.",
        )
    known = [split for split in report.splits if split.role == "known"]
    for split in known:
        n = len(predictions.splits.get(split.split, {}))
        if n != split.n or len(split.failed_ids) != split.repaired + split.failing:
            raise ConfigurationError(
                f"`predictions` have {n:,} samples of `{split.split}`, the report {split.n:,}, and "
                f"names {len(split.failed_ids):,} of these as wrong before.",
                "predict each known sample once with the deployed model, and give report.json.",
            )
    after = predictions.alone().only([split.split for split in known])
    wrong = {(split.split, at) for split in known for at in split.failed_ids}
    targets = {(split.split, at) for split in known for at in split.targeted_ids}
    before = replace(
        after,
        passed=torch.tensor([sample not in wrong for sample in after.samples]),
        targeted=torch.tensor([sample in targets for sample in after.samples]),
        in_target=torch.ones_like(after.passed),
    )
    return judge(before, after, Gate.parse(report.gate))
