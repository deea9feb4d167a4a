"""The parts of a report, made from what a repair has computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from lightning_nrl.evaluation.deployed_precision import rounding_margin
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import Flips, SampleResults
from lightning_nrl.localization import Localization
from lightning_nrl.pipeline._sample_records import (
    class_counts,
    confusion_cells,
    flipped_samples,
    margin_histogram,
)
from lightning_nrl.report import (
    Judge,
    LocalizationReport,
    Role,
    SearchReport,
    SetAside,
    SliceReport,
    SplitReport,
    UpdateSplit,
    WeightChange,
    pool_updates,
)
from lightning_nrl.search.search_log import SearchResult

__all__ = [
    "judge_record",
    "localization_report",
    "search_report",
    "set_aside_samples",
    "slice_reports",
    "split_report",
    "update_split",
    "update_text",
    "weight_change",
]


def split_report(
    split: str,
    role: Role,
    before: SampleResults,
    after: SampleResults | None = None,
    margin_edges: tuple[float, ...] = (),
) -> SplitReport:
    """Counts what became of the samples of one split that both tables have; without `after` the weights are unchanged.

    Args:
        split: its name.
        role: what was allowed to look at it.
        before: under the original weights.
        after: under the new ones.
        margin_edges: those of the histogram of margins; none is made without.

    Raises:
        EvaluationError: the tables are not about the same samples in the same order.
    """
    now = before if after is None else after
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


def update_split(
    split: str,
    role: Role,
    old: SampleResults,
    trained: SampleResults,
    now: SampleResults | None = None,
    margin_edges: tuple[float, ...] = (),
) -> UpdateSplit:
    """Counts one split of an update: the replaced model, the new one as training left it, and as it is now."""
    first = split_report(split, role, old, trained, margin_edges)
    return UpdateSplit(first, first if now is None else split_report(split, role, old, now, margin_edges))


def update_text(splits: Sequence[UpdateSplit]) -> str:
    """A sentence on the known regressions; empty if no model was replaced."""
    known = [split for split in splits if split.role == "known"]
    if not known:
        return ""
    both = pool_updates(known)
    before, after, passed = both.trained.broken, both.now.broken, both.now.passed
    first = f"Of {passed:,} known samples that the replaced model gets right, the new one got {before:,} wrong"
    return f"{first}." if both.now == both.trained else f"{first} and gets {after:,} wrong now."


def slice_reports(
    role: Role, before: SampleResults, after: SampleResults | None = None, quotas: Mapping[str, int] | None = None
) -> tuple[SliceReport, ...]:
    """Counts what became of the samples of each slice; samples in no slice are left out."""
    flips = Flips.between(before, before if after is None else after)
    return tuple(
        SliceReport(name, role, flips.target_counts(before, before.group == number), (quotas or {}).get(name))
        for number, name in enumerate(before.names)
    )


def set_aside_samples(before: SampleResults, rows: Tensor, why: str) -> tuple[SetAside, ...]:
    """The samples of some rows, `N` bool, with the reason."""
    splits = [split for split, size in zip(before.splits, before.sizes, strict=True) for _ in range(size)]
    return tuple(
        SetAside(splits[row], int(before.index[row]), int(before.label[row]), int(before.prediction[row]), why)
        for row in rows.nonzero().flatten().tolist()
    )


def weight_change(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> WeightChange:
    """Compares tensors of the same names and shapes, in float64, on the CPU."""
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


def judge_record(evaluator: Evaluator, before: SampleResults, after: SampleResults | None) -> Judge:
    """In what known samples were counted, and how many the model of now gets right by less than rounding."""
    now = before if after is None else after
    precision = evaluator.precision
    rounding = rounding_margin(precision, before)
    within = 0 if rounding is None else int((now.passed & (now.margin < rounding)).sum())
    return Judge(precision, rounding, within)


def localization_report(localization: Localization) -> LocalizationReport:
    """Everything but the positions of the weights."""
    return LocalizationReport(localization.requested, localization.n_g, dict(localization.sizes))


def search_report(result: SearchResult, n_failed: int | None = None, n_passed: int | None = None) -> SearchReport:
    """Everything but the candidate itself."""
    return SearchReport(
        iterations=result.iterations,
        stopped=result.stopped,
        fitness=float(result.fitness),
        original_fitness=float(result.original_fitness),
        history={curve.name: getattr(result.history, curve.name).tolist() for curve in fields(result.history)},
        n_failed=n_failed,
        n_passed=n_passed,
    )
