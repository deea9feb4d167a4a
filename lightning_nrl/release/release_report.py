"""The account of a release decision: the verdict, what each rule says, every number, and what it was decided on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from lightning_nrl._utils.serialize import dumps, plain
from lightning_nrl.evaluation.flips import FlipCounts
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.metrics.functional import flip_rates
from lightning_nrl.release.model_pair import ModelPair
from lightning_nrl.release.rules import Finding, MaxNegativeFlipRate, Rule, sign_test
from lightning_nrl.report.document import Block, Facts, Heading, Page, Row, Shown, Table, Text
from lightning_nrl.report.repair_report import installed_versions
from lightning_nrl.report.tables import MOST_IDS, from_here, percent
from lightning_nrl.stats import Bound, SliceBounds
from lightning_nrl.stats.binomial import percent_up, show_confidence

__all__ = ["Identity", "ReleaseReport", "ReleaseRow", "hash_samples", "make_report"]

RATES = {
    "negative_flip_rate": "NFR",
    "positive_flip_rate": "PFR",
    "relative_negative_flip_rate": "relative NFR",
    "backward_trust_compatibility": "BTC",
    "backward_error_compatibility": "BEC",
}


@dataclass(frozen=True)
class Identity:
    """Which model is meant.

    Attributes:
        name: what it was given as: a class, or the path of a file.
        sha256: of its weights, see `hash_tensors`; empty where only predictions are known, and not of which weights.
    """

    name: str
    sha256: str = ""


@dataclass(frozen=True)
class ReleaseRow:
    """What became of the samples of one split, or of one slice of it.

    Attributes:
        split: its name.
        slice: its name; empty for the whole split.
        counts: from the old model to the new one.
        upper: upper limit on the negative flip rate, in (0, 1], at the report's confidence; those of the slices of one
            split hold together.
        p_worse: the probability that chance alone breaks so many of the samples that changed (`sign_test`).
    """

    split: str
    slice: str
    counts: FlipCounts
    upper: float
    p_worse: float

    @property
    def accuracy_before(self) -> float:
        """Share of samples that the old model gets right; NaN without samples."""
        return self.counts.passed / self.counts.n if self.counts.n else math.nan

    @property
    def accuracy_after(self) -> float:
        """Share of samples that the new model gets right; NaN without samples."""
        return self.counts.right / self.counts.n if self.counts.n else math.nan

    @property
    def numbers(self) -> dict[str, float]:
        """Every number by name: accuracies, and the metrics of `lightning_nrl.metrics`."""
        c = self.counts
        rates = flip_rates(torch.tensor([c.kept, c.broken, c.repaired, c.failing], dtype=torch.float64))
        chosen = {name: float(rates[name]) for name in RATES}
        return {"accuracy_before": self.accuracy_before, "accuracy_after": self.accuracy_after, **chosen}


@dataclass(frozen=True)
class ReleaseReport(Shown):
    """Whether a new model may replace the old one, and on what grounds. `rich.print(report)` shows it as a page.

    Attributes:
        status: `accepted` if every rule is satisfied, else `refused`.
        findings: what each rule says, in the order in which they were given.
        rows: each split, followed by its slices.
        broken_ids: data-set positions of all broken samples, by split.
        repaired_ids: likewise of the repaired ones.
        confidence: of the limits in the rows, in (0, 1).
        new: which model it is about.
        old: which one it is to replace.
        samples: SHA-256 of each split's sample ids and labels.
        task: what right means, in words.
        precision: in which both were run.
        missing: how many samples the old model has predictions for and the new one none, by split. None may be missing
            unless the user allows it; with models, which see the same data, none ever is.
        seeds: what the run depends on, by name.
        versions: versions of the software by name.
        files: paths of what was written, by kind.
    """

    status: Literal["accepted", "refused"]
    findings: tuple[Finding, ...]
    rows: tuple[ReleaseRow, ...]
    broken_ids: Mapping[str, Sequence[int]]
    repaired_ids: Mapping[str, Sequence[int]]
    confidence: float
    new: Identity
    old: Identity
    samples: Mapping[str, str]
    task: str
    precision: str
    missing: Mapping[str, int] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Whether every rule is satisfied."""
        return self.status == "accepted"

    @property
    def exit_status(self) -> int:
        """For `sys.exit`: 0 if accepted, 1 if refused."""
        return 0 if self.accepted else 1

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it was refused, a sentence for each rule that is not satisfied; empty if it was accepted."""
        return tuple(f"{finding.rule}: {finding.reason}" for finding in self.findings if not finding.passed)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, text and numbers; a row also gets the numbers that follow from its counts."""
        own = plain(self)
        for row, data in zip(self.rows, own["rows"], strict=True):
            data.update(row.numbers)
        return {**own, "exit_status": self.exit_status}

    def to_json(self) -> str:
        """Strict JSON: a number that is not finite is null."""
        return dumps(self.to_dict()) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ReleaseReport:
        """Reads what `to_json` gives."""
        data = json.loads(text)
        own = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        own["findings"] = tuple(Finding(**finding) for finding in own["findings"])
        own["rows"] = tuple(
            ReleaseRow(row["split"], row["slice"], FlipCounts(**row["counts"]), row["upper"], row["p_worse"])
            for row in own["rows"]
        )
        return cls(**{**own, "new": Identity(**own["new"]), "old": Identity(**own["old"])})

    def to_table(self) -> Page:
        """The verdict, the rules, the numbers of every split and slice, the samples, and what it was decided on."""
        return self._page(from_here)

    def to_markdown(self) -> str:
        """The same as Markdown, with whole paths."""
        return self._page(str).markdown()

    def _page(self, shown: Callable[[str], str]) -> Page:
        rules = tuple(
            Row(finding.rule, ("satisfied" if finding.passed else "NOT satisfied", finding.reason))
            for finding in self.findings
        )
        blocks: list[Block] = [
            Heading(self.status.capitalize(), 1, "good" if self.accepted else "warn"),
            Text(self._sentence()),
            Heading("Rules"),
            Facts(tuple((row.label, ": ".join(row.cells)) for row in rules)),
            Heading("From the old model to the new one"),
            _counts_table(self.rows, self.confidence),
            _rates_table(self.rows),
        ]
        if self.findings_ids:
            blocks += [Heading("Samples that the rules object to, by position in their data set"), self.findings_ids]
        return Page((*blocks, Heading("Decided on"), Facts(self._facts(shown))))

    @property
    def findings_ids(self) -> Facts | None:
        """The samples that rules object to, the first few."""
        facts = [
            (f"{finding.rule}: {split}", _listed(ids))
            for finding in self.findings
            for split, ids in finding.ids.items()
        ]
        return Facts(tuple(facts)) if facts else None

    def _sentence(self) -> str:
        failed = sum(not finding.passed for finding in self.findings)
        n = len(self.findings)
        left_out = f" {sum(self.missing.values()):,} samples were NOT compared." if self.missing else ""
        if failed:
            rules = f"{failed} of {n} rules {_is(failed)} not satisfied"
            return f"The new model may not replace the old one: {rules}.{left_out}"
        which = f"all {n} rules are" if n > 1 else "the rule is"
        return f"The new model may replace the old one: {which} satisfied.{left_out}"

    def _facts(self, shown: Callable[[str], str]) -> tuple[tuple[str, str], ...]:
        facts = [("new model", self.new.name), ("sha256 of its weights", self.new.sha256 or "not known")]
        facts += [("old model", self.old.name), ("sha256 of its weights", self.old.sha256 or "not known")]
        facts += [(f"sha256 of ids and labels: {split}", found) for split, found in self.samples.items()]
        facts += [("right means", self.task), ("precision", self.precision)]
        facts += [(f"NOT compared: {split}", f"{n:,} samples") for split, n in self.missing.items()]
        facts += [(f"seed: {name}", str(seed)) for name, seed in self.seeds.items()]
        facts += list(self.versions.items())
        return (*facts, *((f"file: {kind}", shown(path)) for kind, path in self.files.items()))


def make_report(
    pair: ModelPair,
    rules: Sequence[Rule],
    *,
    new: Identity,
    old: Identity,
    task: str,
    precision: str,
    seeds: Mapping[str, int],
    missing: Mapping[str, int] | None = None,
) -> ReleaseReport:
    """Asks every rule, and writes down what was found.

    The confidence of the limits in the rows is that of the first `MaxNegativeFlipRate` among the rules, else 95 %.

    Raises:
        ConfigurationError: a rule asks for what the data do not have.
    """
    findings = tuple(rule.check(pair) for rule in rules)
    confidence = next((rule.confidence for rule in rules if isinstance(rule, MaxNegativeFlipRate)), 0.95)
    return ReleaseReport(
        status="accepted" if all(finding.passed for finding in findings) else "refused",
        findings=findings,
        rows=tuple(row for split in pair.splits for row in _rows(pair, split, confidence)),
        broken_ids=pair.after.ids(pair.flips.broken),
        repaired_ids=pair.after.ids(pair.flips.repaired),
        confidence=confidence,
        new=new,
        old=old,
        samples={split: hash_samples(pair.after, split) for split in pair.splits},
        task=task,
        precision=precision,
        missing=dict(missing or {}),
        seeds=dict(seeds),
    )


def hash_samples(evidence: SampleResults, split: str) -> str:
    """SHA-256 of a split's sample ids and labels, in order: another data set of the same size has another one."""
    rows = evidence.of(split)
    table = torch.stack([evidence.index[rows], evidence.label[rows]], 1).cpu()
    return hashlib.sha256(table.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _rows(pair: ModelPair, split: str, confidence: float) -> list[ReleaseRow]:
    whole = pair.flips.counts(pair.rows(split))
    slices = {name: pair.flips.counts(rows) for name, rows in pair.slices_of(split).items()}
    bounds = SliceBounds.of(
        {name: counts.broken for name, counts in slices.items()},
        {name: counts.n for name, counts in slices.items()},
        confidence,
    )
    upper = Bound.of(whole.broken, whole.n, confidence).upper
    return [
        ReleaseRow(split, "", whole, upper, sign_test(whole.broken, whole.repaired)),
        *(
            ReleaseRow(split, name, counts, bounds[name].upper, sign_test(counts.broken, counts.repaired))
            for name, counts in slices.items()
        ),
    ]


def _label(row: ReleaseRow) -> str:
    return f"{row.split}, slice {row.slice}" if row.slice else row.split


def _counts_table(rows: Sequence[ReleaseRow], confidence: float) -> Table:
    columns = (
        ("samples", ""),
        ("accuracy", "old"),
        ("accuracy", "new"),
        ("broken", ""),
        ("repaired", ""),
        ("NFR at most", f"{show_confidence(confidence)} sure"),
        ("p worse", "sign test"),
    )
    lines = [
        Row(
            _label(row),
            (
                f"{row.counts.n:,}",
                percent(row.accuracy_before),
                percent(row.accuracy_after),
                f"{row.counts.broken:,}",
                f"{row.counts.repaired:,}",
                percent_up(row.upper),
                f"{row.p_worse:.2g}",
            ),
        )
        for row in rows
    ]
    return Table(columns, tuple(lines))


def _rates_table(rows: Sequence[ReleaseRow]) -> Table:
    def cells(row: ReleaseRow) -> tuple[str, ...]:
        numbers = row.numbers
        relative = numbers["relative_negative_flip_rate"]
        shown = {name: percent(numbers[name]) for name in RATES}
        shown["relative_negative_flip_rate"] = f"{relative:.3g}" if math.isfinite(relative) else "-"
        return tuple(shown.values())

    return Table(tuple((name, "") for name in RATES.values()), tuple(Row(_label(row), cells(row)) for row in rows))


def _listed(ids: Sequence[int]) -> str:
    more = f" ... all {len(ids):,} in the JSON" if ids[MOST_IDS:] else ""
    return ", ".join(map(str, ids[:MOST_IDS])) + more


def _is(n: int) -> str:
    return "is" if n == 1 else "are"
