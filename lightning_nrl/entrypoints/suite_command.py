"""The command `lightning-nrl suite`: adds samples to a suite, lists it, or checks a model by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.records.provenance import today
from lightning_nrl.release.model_pair import pair_from_files
from lightning_nrl.release.suite import (
    RegressionSuite,
    Samples,
    SuiteSample,
    repaired_samples,
    rows_of,
)
from lightning_nrl.report import RepairReport
from lightning_nrl.updates import Predictions

SUITE: Mapping[str, Mapping[str, Any]] = {
    "action": {"choices": ("add", "list", "check")},
    "suite": {"help": "CSV file with the columns split,id,label,since,reason,key"},
    "--report": {"help": "add: report.json of a repair, whose repaired targets are added"},
    "--sample": {
        "action": "append",
        "default": [],
        "dest": "samples",
        "metavar": "SPLIT:ID",
        "help": "add: a sample by its split and its position in the data set",
    },
    "--reason": {"help": "add: why these samples must be right"},
    "--predictions": {"help": "check: predictions of a model, CSV"},
}


def run_suite(
    action: str,
    suite: str,
    report: str | None,
    samples: list[str],
    reason: str | None,
    predictions: str | None,
) -> int:
    """Adds samples to a suite, lists it, or checks the predictions of a model.

    Returns 1 if the predictions are wrong for a sample of the suite, else 0.
    """
    if action == "add":
        new = _samples_to_add(report, samples, reason)
        if not new:
            raise ConfigurationError(
                "there is no sample to add.",
                "write `--sample test:3 --reason WHY`, or `--report report.json` of a repair.",
            )
        kept = RegressionSuite(suite).grow_by(new).samples
        _show(new, kept)
        print(f"{suite}: {len(kept):,} samples.")
        return 0
    kept = RegressionSuite.read(suite).samples
    if action == "list":
        _show(sorted(kept), kept)
        return 0
    if predictions is None:
        raise ConfigurationError(
            "`predictions` of the model to check are not given.",
            f"lightning-nrl suite check {suite} --predictions predictions.csv",
        )
    answers = Predictions.read(predictions, "predictions")
    pair = pair_from_files(answers, answers)
    rows = rows_of("suite", kept, pair.after, pair.keys)
    wrong = [sample for sample, row in zip(kept, rows, strict=True) if not pair.after.passed[row]]
    print(f"{len(wrong):,} of {len(kept):,} samples are wrong.")
    _show(wrong, kept)
    return int(bool(wrong))


def _show(samples: Iterable[tuple[str, int]], kept: Samples) -> None:
    for split, at in samples:
        entry = kept[split, at]
        print(f"{split} {at}: {entry.reason or 'no reason'} ({entry.since or 'once right'})")


def _samples_to_add(report: str | None, samples: Sequence[str], reason: str | None) -> Samples:
    new = {}
    if report is not None:
        repaired = RepairReport.from_json(Path(report).read_text(encoding="utf-8"))
        for target, entry in repaired_samples(repaired).items():
            new[target] = entry._replace(reason=reason or entry.reason)
    if samples and not reason:
        raise ConfigurationError("`reason` is empty.", "say why: `--reason 'incident 12'`.")
    for sample in samples:
        split, _, at = sample.rpartition(":")
        if not split or not at.isdecimal():
            raise ConfigurationError(
                f"`sample={sample!r}` is no sample.", "write `--sample test:3`."
            )
        new[split, int(at)] = SuiteSample(since=today(), reason=reason or "")
    return new
