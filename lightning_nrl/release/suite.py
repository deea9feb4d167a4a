"""`RegressionSuite`: samples that must stay right, in a CSV file that grows."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from filelock import FileLock
from typing_extensions import Self

from lightning_nrl._utils.atomic_files import replacing
from lightning_nrl.errors import ConfigurationError, visible
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.evaluation.sample_options import SampleOptions
from lightning_nrl.release.model_pair import ModelPair
from lightning_nrl.report import RepairReport
from lightning_nrl.updates.predictions import Line, read_csv, refuse_samples

NEEDED_COLUMNS = ("split", "id")


class SuiteSample(NamedTuple):
    """An entry of a suite, without the split and the id of its sample: the other columns."""

    label: int = -1  # -1: unknown
    since: str = ""  # day from which the sample must be right; empty: once it is right
    reason: str = ""
    key: str = ""  # identifies the sample, as in files of predictions


Samples: TypeAlias = Mapping[tuple[str, int], SuiteSample]
"""Samples by split and id, the position in the data set."""


@dataclass(frozen=True)
class RegressionSuite:
    """Samples that must stay right, with the reason and the day since when.

    The CSV file has the columns `split`, `id`, `label`, `since`, `reason` and `key`; only the first
    two are needed. Its lines are sorted, one for each sample, so that version control shows what is
    new. A sample with a day must be right whatever the old model does. A sample without a day must
    not break.

    Attributes:
        path: the CSV file.
        grow: True if an accepted repair or release adds samples to the file.

    Example::

        RegressionFreeRepair(suite="suite.csv")
        ReleaseGate("old.ckpt", suite=RegressionSuite("suite.csv", grow=False))
    """

    path: str | Path
    grow: bool = True
    samples: Samples = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, suite: Self | str | Path, *, may_be_new: bool = False) -> Self:
        """Reads the file of a suite.

        With `may_be_new`, a file that does not exist is a suite without samples.

        Raises:
            ConfigurationError: a line cannot be read or repeats a sample, or there is no sample.
        """
        if isinstance(suite, (str, Path)):
            suite = cls(suite)
        samples = {}
        if Path(suite.path).exists():
            for line in read_csv("suite", suite.path, NEEDED_COLUMNS, SuiteSample._fields):
                samples[line.sample] = _entry(line)
        if not samples and not may_be_new:
            raise ConfigurationError(
                f"`suite={str(suite.path)!r}` does not exist, or holds no sample, so it would "
                "protect nothing.",
                f"add some: `lightning-nrl suite add {suite.path} --sample test:3 --reason WHY`.",
            )
        return replace(suite, samples=samples)

    def save(self) -> None:
        """Writes the file atomically, with sorted lines. Lines that ended with CRLF still do."""
        text = io.StringIO()
        path = Path(self.path)
        has_crlf = path.exists() and b"\r\n" in path.read_bytes()
        writer = csv.writer(text, lineterminator="\r\n" if has_crlf else "\n")
        writer.writerow([*NEEDED_COLUMNS, *SuiteSample._fields])
        for (split, at), entry in sorted(self.samples.items()):
            label = "" if entry.label < 0 else entry.label
            reason = visible(entry.reason).replace("\n", " ")
            writer.writerow([split, at, label, entry.since, reason, entry.key])
        replacing(path, lambda part: part.write_bytes(text.getvalue().encode()))

    def grow_by(self, new: Samples) -> Self:
        """Adds samples to the file, and returns all that it holds then.

        A sample that has a day keeps its line. Other processes wait.
        """
        if not (self.grow and new):
            return self
        with FileLock(f"{self.path}.lock"):
            samples = dict(self.read(self, may_be_new=True).samples)  # others may have added some
            for sample, entry in new.items():
                old = samples.get(sample, SuiteSample())
                if not old.since:
                    samples[sample] = entry._replace(
                        label=max(entry.label, old.label),  # they are equal, or one is unknown
                        key=entry.key or old.key,
                    )
            grown = replace(self, samples=samples)
            grown.save()
        return grown

    @property
    def splits(self) -> set[str]:
        return {split for split, _ in self.samples}

    def __str__(self) -> str:
        return str(self.path)


def _entry(line: Line) -> SuiteSample:
    label = line.whole_number("label") if line.values["label"] else -1
    since = line.values["since"]
    try:
        date.fromisoformat(since or "2026-12-01")
    except ValueError as error:
        raise line.error(f"`since` is {since[:40]!r}, not a day such as 2026-12-01") from error
    return SuiteSample(label, since, line.values["reason"], line.values["key"])


def rows_of(
    argument: str, samples: Samples, results: SampleResults, keys: Sequence[str]
) -> list[int]:
    """Returns the row of each sample in results. `keys` are those of all rows, if known.

    Raises:
        ConfigurationError: a sample is missing, or has another key or label.
    """
    row_of = {sample: row for row, sample in enumerate(results.samples)}
    missing = sorted(samples.keys() - row_of.keys())
    if missing:
        raise ConfigurationError(
            f"`{argument}`: {len(missing):,} protected samples are not in the data "
            f"({', '.join(f'{split} {at}' for split, at in missing[:5])}).",
            "give positions in the data set; missing samples cannot be checked.",
        )
    labels = results.label.tolist()
    is_changed = torch.zeros_like(results.passed)
    for sample, entry in samples.items():
        row = row_of[sample]
        key = keys[row] if keys else ""
        # Two known values that differ, and the unknown one.
        if len({entry.label, labels[row], -1}) == 3 or len({entry.key, key, ""}) == 3:
            is_changed[row] = True
    refuse_samples(
        results, is_changed, "have another label or key than in the suite", argument=argument
    )
    return [row_of[sample] for sample in samples]


def protecting(samples: SampleOptions, suite: RegressionSuite) -> SampleOptions:
    """Returns the options of a repair that breaks no sample of a suite.

    Raises a `ConfigurationError` if the options protect other samples.
    """
    if samples.protected is not None:
        raise ConfigurationError(
            "`suite` and `SampleOptions.protected` both protect samples.",
            f"add the protected samples to {suite.path}, and leave `protected` out.",
        )
    ids = defaultdict(list)
    for split, at in suite.samples:
        ids[split].append(at)
    return replace(samples, protected=dict(ids) or None)


def repaired_samples(report: RepairReport) -> Samples:
    """Returns the repaired targets among the known data of an accepted repair."""
    samples = {}
    day = report.provenance.created.partition(" ")[0]  # without the time
    reason = f"repaired on {day} by `{report.target}`"
    for split in report.splits:
        if report.status == "repaired" and split.role == "known":
            targeted = set(split.targeted_ids)
            for flip in split.flipped_as("repaired"):
                if flip.id in targeted:
                    samples[split.split, flip.id] = SuiteSample(flip.label, day, reason)
    return samples


def released_samples(pair: ModelPair, day: str, name: str) -> Samples:
    """Returns samples that an accepted release repairs or breaks; the latter have no day."""
    samples = {}
    flipped = pair.flips.repaired | pair.flips.broken
    identities = pair.after.samples
    for row in flipped.nonzero().flatten().tolist():
        verb, since = "repaired", day
        if pair.flips.broken[row]:
            verb, since = "broke", ""
        samples[identities[row]] = SuiteSample(
            int(pair.after.label[row]),
            since,
            f"{verb} in the release of {day} ({name})",
            pair.keys[row],
        )
    return samples
