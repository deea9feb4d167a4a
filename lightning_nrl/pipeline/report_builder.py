"""Builds the report of a repair from the results of its stages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import compress

import torch

from lightning_nrl._utils.state import State, current_state, hash_tensors
from lightning_nrl._utils.timing import StageTimer, rounded_seconds
from lightning_nrl.data import Source
from lightning_nrl.errors import DataWarning, first_line
from lightning_nrl.evaluation import DOUBTFUL, Evaluator, Flips, GroupCounts, SampleResults
from lightning_nrl.evaluation.deployed_precision import rounding_margin
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_names import sample_names
from lightning_nrl.evaluation.slices import required_repairs
from lightning_nrl.gate import GateDecision
from lightning_nrl.methods import Solution
from lightning_nrl.pipeline.baseline import Baseline
from lightning_nrl.pipeline.plain_values import fields_of
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.strength import LineSearchResult
from lightning_nrl.records import (
    CalibrationBounds,
    Hashes,
    Judge,
    LocalizationReport,
    Provenance,
    SearchReport,
    Status,
    WeightChange,
)
from lightning_nrl.records.split_reports import margin_edges, split_report
from lightning_nrl.records.splits import (
    Role,
    SetAside,
    SliceReport,
    SplitReport,
    UpdateSplit,
    by_role,
    pool_updates,
)
from lightning_nrl.report import RepairReport


def update_text(splits: Sequence[UpdateSplit]) -> str:
    """Returns a sentence that counts the regressions on known data; "" if it is no update."""
    known = by_role(splits).get("known")
    if known is None:
        return ""
    update = pool_updates(known)
    sentence = (
        f"Of {update.final.passed:,} known samples that the replaced model gets right, "
        f"the new one got {update.trained.broken:,} wrong"
    )
    if update.final == update.trained:
        return f"{sentence}."
    return f"{sentence} and gets {update.final.broken:,} wrong now."


NO_SOLUTION = Solution(None)
UNDECIDED = LineSearchResult(chosen=None)


@dataclass(frozen=True)
class ReportBuilder:
    """Builds the report of a repair, from the results of the stages that have run.

    Attributes:
        clock: has the seconds and visits by stage, and counts on while the repair runs.
    """

    evaluator: Evaluator
    space: ParameterSpace
    settings: Settings
    sources: Mapping[str, Source]
    baseline: Baseline
    clock: StageTimer
    solution: Solution = NO_SOLUTION
    line_search: LineSearchResult = UNDECIDED
    near_copies: bool = False

    def without_candidate(self, status: Status, reason: str) -> RepairReport:
        """Returns the report of a repair without new weights."""
        layers = hash_tensors(self.space.parameters)
        model = self._hash_model({})
        return replace(
            self._report(status, reason, self._before),
            slices=self._slices(self._before),
            hashes=Hashes(layers, layers, model, model),
        )

    def with_candidate(
        self,
        decision: GateDecision,
        new: State,
        after: SampleResults,
        other_results: Mapping[Role, SampleResults],
        bounds: CalibrationBounds | None,
    ) -> RepairReport:
        """Returns the report on the weights `new`.

        They have the results `after` on known data and `other_results` on other data.
        """
        state = current_state(self.evaluator.model)
        old = {name: state[name] for name in new}
        results = {**self._before, "known": after}
        if decision.accepted:
            results |= other_results
            report = self._report(decision.status, decision.reason, results)
            written = new
        else:
            report = self._report(decision.status, decision.reason, self._before)
            report = replace(report, candidate=tuple(by_role(self._splits(results))["known"]))
            written = old
        return replace(
            report,
            layers=tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in new)),
            slices=self._slices(results),
            change=WeightChange.between(old, new),
            bounds=bounds,
            hashes=Hashes(
                hash_tensors(old),
                hash_tensors(written),
                self._hash_model({}),
                self._hash_model(written),
            ),
        )

    def _report(
        self, status: Status, reason: str, after: Mapping[Role, SampleResults]
    ) -> RepairReport:
        """Returns the report without weights.

        `after` has the results after the repair by role.
        """
        settings, solution = self.settings, self.solution
        update = self._updates(after)
        localization, chosen = None, solution.localization
        if chosen is not None:
            localization = LocalizationReport(chosen.requested, chosen.n_g, dict(chosen.sizes))
        return RepairReport(
            status=status,
            reason=f"{reason} {update_text(update)}".rstrip(),
            layers=tuple(site.name or type(site.module).__name__ for site in self.space.sites),
            target=str(settings.target),
            gate=str(settings.gate),
            task=str(self.evaluator.task),
            splits=self._splits(after),
            update=update,
            unseen_groups=self._unseen_groups(after),
            near_copies=self.near_copies,
            localization=localization,
            search=self._search(),
            steps=tuple(solution.steps),
            rungs=solution.rungs,
            choice=solution.choice,
            price=solution.price,
            caution=solution.caution,
            strength=self.line_search.path,
            chosen_strength=self.line_search.chosen,
            set_aside=self._set_aside(),
            leaked=self.baseline.leaked,
            judge=self._judge(after["known"]),
            seed=settings.seed,
            seconds=rounded_seconds(self.clock.seconds),
            passes=self._passes(),
            settings=settings.plain(),
            provenance=Provenance.of(self.evaluator.model, *self._before.values()),
        )

    def _passes(self) -> dict[str, float]:
        """Returns the forward passes by stage over the known data, of all ranks together."""
        visits = self.clock.visits
        stages = [*self.clock.seconds, "checks"]
        counts = torch.tensor([visits.get(stage, 0) for stage in stages])
        n_known = len(self.baseline.known)
        passes = (self.evaluator.collective.sum(counts).double() / n_known).tolist()
        return {stage: round(n, 3) for stage, n in zip(stages, passes, strict=True) if n}

    def _search(self) -> SearchReport | None:
        result = self.solution.search
        if result is None:
            return None
        return SearchReport(
            iterations=result.iterations,
            stopped=result.stopped,
            fitness=float(result.fitness),
            original_fitness=float(result.original_fitness),
            history={name: curve.tolist() for name, curve in fields_of(result.history).items()},
            n_failed=result.n_failed,
            n_passed=result.n_passed,
        )

    def _set_aside(self) -> tuple[SetAside, ...]:
        why = "chosen by `set_aside`"
        if self.settings.samples.set_aside == DOUBTFUL:
            why = "its label looks wrong"
        known = self.baseline.known
        columns = zip(known.samples, known.label.tolist(), known.prediction.tolist(), strict=True)
        marked = compress(columns, self.baseline.set_aside.tolist())
        return tuple(
            SetAside(*sample, label, prediction, why) for sample, label, prediction in marked
        )

    def _judge(self, results: SampleResults) -> Judge:
        precision = self.evaluator.precision
        rounding = rounding_margin(precision, self.baseline.known)
        if rounding is None:
            return Judge(precision)
        return Judge(precision, rounding, int((results.passed & (results.margin < rounding)).sum()))

    @property
    def _before(self) -> dict[Role, SampleResults]:
        before: dict[Role, SampleResults] = {"known": self.baseline.known}
        for role, data in self.baseline.other_data.items():
            before[role] = data.before
        return before

    @cached_property
    def _margin_edges(self) -> tuple[float, ...]:
        return margin_edges(self.baseline.known.margin)

    def _splits(self, after: Mapping[Role, SampleResults]) -> tuple[SplitReport, ...]:
        splits = []
        for role, before in self._before.items():
            for split in before.splits:
                splits.append(self._split(split, role, before, after[role]))
        return tuple(splits)

    def _split(
        self, split: str, role: Role, before: SampleResults, after: SampleResults
    ) -> SplitReport:
        report = split_report(split, role, before, after, self._margin_edges)
        sample_id = self.settings.samples.sample_id
        if sample_id is None or not report.flipped:
            return report
        ids = [sample.id for sample in report.flipped]
        try:
            names = sample_names(sample_id, self.sources[split], ids, self.evaluator)
        except Exception as error:  # must not cost a finished repair
            warnings.warn(
                DataWarning(
                    f"`sample_id`: names cannot be read: {type(error).__name__}: "
                    f"{first_line(error)}.",
                    "the report names samples by their positions.",
                ),
                stacklevel=2,
            )
            return report
        named = zip(report.flipped, names, strict=True)
        return replace(report, flipped=tuple(replace(sample, name=name) for sample, name in named))

    def _slices(self, after: Mapping[Role, SampleResults]) -> tuple[SliceReport, ...]:
        quotas, _ = required_repairs(self.baseline.known, self.settings.samples.quotas or {})
        reports = []
        for role, before in self._before.items():
            flips = Flips.between(before, after[role])
            for number, name in enumerate(before.slices):
                report = SliceReport(
                    name, role, flips.target_counts(before, before.slice_number == number)
                )
                if role == "known":
                    report = replace(report, quota=quotas.get(name))
                reports.append(report)
        return tuple(reports)

    def _unseen_groups(self, after: Mapping[Role, SampleResults]) -> GroupCounts | None:
        if "unseen" not in after:
            return None
        before = self._before["unseen"]
        if self.baseline.update is not None:
            before = self.baseline.update.answers["unseen"]
        return Flips.between(before, after["unseen"]).counts().groups

    def _updates(self, after: Mapping[Role, SampleResults]) -> tuple[UpdateSplit, ...]:
        if self.baseline.update is None:
            return ()
        updates = []
        for role, old in self.baseline.update.answers.items():
            trained = self._before[role]
            for split in old.splits:
                compare = partial(self._split, split, role, old)
                updates.append(UpdateSplit(compare(trained), compare(after[role])))
        return tuple(updates)

    def _hash_model(self, changed: State) -> str:
        return hash_tensors({**current_state(self.evaluator.model), **changed})
