"""Makes the report of a repair from what its stages gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_nrl._utils.state import State, current_state, hash_tensors
from lightning_nrl._utils.timing import in_milliseconds
from lightning_nrl.evaluation import DOUBTFUL, Evaluator
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.evaluation.slices import needed
from lightning_nrl.gate import Verdict
from lightning_nrl.methods import Solution
from lightning_nrl.pipeline.baseline import Baseline
from lightning_nrl.pipeline.report_parts import (
    judge_record,
    margin_edges,
    search_report,
    set_aside_samples,
    slice_reports,
    split_report,
    update_text,
    weight_change,
)
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.strength import LineSearchResult
from lightning_nrl.report import (
    CalibrationBounds,
    Hashes,
    LocalizationReport,
    RepairReport,
    Role,
    SliceReport,
    SplitReport,
    Status,
    UpdateSplit,
)

NOTHING: Mapping[Role, SampleResults] = {}
UNDECIDED = LineSearchResult(chosen=None)


@dataclass(frozen=True)
class ReportBuilder:
    """What the stages of a repair gave so far; `seconds` by stage still grow, `n_passed` were scored (|I_pos|)."""

    evaluator: Evaluator
    space: ParameterSpace
    settings: Settings
    baseline: Baseline
    seconds: Mapping[str, float]
    solution: Solution | None = None
    n_passed: int | None = None
    line_search: LineSearchResult = UNDECIDED

    def without_candidate(self, status: Status, reason: str) -> RepairReport:
        """The report of a repair that ended without a candidate: the weights stay."""
        old = self.space.parameters
        layers, model = hash_tensors(old), self._hash_model({})
        hashes = Hashes(layers, layers, model, model)
        return self._report(status, reason, NOTHING, slices=self._slices(NOTHING), hashes=hashes)

    def with_candidate(
        self,
        verdict: Verdict,
        new: State,
        after: SampleResults,
        held_out: Mapping[Role, SampleResults] = NOTHING,
        bounds: CalibrationBounds | None = None,
    ) -> RepairReport:
        """The report of a candidate with the whole tensors `new`; `held_out` and `bounds` if it was accepted."""
        old = {name: value for name, value in current_state(self.evaluator.model).items() if name in new}
        before = hash_tensors(old), self._hash_model({})
        now = (hash_tensors(new), self._hash_model(new)) if verdict.accepted else before
        results: Mapping[Role, SampleResults] = {"known": after, **(held_out if verdict.accepted else NOTHING)}
        refused = [] if verdict.accepted else [split for split in self._splits(results) if split.role == "known"]
        return self._report(
            verdict.status,
            verdict.reason,
            results if verdict.accepted else NOTHING,
            slices=self._slices(results),
            layers=tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in new)),
            candidate=tuple(refused),
            change=weight_change(old, new),
            bounds=bounds,
            hashes=Hashes(before[0], now[0], before[1], now[1]),
        )

    def _report(
        self,
        status: Status,
        reason: str,
        after: Mapping[Role, SampleResults],
        layers: tuple[str, ...] = (),
        **rest: Any,
    ) -> RepairReport:
        """The report; `after` is what the model does on all data after the repair, nothing where the weights stay."""
        found, update = self.solution or Solution(None), self._updates(after)
        known, localization = self.baseline.known, found.localization
        n_failed, where = int(known.targeted.sum()), None
        if localization is not None:
            where = LocalizationReport(localization.requested, localization.n_g, dict(localization.sizes))
        why = "its label looks wrong" if self.settings.samples.set_aside == DOUBTFUL else "chosen by `set_aside`"
        return RepairReport(
            status=status,
            reason=f"{reason} {update_text(update)}".rstrip(),
            layers=layers or tuple(site.name or type(site.module).__name__ for site in self.space.sites),
            target=str(self.settings.target),
            gate=str(self.settings.gate),
            task=str(self.evaluator.task),
            splits=self._splits(after),
            update=update,
            localization=where,
            search=None if found.result is None else search_report(found.result, n_failed, self.n_passed),
            steps=found.steps,
            rungs=found.rungs,
            choice=found.choice,
            price=found.price,
            strength=self.line_search.path,
            chosen_strength=self.line_search.chosen,
            set_aside=set_aside_samples(known, self.baseline.set_aside, why),
            leaked=self.baseline.leaked,
            judge=judge_record(self.evaluator.precision, known, after.get("known", known)),
            seed=self.settings.seed,
            seconds=in_milliseconds(self.seconds),
            settings=self.settings.plain(),
            **rest,
        )

    @property
    def _before(self) -> dict[Role, SampleResults]:
        return {"known": self.baseline.known, **{role: data.before for role, data in self.baseline.held_out.items()}}

    @cached_property
    def _margin_edges(self) -> tuple[float, ...]:
        return margin_edges(self.baseline.known.margin)

    def _splits(self, after: Mapping[Role, SampleResults]) -> tuple[SplitReport, ...]:
        return tuple(
            split_report(split, role, before, after.get(role), self._margin_edges)
            for role, before in self._before.items()
            for split in before.splits
        )

    def _slices(self, after: Mapping[Role, SampleResults]) -> tuple[SliceReport, ...]:
        quotas = needed(self.baseline.known, self.settings.samples.quotas or {})[0]
        return tuple(
            report
            for role, before in self._before.items()
            for report in slice_reports(role, before, after.get(role), quotas if role == "known" else {})
        )

    def _updates(self, after: Mapping[Role, SampleResults]) -> tuple[UpdateSplit, ...]:
        answers = {} if self.baseline.update is None else self.baseline.update.answers
        found = []
        for role, old in answers.items():
            trained = self._before[role]
            for split in old.splits:
                both = [
                    split_report(split, role, old, x, self._margin_edges) for x in (trained, after.get(role, trained))
                ]
                found.append(UpdateSplit(*both))
        return tuple(found)

    def _hash_model(self, changed: State) -> str:
        return hash_tensors({**current_state(self.evaluator.model), **changed})
