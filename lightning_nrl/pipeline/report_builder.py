"""Builds the report of a repair from the results of its stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, current_state, hash_tensors
from lightning_nrl._utils.timing import rounded_seconds
from lightning_nrl.evaluation import DOUBTFUL, Evaluator
from lightning_nrl.evaluation.deployed_precision import rounding_margin
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults
from lightning_nrl.evaluation.slices import required_repairs
from lightning_nrl.gate import GateDecision
from lightning_nrl.methods import Solution
from lightning_nrl.pipeline.baseline import Baseline
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.strength import LineSearchResult
from lightning_nrl.records import CalibrationBounds, Hashes, LocalizationReport, Provenance, Status
from lightning_nrl.records.repair_record import Judge, SearchReport, WeightChange
from lightning_nrl.records.splits import (
    ClassCounts,
    ConfusionCell,
    FlippedSample,
    MarginHistogram,
    Role,
    SetAside,
    SliceReport,
    SplitReport,
    UpdateSplit,
    by_role,
    pool_updates,
)
from lightning_nrl.report import RepairReport
from lightning_nrl.search.search_log import SearchResult


def split_report(
    split: str,
    role: Role,
    before: SampleResults,
    now: SampleResults,
    margin_edges: tuple[float, ...] = (),
) -> SplitReport:
    """Builds the report of one split from the results `before` the repair and `now`. `margin_edges`
    bound the bins.
    """
    flips, rows = Flips.between(before, now), before.of(split)
    return SplitReport(
        split=split,
        role=role,
        counts=flips.target_counts(before, rows),
        targeted_ids=tuple(before.ids(before.targeted)[split]),
        flipped=flipped_samples(before, now, flips, rows),
        confusion=confusion_cells(before, now, rows),
        classes=class_counts(before, flips, rows),
        margins=margin_histogram(before, now, rows, margin_edges),
    )


def update_text(splits: Sequence[UpdateSplit]) -> str:
    """Returns a sentence that counts the regressions on known data, or "" if no model was replaced."""
    known = by_role(splits).get("known")
    if known is None:
        return ""
    both = pool_updates(known)
    before, after, passed = both.trained.broken, both.now.broken, both.now.passed
    first = f"Of {passed:,} known samples that the replaced model gets right, the new one got {before:,} wrong"
    return f"{first}." if both.now == both.trained else f"{first} and gets {after:,} wrong now."


def set_aside_samples(before: SampleResults, rows: Tensor, why: str) -> tuple[SetAside, ...]:
    """Returns a record for each known sample that the mask `rows` marks. Each record has the reason
    `why`.
    """
    splits = [
        split for split, size in zip(before.splits, before.sizes, strict=True) for _ in range(size)
    ]
    return tuple(
        SetAside(
            splits[row],
            int(before.index[row]),
            int(before.label[row]),
            int(before.prediction[row]),
            why,
        )
        for row in rows.nonzero().flatten().tolist()
    )


def weight_change(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> WeightChange:
    """Measures the change from old to new tensors of the same names and shapes, in float64 on the
    CPU.
    """
    before = torch.cat([tensor.detach().flatten().cpu().double() for tensor in old.values()])
    after = torch.cat([new[name].detach().flatten().cpu().double() for name in old])
    change = after - before
    return WeightChange(
        changed=int((change != 0).sum()),
        total=len(change),
        l2=float(change.norm()),
        relative=float(change.norm() / before.norm()),
        largest=float(change.abs().max()),
    )


def search_report(
    result: SearchResult, n_failed: int | None = None, n_passed: int | None = None
) -> SearchReport:
    """Returns the report of a search. `n_failed` failed and `n_passed` passed samples were scored."""
    return SearchReport(
        iterations=result.iterations,
        stopped=result.stopped,
        fitness=float(result.fitness),
        original_fitness=float(result.original_fitness),
        history={
            curve.name: getattr(result.history, curve.name).tolist()
            for curve in fields(result.history)
        },
        n_failed=n_failed,
        n_passed=n_passed,
    )


REPORTED_MARGIN_BINS = 40
OUTER_MARGIN_SHARE = (
    0.01  # the histogram ignores this share of all margins at either end when it sets its range
)
MARGIN_GROWTH = 1.5  # factor on the range, since margins grow in a repair


def flipped_samples(
    before: SampleResults, after: SampleResults, flips: Flips, rows: slice
) -> tuple[FlippedSample, ...]:
    """Returns a record for each repaired or broken sample in `rows`, in the order of the rows."""
    chosen = (flips.repaired | flips.broken).nonzero().flatten()
    chosen = chosen[(chosen >= rows.start) & (chosen < rows.stop)]
    columns = {
        "id": before.index,
        "in_target": before.in_target,
        "label": before.label,
        "predicted_before": before.prediction,
        "predicted_after": after.prediction,
        "margin_before": before.margin.double(),
        "margin_after": after.margin.double(),
    }
    found: dict[str, list[Any]] = {
        name: column[chosen].tolist() for name, column in columns.items()
    }
    found["flip"] = [
        "repaired" if repaired else "broken" for repaired in flips.repaired[chosen].tolist()
    ]
    found["slice"] = [
        before.names[group] if group >= 0 else "" for group in before.group[chosen].tolist()
    ]
    return tuple(
        FlippedSample(**dict(zip(found, row, strict=True)))
        for row in zip(*found.values(), strict=True)
    )


def confusion_cells(
    before: SampleResults, after: SampleResults, rows: slice
) -> tuple[ConfusionCell, ...]:
    """Counts the samples in `rows` by label and prediction, before and after. Returns () if the
    task has no classes.
    """
    labels, predictions = (
        before.label[rows],
        [results.prediction[rows] for results in (before, after)],
    )
    if not _has_classes(labels, predictions[0]):
        return ()
    n_classes = 1 + max(int(column.max()) for column in predictions)
    counts = []
    for prediction in predictions:
        # A pair of label and prediction is one number here, since sorting rows of two numbers takes
        # ten times as long.
        pairs, n_pairs = (labels * n_classes + prediction).unique(return_counts=True)
        counts.append(dict(zip(pairs.tolist(), n_pairs.tolist(), strict=True)))
    return tuple(
        ConfusionCell(*divmod(pair, n_classes), *(own.get(pair, 0) for own in counts))
        for pair in sorted(counts[0].keys() | counts[1])
    )


def class_counts(before: SampleResults, flips: Flips, rows: slice) -> tuple[ClassCounts, ...]:
    """Counts kept, broken, repaired and failing samples in `rows` by class. Returns () if the task
    has no classes.
    """
    labels = before.label[rows]
    if not _has_classes(labels, before.prediction[rows]):
        return ()
    masks = (flips.kept, flips.broken, flips.repaired, flips.failing)
    counts = torch.stack(
        [labels[mask[rows]].bincount(minlength=int(labels.max()) + 1) for mask in masks], 1
    )
    present = counts.sum(1).nonzero().flatten().tolist()
    return tuple(ClassCounts(label, FlipCounts(*counts[label].tolist())) for label in present)


def margin_edges(margin: Tensor) -> tuple[float, ...]:
    """Returns edges of equally wide bins for a vector of margins. One edge is 0. Returns () if no
    margin is finite.
    """
    finite = margin[margin.isfinite()].double()
    if not len(finite):
        return ()
    ordered = finite.sort().values
    outer = int(OUTER_MARGIN_SHARE * (len(ordered) - 1))
    low, high = (
        MARGIN_GROWTH * min(float(ordered[outer]), 0.0),
        MARGIN_GROWTH * max(float(ordered[-1 - outer]), 0.0),
    )
    width = (high - low) / (REPORTED_MARGIN_BINS - 1) or 1.0
    first = math.floor(low / width)
    return tuple(width * (first + i) for i in range(REPORTED_MARGIN_BINS + 1))


def margin_histogram(
    before: SampleResults, after: SampleResults, rows: slice, edges: tuple[float, ...]
) -> MarginHistogram | None:
    """Counts the finite margins in `rows` by bin, before and after. Returns None if `edges` is
    empty.
    """
    if not edges:
        return None
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    counts = []
    for results in (before, after):
        margin = results.margin[rows].double()
        bins = torch.bucketize(margin[margin.isfinite()], inner, right=True)
        counts.append(tuple(torch.bincount(bins, minlength=len(edges) - 1).tolist()))
    return MarginHistogram(edges, *counts)


def _has_classes(labels: Tensor, predictions: Tensor) -> bool:
    return len(labels) > 0 and bool((labels >= 0).all()) and bool((predictions >= 0).all())


NOTHING: Mapping[Role, SampleResults] = {}
UNDECIDED = LineSearchResult(chosen=None)


@dataclass(frozen=True)
class ReportBuilder:
    """Builds the report of a repair, from the results of the stages that have run.

    Attributes:
        seconds: seconds by stage, in a mapping that is updated while the repair runs.
        n_passed: number of passed samples that the search scored (|I_pos|).
    """

    evaluator: Evaluator
    space: ParameterSpace
    settings: Settings
    baseline: Baseline
    seconds: Mapping[str, float]
    solution: Solution | None = None
    n_passed: int | None = None
    line_search: LineSearchResult = UNDECIDED

    def without_candidate(self, status: Status, reason: str) -> RepairReport:
        """Returns the report of a repair without new weights, because none were needed or none were
        found.
        """
        old = self.space.parameters
        layers, model = hash_tensors(old), self._hash_model({})
        hashes = Hashes(layers, layers, model, model)
        return self._report(status, reason, NOTHING, slices=self._slices(NOTHING), hashes=hashes)

    def with_candidate(
        self,
        decision: GateDecision,
        new: State,
        after: SampleResults,
        other_results: Mapping[Role, SampleResults] = NOTHING,
        bounds: CalibrationBounds | None = None,
    ) -> RepairReport:
        """Returns the report on the weights `new` with the results `after` on known and `other_results`
        on other data.
        """
        old = {
            name: value
            for name, value in current_state(self.evaluator.model).items()
            if name in new
        }
        before = hash_tensors(old), self._hash_model({})
        now = (hash_tensors(new), self._hash_model(new)) if decision.accepted else before
        results: Mapping[Role, SampleResults] = {
            "known": after,
            **(other_results if decision.accepted else NOTHING),
        }
        refused = (
            []
            if decision.accepted
            else [split for split in self._splits(results) if split.role == "known"]
        )
        return self._report(
            decision.status,
            decision.reason,
            results if decision.accepted else NOTHING,
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
        """Returns the report. `after` has the results after the repair by role. It is empty if no
        weights changed.
        """
        found, update = self.solution or Solution(None), self._updates(after)
        known, localization = self.baseline.known, found.localization
        n_failed, where = int(known.targeted.sum()), None
        now, rounding = after.get("known", known), rounding_margin(self.evaluator.precision, known)
        within = 0 if rounding is None else int((now.passed & (now.margin < rounding)).sum())
        if localization is not None:
            where = LocalizationReport(
                localization.requested, localization.n_g, dict(localization.sizes)
            )
        why = (
            "its label looks wrong"
            if self.settings.samples.set_aside == DOUBTFUL
            else "chosen by `set_aside`"
        )
        return RepairReport(
            status=status,
            reason=f"{reason} {update_text(update)}".rstrip(),
            layers=layers
            or tuple(site.name or type(site.module).__name__ for site in self.space.sites),
            target=str(self.settings.target),
            gate=str(self.settings.gate),
            task=str(self.evaluator.task),
            splits=self._splits(after),
            update=update,
            localization=where,
            search=None
            if found.result is None
            else search_report(found.result, n_failed, self.n_passed),
            steps=found.steps,
            rungs=found.rungs,
            choice=found.choice,
            price=found.price,
            strength=self.line_search.path,
            chosen_strength=self.line_search.chosen,
            set_aside=set_aside_samples(known, self.baseline.set_aside, why),
            leaked=self.baseline.leaked,
            judge=Judge(self.evaluator.precision, rounding, within),
            seed=self.settings.seed,
            seconds=rounded_seconds(self.seconds),
            settings=self.settings.plain(),
            provenance=Provenance.of(self.evaluator.model, *self._before.values()),
            **rest,
        )

    @property
    def _before(self) -> dict[Role, SampleResults]:
        return {
            "known": self.baseline.known,
            **{role: data.before for role, data in self.baseline.other_data.items()},
        }

    @cached_property
    def _margin_edges(self) -> tuple[float, ...]:
        return margin_edges(self.baseline.known.margin)

    def _splits(self, after: Mapping[Role, SampleResults]) -> tuple[SplitReport, ...]:
        return tuple(
            split_report(split, role, before, after.get(role, before), self._margin_edges)
            for role, before in self._before.items()
            for split in before.splits
        )

    def _slices(self, after: Mapping[Role, SampleResults]) -> tuple[SliceReport, ...]:
        quotas, found = (
            required_repairs(self.baseline.known, self.settings.samples.quotas or {})[0],
            [],
        )
        for role, before in self._before.items():
            flips = Flips.between(before, after.get(role, before))
            for number, name in enumerate(before.names):
                quota = quotas.get(name) if role == "known" else None
                found.append(
                    SliceReport(
                        name, role, flips.target_counts(before, before.group == number), quota
                    )
                )
        return tuple(found)

    def _updates(self, after: Mapping[Role, SampleResults]) -> tuple[UpdateSplit, ...]:
        answers = {} if self.baseline.update is None else self.baseline.update.answers
        found = []
        for role, old in answers.items():
            trained = self._before[role]
            for split in old.splits:
                both = [
                    split_report(split, role, old, x, self._margin_edges)
                    for x in (trained, after.get(role, trained))
                ]
                found.append(UpdateSplit(*both))
        return tuple(found)

    def _hash_model(self, changed: State) -> str:
        return hash_tensors({**current_state(self.evaluator.model), **changed})
