"""An update: a new model, and what is known of the one that it replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_options import Keep
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.reference.old_model import Reference
from lightning_nrl.report import Role

__all__ = ["Update", "look_back"]


@dataclass(frozen=True)
class Update:
    """What the replaced model does on the data, by their role, row by row as the new model's results."""

    answers: Mapping[Role, SampleResults]

    def regressions(self, role: Role, new: SampleResults) -> SampleResults:
        """The new model's results, with those of its targeted failures marked that the replaced model gets right."""
        return replace(new, targeted=new.targeted & self.answers[role].passed)

    def kept(self, new: SampleResults, keep: Keep) -> SampleResults:
        """The new model's known results, with those samples marked as passed that may not break."""
        return new if keep == "both" else replace(new, passed=new.passed & self.answers["known"].passed)


def look_back(
    reference: Reference,
    evaluator: Evaluator,
    sources: Mapping[Role, Sequence[Source]],
    results: Mapping[Role, SampleResults],
) -> Update:
    """Asks the replaced model, once, about data by role: this rank's share, and what the new model does on them.

    Raises:
        ConfigurationError: the replaced model or its predictions do not fit the data.
    """
    # At once, since a cache is one file; roles may not share the name of a split.
    roles = list(sources)
    together = [source for role in roles for source in sources[role]]
    like = _joined([results[role] for role in roles])
    found = reference.answers(evaluator, together, like)
    answers, at, split = {}, 0, 0
    for role in roles:
        one = results[role]
        rows, splits = slice(at, at + len(one)), slice(split, split + len(one.splits))
        answers[role] = _part(found, rows, splits)
        at, split = rows.stop, splits.stop
    return Update(answers)


RESULT_COLUMNS = ("index", "label", "prediction", "loss", "passed", "targeted", "margin")


def _joined(tables: Sequence[SampleResults]) -> SampleResults:
    splits = tuple(split for table in tables for split in table.splits)
    sizes = tuple(size for table in tables for size in table.sizes)
    columns: dict[str, Any] = {name: torch.cat([getattr(t, name) for t in tables]) for name in RESULT_COLUMNS}
    return SampleResults(splits, sizes, **columns)


def _part(table: SampleResults, rows: slice, splits: slice) -> SampleResults:
    columns: dict[str, Any] = {name: getattr(table, name)[rows] for name in RESULT_COLUMNS}
    return SampleResults(table.splits[splits], table.sizes[splits], **columns)
