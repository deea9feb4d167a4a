"""`release` decides if a new model may replace the old one, and explains the decision in a
`ReleaseReport`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from lightning_nrl._utils.formatting import list_ids, percent, relative_to_cwd
from lightning_nrl._utils.json_records import Derives
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.data.batch import Source
from lightning_nrl.data.columns import find_column
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.rates import UPDATE_RATES, Rate
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.evaluation.slices import Slices
from lightning_nrl.records.provenance import Provenance
from lightning_nrl.records.stats import Bound, p_worse, percent_up, show_confidence
from lightning_nrl.report.html import Report
from lightning_nrl.report.page import Block, FactList, Heading, Page, Row, Table, Text
from lightning_nrl.updates.model_pair import ModelPair, evaluate_pair
from lightning_nrl.updates.old_model import OldModel, Reference, parse_reference
from lightning_nrl.updates.predictions import Predictions
from lightning_nrl.updates.rule_parsing import Require, parse_rules
from lightning_nrl.updates.rules import MaxNegativeFlipRate, Rule, RuleResult


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
    """Decides if a new model may replace the old one, by one pass of each model over the data.

    Data are read batch by batch and need not fit in memory. Models and random states do not change.
    The report has the decision (`accepted`), the `reasons`, and an `exit_status` for `sys.exit`.

    Args:
        new: the new model, on its device. An `Evaluator` sets the task, the precision, and the
            ranks that share the data; each rank gets the same report.
        old: the model in use: a module, the path of its checkpoint, a CSV file of its predictions,
            or an `OldModel`.
        data: one source or a list of sources, such as a `TensorSource`; each is a split. The
            report's limits of flip rates hold for future data only if neither training nor the
            choice of a model used the split.
        rules: one or several rules: `protected:ids.csv`; rules of `lightning_nrl.updates`;
            `instance`, `accuracy`, `tolerance:3`, `nfr:1%`, `slice-nfr:5%`, `slices` or
            `slices:count`. The text of every rule but `protected` may end with ` in SPLIT`, which
            limits the rule to one split.
        require: a further rule for every split. `not-worse`: no more samples break than are
            repaired. `better`: more samples are repaired than break, by the sign test at 5 %.
            `any`: no further rule.
        slices: tells the slice of each sample: the key or position of a field of the raw batch; a
            function of the batch (or the function's address) that returns a name or number per
            sample; or a `Target`, which is one slice.
        seeds: seeds of data and models by name, copied to the report.

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
    if (
        not isinstance(sources, Sequence)
        or not sources
        or not all(isinstance(source, Source) for source in sources)
    ):
        raise ConfigurationError(
            f"`data`: found a {type(data).__name__}, not a list of sources.",
            "write `data=[TensorSource(inputs, targets, split='test')]`, or use the callback `ReleaseGate`.",
        )
    found, column = (
        check_reference("old", old),
        None if slices is None else find_column("slices", slices),
    )
    parsed = parse_rules(rules, require)
    return judge_pair(
        Evaluator.of(new), found, sources, parsed, slices=column, seeds=dict(seeds or {})
    )[1]


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
    """Does the work of `release` and returns the `ModelPair`, too. `name` is the new model's name
    in the report.
    """
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
    """Parses the old model. If it is None, raises a `ConfigurationError` that names `argument`."""
    found = parse_reference(old)
    if found is None:
        hint = "give a checkpoint, a module, a CSV file of predictions or an OldModel."
        raise ConfigurationError(f"`{argument}=None`: nothing to compare with.", hint)
    return found


def _identity(old: Reference, new: nn.Module) -> Identity:
    if isinstance(old, OldModel):
        name = (
            type(old.model).__name__
            if isinstance(old.model, (nn.Module, Mapping))
            else str(old.model)
        )
        return Identity(name, hash_tensors(old.weights(new)))
    if isinstance(old, Predictions):
        return Identity("predictions", old.weights or "")
    return Identity(type(old).__name__)


@dataclass(frozen=True)
class Identity:
    """Identity of a model: its class or file as `name`, and the SHA-256 of its weights
    (`hash_tensors`).
    """

    name: str
    sha256: str = ""  # empty if unknown


@dataclass(frozen=True)
class ReleaseRow(Derives):
    """Numbers of flips in one split or slice.

    Attributes:
        split: name of the split.
        slice: name of the slice; empty for the whole split.
        counts: flips from the old model to the new one.
        upper: upper limit of the negative flip rate, in (0, 1], at the report's confidence. With
            this confidence, the limits of all slices of a split hold at the same time.
        p_worse: p-value of the one-sided sign test; a small value means that the new model is
            worse.
    """

    split: str
    slice: str
    counts: FlipCounts
    upper: float
    p_worse: float

    @property
    def numbers(self) -> dict[str, float]:
        """Accuracies of the old and the new model and the rates in `UPDATE_RATES`, by name."""
        rates = {rate.name: rate.of(self.counts) for rate in UPDATE_RATES}
        accuracies = {
            "accuracy_before": self.counts.accuracy_before,
            "accuracy_after": self.counts.accuracy_after,
        }
        return {**accuracies, **rates}

    @property
    def derived(self) -> Mapping[str, object]:
        return self.numbers


@dataclass(frozen=True, repr=False)
class ReleaseReport(Report):
    """Decision whether a new model may replace the old one, with reasons. `rich.print(report)`
    shows
    it as a page.

    Attributes:
        status: `accepted` if every rule is satisfied, else `refused`.
        findings: one result for each rule, in the order of the rules.
        rows: one row for each split, followed by one for each of its slices.
        broken_ids: data-set positions of all broken samples, by split.
        repaired_ids: data-set positions of all repaired samples, by split.
        confidence: confidence of the limits in the rows, in (0, 1).
        new: the new model.
        old: the old model, which the new model would replace.
        task: the task, which defines when a sample is right, in words.
        precision: precision in which both models ran.
        missing: by split, the number of samples that were not compared, since only the old model
            predicts them.
        seeds: seeds of data and models by name.
        files: paths of the written files, by kind.
    """

    status: Literal["accepted", "refused"]
    findings: tuple[RuleResult, ...]
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

    def __repr__(self) -> str:
        return f"<ReleaseReport: {self.status}; {'; '.join(self.reasons) or 'all rules hold'}>"

    @property
    def exit_status(self) -> int:
        """Exit status for `sys.exit`: 0 if accepted, 1 if refused."""
        return 0 if self.accepted else 1

    @property
    def reasons(self) -> tuple[str, ...]:
        """A text for each rule that is not satisfied: the rule, a colon and the reason."""
        return tuple(
            f"{finding.rule}: {finding.reason}" for finding in self.findings if not finding.passed
        )

    @property
    def derived(self) -> Mapping[str, object]:
        return {"exit_status": self.exit_status}

    def page(self, full: bool = False) -> Page:
        rules = tuple(
            (one.rule, f"{'' if one.passed else 'NOT '}satisfied: {one.reason}")
            for one in self.findings
        )
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
            blocks += [
                Heading("Samples that the rules object to, by position in their data set"),
                FactList(objected),
            ]
        return Page(
            (
                *blocks,
                Heading("Decided on"),
                FactList(_facts(self, str if full else relative_to_cwd)),
            )
        )


def _verdict(report: ReleaseReport) -> str:
    failed = sum(not finding.passed for finding in report.findings)
    n = len(report.findings)
    left_out = (
        f" {sum(report.missing.values()):,} samples were NOT compared." if report.missing else ""
    )
    if failed:
        rules = f"{failed} of {n} rules {'is' if failed == 1 else 'are'} not satisfied"
        return f"The new model may not replace the old one: {rules}.{left_out}"
    which = f"all {n} rules are" if n > 1 else "the rule is"
    return f"The new model may replace the old one: {which} satisfied.{left_out}"


def _facts(report: ReleaseReport, shown: Callable[[str], str]) -> tuple[tuple[str, str], ...]:
    facts = [
        ("new model", report.new.name),
        ("sha256 of its weights", report.new.sha256 or "not known"),
    ]
    facts += [
        ("old model", report.old.name),
        ("sha256 of its weights", report.old.sha256 or "not known"),
    ]
    facts += [("right means", report.task), ("precision", report.precision)]
    facts += [(f"NOT compared: {split}", f"{n:,} samples") for split, n in report.missing.items()]
    facts += [(f"seed: {name}", str(seed)) for name, seed in report.seeds.items()]
    return (*facts, *((f"file: {kind}", shown(path)) for kind, path in report.files.items()))


def make_report(pair: ModelPair, rules: Sequence[Rule], **decided_on: Any) -> ReleaseReport:
    """Checks every rule and builds the report. `decided_on` are the report's other fields.

    The limits in the rows have the confidence of the first `MaxNegativeFlipRate` rule, or 95 %
    without such a rule.
    """
    findings = tuple(rule.check(pair) for rule in rules)
    confidence = next(
        (rule.confidence for rule in rules if isinstance(rule, MaxNegativeFlipRate)), 0.95
    )
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

    # All limits of slices hold together (Bonferroni). An empty slice has the limit 1 and does not
    # count.
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
