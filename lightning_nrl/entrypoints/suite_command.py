"""The command `lightning-nrl suite`: adds samples to a suite, lists it, or checks a model by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.records.provenance import today
from lightning_nrl.report import RepairReport
from lightning_nrl.updates import Predictions, ProtectedIntact
from lightning_nrl.updates.model_pair import pair_from_files
from lightning_nrl.updates.suite import RegressionSuite, SuiteSample, repaired_samples

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
    kept = RegressionSuite.read(suite, may_be_new=action == "add")
    if action == "add":
        new = dict(_samples_to_add(report, samples, reason))
        if not new:
            hint = "write `--sample test:3 --reason WHY`, or `--report report.json` of a repair."
            raise ConfigurationError("there is no sample to add.", hint)
        kept.grow_by(new)
        for split, at in new.keys() & kept.samples.keys():
            print(f"{split} {at} is there already: {kept.samples[split, at].reason}")
        print(f"{suite}: {len(kept.samples)} samples, {len(kept.added(new).samples)} now.")
        return 0
    if action == "list":
        for (split, at), entry in sorted(kept.samples.items()):
            print(f"{split} {at}: {entry.reason or 'no reason'} ({entry.since or 'once right'})")
        return 0
    if predictions is None:
        hint = f"lightning-nrl suite check {suite} --predictions predictions.csv"
        raise ConfigurationError("`predictions` of the model to check are not given.", hint)
    answers = Predictions.read(predictions, "predictions")
    result = ProtectedIntact(kept).check(pair_from_files(answers, answers))
    print(f"{result.verdict}: {result.reason}")
    return int(not result.passed)


def _samples_to_add(
    report: str | None, samples: Sequence[str], reason: str | None
) -> Iterator[tuple[tuple[str, int], SuiteSample]]:
    if report is not None:
        repaired = RepairReport.from_json(Path(report).read_text(encoding="utf-8"))
        yield from repaired_samples(repaired).items()
    if samples and not reason:
        raise ConfigurationError("`reason` is empty.", "say why: `--reason 'incident 12'`.")
    for sample in samples:
        split, _, at = sample.rpartition(":")
        if not split or not at.isdecimal():
            raise ConfigurationError(
                f"`sample={sample!r}` is no sample.", "write `--sample test:3`."
            )
        yield (split, int(at)), SuiteSample(since=today(), reason=reason or "")
