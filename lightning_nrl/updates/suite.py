"""`RegressionSuite`: samples that must stay right, in a CSV file that grows."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from typing_extensions import Self

from lightning_nrl._utils.atomic_files import write_text
from lightning_nrl.errors import ConfigurationError, visible
from lightning_nrl.evaluation.sample_options import SampleOptions
from lightning_nrl.report import RepairReport
from lightning_nrl.updates.model_pair import ModelPair
from lightning_nrl.updates.predictions import read_csv

NEEDED_COLUMNS = ("split", "id")
OPTIONAL_COLUMNS = ("label", "since", "reason", "key")


class SuiteSample(NamedTuple):
    """An entry of a suite, without the split and the id of its sample."""

    label: int | None = None
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
        hint = f"add some: `lightning-nrl suite add {suite.path} --sample test:3 --reason WHY`."
        if not Path(suite.path).exists():
            if may_be_new:
                return cls(suite.path, suite.grow)
            raise ConfigurationError(f"`suite={str(suite.path)!r}` does not exist.", hint)
        samples = {}
        for line in read_csv("suite", suite.path, NEEDED_COLUMNS, OPTIONAL_COLUMNS):
            label = line.whole_number("label") if line.values["label"] else None
            since, reason, key = (line.values[name] for name in ("since", "reason", "key"))
            samples[line.sample] = SuiteSample(label, since, reason, key)
        if not samples and not may_be_new:
            raise ConfigurationError(
                f"`suite={str(suite.path)!r}` holds no sample, so it would protect nothing.",
                hint,
            )
        return cls(suite.path, suite.grow, samples)

    def added(self, new: Samples) -> Self:
        """Returns the suite with further samples. A sample that has a day keeps its line."""
        samples = dict(self.samples)
        for sample, entry in new.items():
            if not samples.get(sample, SuiteSample()).since:
                samples[sample] = entry
        return type(self)(self.path, self.grow, samples)

    def save(self) -> None:
        """Writes the file atomically, with sorted lines."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*NEEDED_COLUMNS, *OPTIONAL_COLUMNS])
        for (split, at), entry in sorted(self.samples.items()):
            label = "" if entry.label is None else entry.label
            reason = visible(entry.reason).replace("\n", " ")
            writer.writerow([split, at, label, entry.since, reason, entry.key])
        write_text(self.path, text.getvalue())

    def grow_by(self, new: Samples) -> None:
        """Adds samples to the file, which may have changed since it was read."""
        if self.grow and new:
            self.read(self, may_be_new=True).added(new).save()


def protecting(samples: SampleOptions, suite: RegressionSuite | None) -> SampleOptions:
    """Returns the options of a repair that breaks no sample of a suite.

    Raises a `ConfigurationError` if the options protect other samples.
    """
    if suite is None or not suite.samples:
        return samples
    if samples.protected is not None:
        raise ConfigurationError(
            "`suite` and `SampleOptions.protected` both protect samples.",
            f"add the protected samples to {suite.path}, and leave `protected` out.",
        )
    ids = defaultdict(list)
    for split, at in suite.samples:
        ids[split].append(at)
    return replace(samples, protected=dict(ids))


def unprotected_splits(suite: RegressionSuite, report: RepairReport) -> list[str]:
    """Returns the splits of a suite whose samples a repair could not protect."""
    protected = {split.split for split in report.splits if split.role != "unseen"}
    return sorted({split for split, _ in suite.samples} - protected)


def repaired_samples(report: RepairReport) -> Samples:
    """Returns the repaired targets among the known data of an accepted repair."""
    samples = {}
    day = report.provenance.created.partition(" ")[0]  # without the time
    reason = f"repaired on {day} by `{report.target}`"
    for split in report.splits:
        if report.status == "repaired" and split.role != "unseen":
            for flip in split.flipped:
                if flip.flip == "repaired" and flip.in_target:
                    label = flip.label if flip.label >= 0 else None
                    samples[split.split, flip.id] = SuiteSample(label, day, reason)
    return samples


def released_samples(pair: ModelPair, day: str, name: str) -> Samples:
    """Returns samples that an accepted release repairs or breaks; the latter have no day."""
    samples = {}
    flipped = pair.flips.repaired | pair.flips.broken
    identities = list(pair.after.samples)
    for row in flipped.nonzero().flatten().tolist():
        label = int(pair.after.label[row])
        verb, since = "repaired", day
        if pair.flips.broken[row]:
            verb, since = "broke", ""
        samples[identities[row]] = SuiteSample(
            label if label >= 0 else None,
            since,
            f"{verb} in the release of {day} ({name})",
            pair.keys[row] if pair.keys else "",
        )
    return samples
