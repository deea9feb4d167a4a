"""`release` decides if a new model may replace the old one, and explains it in a report."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from lightning_nrl._utils.formatting import list_ids, percent, relative_to_cwd, titled
from lightning_nrl._utils.json_records import OPTIONAL, Derives
from lightning_nrl._utils.preserve import outside_inference_mode
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.data.batch import Source
from lightning_nrl.data.columns import Column, find_column
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError, check_choice, check_kind
from lightning_nrl.evaluation import Evaluator, FlipCounts, Flips
from lightning_nrl.evaluation.rates import UPDATE_RATES
from lightning_nrl.evaluation.slices import Slices
from lightning_nrl.evaluation.stats import Bound, p_worse, percent_up, show_confidence
from lightning_nrl.records.provenance import Provenance
from lightning_nrl.release.accepted import check_accepted
from lightning_nrl.release.model_pair import ModelPair, check_missing, evaluate_pieces
from lightning_nrl.release.protected import ProtectedIntact
from lightning_nrl.release.rule_parsing import Require, parse_rules
from lightning_nrl.release.rules import Rule, RuleResult, limited_to
from lightning_nrl.release.statistical_rules import MaxNegativeFlipRate
from lightning_nrl.release.suite import RegressionSuite
from lightning_nrl.release.traits import common_traits
from lightning_nrl.report.html import Report
from lightning_nrl.report.page import Block, FactList, Heading, Page, Row, Table, Text, Tone
from lightning_nrl.updates.old_model import OldModel, Reference, in_memory, parse_reference
from lightning_nrl.updates.predictions import Predictions

Status = Literal["accepted", "refused", "undecided"]
OnUndecided = Literal["refuse", "accept"]
ACTIONS: Mapping[OnUndecided, Status] = {
    "accept": "accepted",
    "refuse": "refused",
}
EXIT_STATUS = {"accepted": 0, "refused": 1, "undecided": 3}  # 2 is for errors


def release(
    old: Any,
    new: nn.Module | Evaluator,
    data: Source | Sequence[Source],
    rules: str | Rule | Sequence[str | Rule] = "instance",
    *,
    require: Require = "not-worse",
    slices: str | int | Slices | None = None,
    seeds: Mapping[str, int] | None = None,
    on_undecided: OnUndecided | None = None,
    sample_id: str | int | Column | None = None,
    noise: Sequence[str | Path] | None = None,
) -> ReleaseReport:
    """Decides if a new model may replace the old one, by one pass of each model over the data.

    Data are read batch by batch and need not fit in memory. Models and random states do not change.
    The report has the decision (`accepted`), the `reasons`, and an `exit_status` for `sys.exit`.

    Args:
        old: the model in use: a module, the path of its checkpoint, a CSV file of its predictions,
            or an `OldModel`.
        new: the new model, on its device. An `Evaluator` sets the task, the precision, and the
            ranks that share the data; each rank gets the same report.
        data: one source or a list of sources, such as a `TensorSource`; each is a split. The
            report's limits of flip rates hold for future data only if neither training nor the
            choice of a model used the split.
        rules: one or several rules: `protected:ids.csv`; rules of `lightning_nrl.release`;
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
        on_undecided: what becomes of a model that fails only for lack of samples: `refuse` or
            `accept`. Without it, `exit_status` is 3.
        sample_id: column with your name of each sample, given as `slices` are; the report shows the
            names of broken samples.
        noise: CSV files of the predictions of two trainings of the old recipe. The report shows how
            many samples flip between these, beside the flips from the old to the new model.

    Example:
        >>> import torch
        >>> from lightning_nrl import TensorSource
        >>> old, new = torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)
        >>> for model, bias in ((old, 0.0), (new, -1.5)):
        ...     _ = model.load_state_dict(
        ...         {"weight": torch.tensor([[0.0], [1.0]]), "bias": torch.tensor([0.0, bias])}
        ...     )
        >>> inputs, targets = torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([0, 1, 1])
        >>> report = release(old, new, TensorSource(inputs, targets, split="test"), "instance")
        >>> print(report.reasons[0].partition("; ")[0])
        instance: test: 1 of 3 that were right broke
        >>> report.exit_status, report.broken_ids
        (1, {'test': [1]})
    """
    check_kind("new", new, isinstance(new, (nn.Module, Evaluator)), "model", "new=model")
    sources = [data] if isinstance(data, Source) else data
    if not (isinstance(sources, Sequence) and sources and isinstance(sources[0], Source)):
        raise ConfigurationError(
            f"`data`: found a {type(data).__name__}, not a list of sources.",
            "write `data=[TensorSource(inputs, targets, split='test')]`, "
            "or use the callback `ReleaseGate`.",
        )
    criteria = Criteria(
        rules,
        require,
        slices=slices,
        on_undecided=on_undecided,
        sample_id=sample_id,
        noise=noise,
    )
    splits = [source.split for source in sources]
    criteria.check_data(splits, sliced=slices is not None)
    old = check_reference("old", old)
    _, report = judge_pair(old, Evaluator.of(new), [sources], criteria, seeds=dict(seeds or {}))
    return report


class Criteria:
    """Rules of a release and what its report shows. The arguments are those of `release`."""

    def __init__(
        self,
        rules: str | Rule | Sequence[str | Rule],
        require: Require = "any",
        *,
        slices: str | int | Slices | None = None,
        on_undecided: OnUndecided | None = None,
        sample_id: str | int | Column | None = None,
        noise: Sequence[str | Path] | None = None,
    ) -> None:
        if on_undecided is not None:
            check_choice("on_undecided", on_undecided, ACTIONS)
        self.rules = parse_rules(rules, require)
        self.slices = None if slices is None else find_column("slices", slices)
        self.on_undecided = on_undecided
        self.sample_id = None if sample_id is None else find_column("sample_id", sample_id)
        self.noise = read_noise(noise)

    def protecting(self, suite: RegressionSuite, splits: tuple[str, ...] = ()) -> Criteria:
        """Adds a rule that no sample of a suite may break; limits the others to `splits`."""
        criteria = copy.copy(self)
        rules = [limited_to(rule, splits) for rule in self.rules]
        criteria.rules = (*rules, ProtectedIntact(suite))
        return criteria

    def check_data(self, splits: Sequence[str], *, sliced: bool) -> None:
        """Refuses data that a rule cannot judge; see `Rule.check_data`."""
        for rule in self.rules:
            rule.check_data(splits, sliced)

    @property
    def targets(self) -> list[Target]:
        return [target for rule in self.rules for target in rule.targets]


@outside_inference_mode()  # in which split weights have no state dict
def judge_pair(
    old: Reference,
    new: Evaluator,
    pieces: Iterable[Sequence[Source]],
    criteria: Criteria,
    *,
    seeds: Mapping[str, int],
    name: str = "",
    is_limited: bool = False,
    is_stream: bool = False,
) -> tuple[ModelPair, ReleaseReport]:
    """Does the work of `release` on data in `pieces`, and also returns the `ModelPair`.

    `name` is the new model's name in the report. If the data are limited, they may lack samples
    that a file of predictions has.
    """
    pair = evaluate_pieces(
        in_memory(old) if is_stream else old,
        new,
        pieces,
        slices=criteria.slices,
        targets=criteria.targets,
        sample_id=criteria.sample_id,
    )
    if isinstance(old, Predictions) and not is_limited:
        check_missing(old, Predictions.of(pair.after, ""))
    identity = _identity(old, new.model)
    report = make_report(
        pair,
        criteria,
        old=identity,
        new=Identity(name or type(new.model).__name__, hash_tensors(new.model.state_dict())),
        task=str(new.task),
        precision=str(new.precision),
    )
    provenance = Provenance.of(new.model, pair.after)
    caveats = check_accepted(old, identity.sha256, pair, provenance.data) + report.caveats
    return pair, replace(report, seeds=seeds, provenance=provenance, caveats=caveats)


def read_noise(files: Sequence[str | Path] | None) -> tuple[Predictions, ...]:
    """Reads the predictions of two trainings; returns () for None.

    Raises:
        ConfigurationError: these are not two files, or both have the same predictions.
    """
    if files is None:
        return ()
    is_pair = isinstance(files, (tuple, list)) and len(files) == 2
    check_kind("noise", files, is_pair, "pair of files", "noise=('A.csv', 'B.csv')")
    first, second = (Predictions.read(file, "noise") for file in files)
    if first == second:
        raise ConfigurationError(
            "`noise`: both files have the same predictions.",
            "train the old recipe twice, with two seeds, and give a file for each training.",
        )
    return first, second


def check_reference(argument: str, old: Any) -> Reference:
    """Parses the old model. If it is None, raises a `ConfigurationError` that names `argument`."""
    reference = parse_reference(old)
    if reference is None:
        hint = "give a checkpoint, a module, a CSV file of predictions or an OldModel."
        raise ConfigurationError(f"`{argument}=None`: nothing to compare with.", hint)
    return reference


def _identity(old: Reference, new: nn.Module) -> Identity:
    if isinstance(old, Predictions):
        return Identity("predictions", old.weights or "")
    if not isinstance(old, OldModel):
        return Identity(type(old).__name__)
    name = str(old.model)
    if isinstance(old.model, (nn.Module, Mapping)):
        name = type(old.model).__name__
    return Identity(name, hash_tensors(old.weights(new)))


@dataclass(frozen=True)
class Identity:
    """Identity of a model: its class or file as `name`, and the hash of its weights."""

    name: str
    sha256: str = ""  # of `hash_tensors`; empty if unknown


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
        noise: flips between two trainings of the old recipe, if given.
    """

    split: str
    slice: str
    counts: FlipCounts
    upper: float
    p_worse: float
    noise: FlipCounts | None = field(default=None, metadata=OPTIONAL)

    @property
    def noise_rate(self) -> float:
        """Negative flip rate between two trainings, the mean of both directions."""
        if self.noise is None:
            return math.nan
        return (self.noise.broken + self.noise.repaired) / (2 * self.noise.n)

    @property
    def derived(self) -> dict[str, float]:
        """Accuracies of the old and the new model and the rates in `UPDATE_RATES`, by name."""
        numbers = {
            "accuracy_before": self.counts.accuracy_before,
            "accuracy_after": self.counts.accuracy_after,
        }
        for rate in UPDATE_RATES:
            numbers[rate.name] = rate.of(self.counts)
        return numbers


@dataclass(frozen=True, repr=False)
class ReleaseReport(Report):
    """Decision whether a new model may replace the old one; `rich.print(report)` shows it.

    Attributes:
        status: `accepted` if every rule is satisfied, `undecided` if rules fail only for lack of
            samples, else `refused`.
        findings: one result for each rule, in the order of the rules.
        rows: one row for each split, followed by one for each of its slices.
        broken_ids: data-set positions of all broken samples, by split.
        repaired_ids: data-set positions of all repaired samples, by split.
        broken_names: names of the samples in `broken_ids`, if `sample_id` is given.
        confidence: confidence of the limits in the rows, in (0, 1).
        old: the old model, which the new model would replace.
        new: the new model.
        task: the task, which defines when a sample is right, in words.
        precision: precision in which both models ran.
        missing: by split, the number of samples that were not compared, since only the old model
            predicts them, or because of `limit`.
        limit: argument of the trainer that limits the data, such as `limit_test_batches=2`.
        seeds: seeds of data and models by name.
        files: paths of the written files, by kind.
        on_undecided: what becomes of an undecided release, or None.
        traits: what the broken samples have in common, if the release is refused.
        caveats: sentences on what nothing proves, such as that a checkpoint still predicts what it
            predicted when it was accepted.
    """

    status: Status
    findings: tuple[RuleResult, ...]
    rows: tuple[ReleaseRow, ...]
    broken_ids: Mapping[str, Sequence[int]]
    repaired_ids: Mapping[str, Sequence[int]]
    confidence: float
    old: Identity
    new: Identity
    task: str
    precision: str
    missing: Mapping[str, int] = field(default_factory=dict)
    limit: str = ""
    seeds: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    on_undecided: OnUndecided | None = None
    traits: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    broken_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """True if the new model may replace the old one."""
        return self.exit_status == 0

    def __repr__(self) -> str:
        return f"<ReleaseReport: {self.status}; {'; '.join(self.reasons) or 'all rules hold'}>"

    @property
    def exit_status(self) -> int:
        """Exit status for `sys.exit`: 0 if accepted, 1 if refused, 3 if undecided.

        `on_undecided` makes an undecided release accepted or refused.
        """
        status = self.status
        if status == "undecided" and self.on_undecided is not None:
            status = ACTIONS[self.on_undecided]
        return EXIT_STATUS[status]

    @property
    def reasons(self) -> tuple[str, ...]:
        """A text for each rule that is not satisfied: the rule, a colon and the reason."""
        return tuple(
            f"{finding.rule}: {finding.reason}" for finding in self.findings if not finding.passed
        )

    @property
    def derived(self) -> Mapping[str, object]:
        return {"exit_status": self.exit_status}

    def titles(self, split: str, ids: Sequence[int]) -> list[str]:
        """Returns positions of samples as text, with the names of broken ones."""
        names = dict(
            zip(self.broken_ids.get(split, ()), self.broken_names.get(split, ()), strict=False)
        )
        return [titled(position, names.get(position, "")) for position in ids]

    def page(self, full: bool = False) -> Page:
        tone: Tone = "good" if self.accepted else "warn"
        rules = []
        violations = []
        for finding in self.findings:
            rules.append((finding.rule, f"{finding.verdict}: {finding.explanation}"))
            for split, ids in finding.ids.items():
                titles = self.titles(split, ids)
                violations.append((f"{finding.rule}: {split}", list_ids(titles, "the JSON")))
        blocks: list[Block] = [
            Heading(self.status.capitalize(), 1, tone),
            Text(_verdict(self)),
            *map(Text, self.caveats),
            Heading("Rules"),
            FactList(tuple(rules)),
            Heading("From the old model to the new one"),
            _counts_table(self.rows, self.confidence),
            _rates_table(self.rows),
        ]
        if self.rows[0].noise is not None:
            noise = "; ".join(_noise(row) for row in self.rows if not row.slice)
            blocks.append(Text(f"Between two trainings of the old recipe: {noise}."))
        if self.traits:
            title = "What the broken samples have in common more than chance explains"
            blocks += [Heading(title), *map(Text, self.traits)]
        if violations:
            title = "Samples that the rules object to, by position in their data set"
            blocks += [Heading(title), FactList(tuple(violations))]
        return Page((*blocks, Heading("Decided on"), _facts(self, full)))


def _verdict(report: ReleaseReport) -> str:
    n, n_failed = len(report.findings), len(report.reasons)
    if report.status == "undecided":
        verb = "lacks" if n_failed == 1 else "lack"
        verdict = f"cannot be judged yet: {n_failed} of {n} rules {verb} samples"
        if report.on_undecided is not None:
            verdict += f" (on_undecided={report.on_undecided!r}: {ACTIONS[report.on_undecided]})"
    elif n_failed:
        verb = "is" if n_failed == 1 else "are"
        verdict = f"may not replace the old one: {n_failed} of {n} rules {verb} not satisfied"
    elif n > 1:
        verdict = f"may replace the old one: all {n} rules are satisfied"
    else:
        verdict = "may replace the old one: the rule is satisfied"
    text = f"The new model {verdict}."
    if report.old.sha256 and report.old.sha256 == report.new.sha256:
        text += " Both models have the same weights, so nothing can break."
    if not report.missing and not report.limit:
        return text
    n_compared = sum(row.counts.n for row in report.rows if not row.slice)
    text += f" {n_compared:,}"
    if report.missing:
        text += f" of {n_compared + sum(report.missing.values()):,}"
    text += " samples were compared"
    if report.limit:
        text += f": {report.limit}"
    return f"{text}."


def _noise(row: ReleaseRow) -> str:
    n = row.counts.n
    flips = f"{row.noise_rate * n:,.4g} of {n:,} samples break by chance, which means nothing"
    return f"in {row.split}, {flips}; {row.counts.broken:,} break by the new model"


def _facts(report: ReleaseReport, full: bool) -> FactList:
    facts = [
        ("new model", report.new.name),
        ("sha256 of its weights", report.new.sha256 or "not known"),
        ("old model", report.old.name),
        ("sha256 of its weights", report.old.sha256 or "not known"),
        ("right means", report.task),
        ("precision", report.precision),
    ]
    for split, n in report.missing.items():
        facts.append((f"NOT compared: {split}", f"{n:,} samples"))
    for name, seed in report.seeds.items():
        facts.append((f"seed: {name}", str(seed)))
    for kind, path in report.files.items():
        facts.append((f"file: {kind}", path if full else relative_to_cwd(path)))
    return FactList(tuple(facts))


def make_report(
    pair: ModelPair,
    criteria: Criteria,
    *,
    old: Identity,
    new: Identity,
    task: str,
    precision: str,
    missing: Mapping[str, int] = MappingProxyType({}),
) -> ReleaseReport:
    """Checks every rule and builds the report.

    The limits in the rows have the confidence of the first `MaxNegativeFlipRate` rule, or 95 %
    without such a rule.
    """
    rules = criteria.rules
    findings = tuple(rule.check(pair) for rule in rules)
    confidence = 0.95
    for rule in reversed(rules):
        if isinstance(rule, MaxNegativeFlipRate):
            confidence = rule.confidence
    rows = []
    by_noise = None
    if criteria.noise:
        first, second = (noise.results(pair.after, pair.keys) for noise in criteria.noise)
        by_noise = Flips.between(first, second)
    for split in pair.splits:
        rows += _rows(pair, split, confidence, by_noise)
    verdicts = {finding.verdict for finding in findings}
    status: Status = "accepted"
    if "NOT satisfied" in verdicts:
        status = "refused"
    elif "undecided" in verdicts:
        status = "undecided"
    return ReleaseReport(
        status=status,
        findings=findings,
        rows=tuple(rows),
        broken_ids=pair.after.ids(pair.flips.broken),
        repaired_ids=pair.after.ids(pair.flips.repaired),
        confidence=confidence,
        old=old,
        new=new,
        task=task,
        precision=precision,
        missing=missing,
        on_undecided=criteria.on_undecided,
        traits=common_traits(pair) if status == "refused" else (),
        caveats=pair.unproven if any(rule.is_statistical for rule in rules) else (),
        broken_names=pair.broken_names,
    )


def _rows(pair: ModelPair, split: str, confidence: float, noise: Flips | None) -> list[ReleaseRow]:
    rows = []
    slices = pair.slices_of(split)
    for name, mask in {"": pair.rows(split), **slices}.items():
        level = 1 - confidence
        if name:
            level /= len(slices)  # all limits of slices hold together (Bonferroni)
        counts = pair.flips.counts(mask)
        distinct = pair.flips.counts(mask & pair.distinct)
        upper = Bound.at_level(distinct.broken, distinct.n, level).upper
        p = p_worse(repaired=distinct.repaired, broken=distinct.broken)
        by_noise = None if noise is None else noise.counts(mask)
        rows.append(ReleaseRow(split, name, counts, upper, p, by_noise))
    return rows


def _label(row: ReleaseRow) -> str:
    if row.slice:
        return f"{row.split}, slice {row.slice}"
    return row.split


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
    lines = []
    for row in rows:
        counts = row.counts
        cells = (
            f"{counts.n:,}",
            percent(counts.accuracy_before),
            percent(counts.accuracy_after),
            f"{counts.broken:,}",
            f"{counts.repaired:,}",
            percent_up(row.upper),
            f"{row.p_worse:.2g}",
        )
        lines.append(Row(_label(row), cells))
    return Table(columns, tuple(lines))


def _rates_table(rows: Sequence[ReleaseRow]) -> Table:
    lines = []
    for row in rows:
        cells = []
        for rate in UPDATE_RATES:
            value = rate.of(row.counts)
            is_share = rate.short != "relative_nfr" or not math.isfinite(value)
            cells.append(percent(value) if is_share else f"{value:.3g}")
        if row.noise is not None:
            cells.append(percent(row.noise_rate))
        lines.append(Row(_label(row), tuple(cells)))
    columns = [(rate.title, "") for rate in UPDATE_RATES]
    if rows[0].noise is not None:
        columns.append(("NFR", "by noise"))
    return Table(tuple(columns), tuple(lines))
