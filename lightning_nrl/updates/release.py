"""`release` judges whether a new model may replace the old one; `ReleaseReport` says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from lightning_nrl._utils.json_records import Derives
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.data.batch import Source
from lightning_nrl.data.columns import find_column
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.rates import UPDATE_RATES, Rate
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.evaluation.slices import Slices
from lightning_nrl.report._formatting import list_ids, percent, relative_to_cwd
from lightning_nrl.report.html import Report
from lightning_nrl.report.page import Block, FactList, Heading, Page, Row, Table, Text
from lightning_nrl.report.provenance import Provenance
from lightning_nrl.report.stats import Bound, p_worse, percent_up, show_confidence
from lightning_nrl.updates.model_pair import ModelPair, evaluate_pair
from lightning_nrl.updates.old_model import OldModel, Reference, parse_reference
from lightning_nrl.updates.predictions import Predictions
from lightning_nrl.updates.rule_parsing import Require, parse_rules
from lightning_nrl.updates.rules import Finding, MaxNegativeFlipRate, Rule


def release(
    new: nn.Module | Evaluator,
    old: Any,
    data: Source | Sequence[Source],
    rules: str | Rule | Sequence[str | Rule] = "instance",
    *,
    require: Require = "not-worse",
    slices: str | int | Slices | None = None,
    seeds: Mapping[str, int] | None = None,
) -> ReleaseReport:
    """Judges whether a new model may replace the old one, by one pass of each over the data.

    The data are read batch by batch, so they may be larger than memory: a few numbers a sample are kept. Both models
    and the random states are left as found. Of the report: `accepted`, `reasons`, `exit_status` for `sys.exit`.

    Args:
        new: the new model, on its device. An `Evaluator` says what else there is to say of it: the task, mixed
            precision, the ranks that share the data. Each rank gets the same report.
        old: the model in use: a module, the path of its checkpoint, a CSV file of its predictions, or an `OldModel`.
        data: the splits, such as a `TensorSource`. Where a rule promises something of data to come, nothing may have
            looked at them before.
        rules: what must hold, one or several: `instance`, `accuracy`, `tolerance:3`, `nfr:1%`, `slice-nfr:5%`,
            `slices`, `slices:count`, `protected:ids.csv`, with ` in SPLIT` behind it if it is for one split; or objects
            of `lightning_nrl.updates`.
        require: what each split must satisfy beside the rules: `not-worse`, no net loss; `better`, a gain that the sign
            test shows at 5 %; or `any`.
        slices: which slice each sample is in: a column of the raw batch by its key or place, a function of the batch
            that gives a name or a number for each sample, its address, or a `Target`, whose samples are the slice.
        seeds: what the data and the models depend on, to be noted in the report.

    Example:
        >>> import torch
        >>> from lightning_nrl import TensorSource
        >>> old, new = torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)
        >>> for model, bias in ((old, 0.0), (new, -1.5)):
        ...     _ = model.load_state_dict({"weight": torch.tensor([[0.0], [1.0]]), "bias": torch.tensor([0.0, bias])})
        >>> data = TensorSource(torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([0, 1, 1]), split="test")
        >>> report = release(new, old, data, "instance")
        >>> report.reasons[0]
        'instance: test: 1 of 3 that were right broke; the gate allows none (accuracy 100.00 %, now 66.67 %).'
        >>> report.exit_status, report.broken_ids
        (1, {'test': [1]})
    """
    check_kind("new", new, isinstance(new, (nn.Module, Evaluator)), "model", "new=model")
    sources = [data] if isinstance(data, Source) else data
    if not isinstance(sources, Sequence) or not sources or not all(isinstance(source, Source) for source in sources):
        raise ConfigurationError(
            f"`data`: found a {type(data).__name__}, not a list of sources.",
            "write `data=[TensorSource(inputs, targets, split='test')]`, or use the callback `ReleaseGate`.",
        )
    found, column = check_reference("old", old), None if slices is None else find_column("slices", slices)
    parsed = parse_rules(rules, require)
    return judge_pair(Evaluator.of(new), found, sources, parsed, slices=column, seeds=dict(seeds or {}))[1]


def judge_pair(
    new: Evaluator,
    old: Reference,
    data: Sequence[Source],
    rules: Sequence[Rule],
    *,
    slices: Slices | None,
    seeds: Mapping[str, int],
    name: str = "",
) -> tuple[ModelPair, ReleaseReport]:
    """As `release`, with what both models do on each sample; `name` is what the new model is called in the report."""
    for rule in rules:
        rule.check_data([source.split for source in data], slices is not None)
    targets = [target for rule in rules for target in rule.targets]
    pair = evaluate_pair(new, old, data, slices=slices, targets=targets)
    report = make_report(
        pair,
        rules,
        new=Identity(name or type(new.model).__name__, hash_tensors(new.model.state_dict())),
        old=_identity(old, new.model),
        task=str(new.task),
        precision=str(new.precision),
        seeds=seeds,
        provenance=Provenance.of(new.model, pair.after),
    )
    return pair, report


def check_reference(argument: str, old: Any) -> Reference:
    """Parses the old model; refuses None and what cannot be one."""
    found = parse_reference(old)
    if found is None:
        hint = "give a checkpoint, a module, a CSV file of predictions or an OldModel."
        raise ConfigurationError(f"`{argument}=None`: there is nothing to compare with.", hint)
    return found


def _identity(old: Reference, new: nn.Module) -> Identity:
    if isinstance(old, OldModel):
        name = type(old.model).__name__ if isinstance(old.model, (nn.Module, Mapping)) else str(old.model)
        return Identity(name, hash_tensors(old.weights(new)))
    if isinstance(old, Predictions):
        return Identity("predictions", old.weights or "")
    return Identity(type(old).__name__)


@dataclass(frozen=True)
class Identity:
    """Which model is meant: a class, or the path of a file, and the SHA-256 of its weights, see `hash_tensors`.

    It is empty if only predictions are known, not their weights.
    """

    name: str
    sha256: str = ""


@dataclass(frozen=True)
class ReleaseRow(Derives):
    """Counts of one split, or of one slice of it.

    Attributes:
        split: its name.
        slice: its name; empty for the whole split.
        counts: from the old model to the new one.
        upper: upper limit on the negative flip rate, in (0, 1], at the report's confidence; those of the slices of one
            split hold together.
        p_worse: the p-value of the one-sided sign test that more break than are repaired.
    """

    split: str
    slice: str
    counts: FlipCounts
    upper: float
    p_worse: float

    @property
    def numbers(self) -> dict[str, float]:
        """Every number by name: accuracies, and the metrics of `lightning_nrl.evaluation.metrics`."""
        rates = {rate.name: rate.of(self.counts) for rate in UPDATE_RATES}
        accuracies = {"accuracy_before": self.counts.accuracy_before, "accuracy_after": self.counts.accuracy_after}
        return {**accuracies, **rates}

    @property
    def derived(self) -> Mapping[str, object]:
        return self.numbers


@dataclass(frozen=True)
class ReleaseReport(Report):
    """The decision whether a new model may replace the old one. `rich.print(report)` shows it as a page.

    Attributes:
        status: `accepted` if every rule is satisfied, else `refused`.
        findings: what each rule says, in the order in which they were given.
        rows: each split, followed by its slices.
        broken_ids: data-set positions of all broken samples, by split.
        repaired_ids: likewise of the repaired ones.
        confidence: of the limits in the rows, in (0, 1).
        new: which model it is about.
        old: which one it is to replace.
        task: what right means, in words.
        precision: in which both were run.
        missing: how many samples the old model has predictions for and the new one none, by split. None may be missing
            unless the user allows it; with models, which see the same data, none ever is.
        seeds: what the run depends on, by name.
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
    task: str
    precision: str
    missing: Mapping[str, int] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        return self.status == "accepted"

    @property
    def exit_status(self) -> int:
        """For `sys.exit`: 0 if accepted, 1 if refused."""
        return 0 if self.accepted else 1

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it was refused, a sentence for each rule that is not satisfied; empty if it was accepted."""
        return tuple(f"{finding.rule}: {finding.reason}" for finding in self.findings if not finding.passed)

    @property
    def derived(self) -> Mapping[str, object]:
        return {"exit_status": self.exit_status}

    def page(self, full: bool = False) -> Page:
        rules = tuple((one.rule, f"{'' if one.passed else 'NOT '}satisfied: {one.reason}") for one in self.findings)
        blocks: list[Block] = [
            Heading(self.status.capitalize(), 1, "good" if self.accepted else "warn"),
            Text(_verdict(self)),
            Heading("Rules"),
            FactList(rules),
            Heading("From the old model to the new one"),
            _counts_table(self.rows, self.confidence),
            _rates_table(self.rows),
        ]
        objected = tuple(
            (f"{one.rule}: {split}", list_ids(ids, "the JSON"))
            for one in self.findings
            for split, ids in one.ids.items()
        )
        if objected:
            blocks += [Heading("Samples that the rules object to, by position in their data set"), FactList(objected)]
        return Page((*blocks, Heading("Decided on"), FactList(_facts(self, str if full else relative_to_cwd))))


def _verdict(report: ReleaseReport) -> str:
    failed = sum(not finding.passed for finding in report.findings)
    n = len(report.findings)
    left_out = f" {sum(report.missing.values()):,} samples were NOT compared." if report.missing else ""
    if failed:
        rules = f"{failed} of {n} rules {'is' if failed == 1 else 'are'} not satisfied"
        return f"The new model may not replace the old one: {rules}.{left_out}"
    which = f"all {n} rules are" if n > 1 else "the rule is"
    return f"The new model may replace the old one: {which} satisfied.{left_out}"


def _facts(report: ReleaseReport, shown: Callable[[str], str]) -> tuple[tuple[str, str], ...]:
    facts = [("new model", report.new.name), ("sha256 of its weights", report.new.sha256 or "not known")]
    facts += [("old model", report.old.name), ("sha256 of its weights", report.old.sha256 or "not known")]
    facts += [("right means", report.task), ("precision", report.precision)]
    facts += [(f"NOT compared: {split}", f"{n:,} samples") for split, n in report.missing.items()]
    facts += [(f"seed: {name}", str(seed)) for name, seed in report.seeds.items()]
    return (*facts, *((f"file: {kind}", shown(path)) for kind, path in report.files.items()))


def make_report(pair: ModelPair, rules: Sequence[Rule], **decided_on: Any) -> ReleaseReport:
    """Asks every rule, and writes down what was found; `decided_on` are further fields of the report.

    The confidence of the limits in the rows is that of the first `MaxNegativeFlipRate` among the rules, else 95 %.
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
        **decided_on,
    )


def _rows(pair: ModelPair, split: str, confidence: float) -> list[ReleaseRow]:
    whole = pair.flips.counts(pair.rows(split))
    slices = {name: pair.flips.counts(rows) for name, rows in pair.slices_of(split).items()}

    def row(name: str, counts: FlipCounts, level: float) -> ReleaseRow:
        upper = Bound.at_level(counts.broken, counts.n, level).upper
        return ReleaseRow(split, name, counts, upper, p_worse(counts.broken, counts.repaired))

    # The limits of the slices hold together (Bonferroni); an empty one has the limit 1 and needs no part of the level.
    level = 1 - confidence
    part = level / max(1, sum(counts.n > 0 for counts in slices.values()))
    return [row("", whole, level), *(row(name, counts, part) for name, counts in slices.items())]


def _label(row: ReleaseRow) -> str:
    return f"{row.split}, slice {row.slice}" if row.slice else row.split


def _counts_table(rows: Sequence[ReleaseRow], confidence: float) -> Table:
    names = ("samples", "accuracy", "accuracy", "broken", "repaired", "NFR at most", "p worse")
    kinds = ("", "old", "new", "", "", f"{show_confidence(confidence)} sure", "sign test")
    lines = []
    for row in rows:
        c = row.counts
        accuracies = percent(c.accuracy_before), percent(c.accuracy_after)
        counts = (f"{c.n:,}", *accuracies, f"{c.broken:,}", f"{c.repaired:,}")
        lines.append(Row(_label(row), (*counts, percent_up(row.upper), f"{row.p_worse:.2g}")))
    return Table(tuple(zip(names, kinds, strict=True)), tuple(lines))


def _rates_table(rows: Sequence[ReleaseRow]) -> Table:
    def cell(rate: Rate, row: ReleaseRow) -> str:
        value = rate.of(row.counts)
        if rate.short != "relative_nfr":
            return percent(value)
        return f"{value:.3g}" if math.isfinite(value) else "-"

    lines = (Row(_label(row), tuple(cell(rate, row) for rate in UPDATE_RATES)) for row in rows)
    return Table(tuple((rate.title, "") for rate in UPDATE_RATES), tuple(lines))
