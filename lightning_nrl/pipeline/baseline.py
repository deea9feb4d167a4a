"""Evaluates the original model on all data, marks the failures to repair, and finds leaks.

Other data here are calibration data, which choose the strength, and unseen data, which are only
counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data import Source
from lightning_nrl.data.batch import RecordingSource
from lightning_nrl.data.sample_identity import (
    Identified,
    content_recorder,
    has_content_of,
    is_among,
)
from lightning_nrl.errors import ConfigurationError, DataWarning, OtherRankError, TargetError
from lightning_nrl.evaluation import DOUBTFUL, Evaluator, Flips, SampleResults
from lightning_nrl.evaluation.head_features import (
    MAX_BYTES,
    HeadRecord,
    HeadRecorder,
    find_label_issues,
    rows_of,
)
from lightning_nrl.evaluation.layers import forbid_batch_statistics, is_compiled, last_linear
from lightning_nrl.evaluation.slices import normalise_weights
from lightning_nrl.pipeline.input_checks import (
    MAX_LISTED_IDS,
    check_classes,
    check_losses,
    check_task,
    warn_of_margins,
)
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.records import Role
from lightning_nrl.updates.old_model import Reference, Update, evaluate_old


@dataclass(frozen=True)
class Baseline:
    """Results of the model before the repair, on all data.

    Attributes:
        known: results on known data. `targeted` marks the failures to repair, but no failures that
            are set aside.
        before: the results from which the search starts. They equal `known`, unless a model is
            replaced and `SampleOptions.keep` is `reference`. Then samples that the replaced model
            gets wrong do not count as passed.
        other_data: calibration and unseen data with their results, by role. A role without data is
            missing.
        set_aside: mask over the `N` known samples. It marks the failures in the target that are not
            to be repaired.
        update: results of the replaced model. None if no model is replaced.
        leaked: for each unseen split with leaks, the number of its samples that are also known or
            calibration data.
        record: what the last Linear did in the pass over known data; None if that is not recorded.
    """

    known: SampleResults
    before: SampleResults
    other_data: Mapping[Role, EvaluatedData]
    set_aside: Tensor
    update: Update | None
    leaked: Mapping[str, int]
    record: HeadRecord | None = None


def evaluate_baseline(
    evaluator: Evaluator,
    known: Sequence[Source],
    settings: Settings,
    *,
    unseen: Sequence[Source],
    calibration: Sequence[Source] = (),
    clock: StageTimer,
    reference: Reference | None = None,
    records: bool = False,
) -> Baseline:
    """Evaluates the model on all data.

    `clock` measures the time. With `records`, the pass over known data records the last Linear.
    Other arguments are as in `repair_module`.
    """
    other_data: dict[Role, Sequence[Source]] = {}
    if calibration:
        other_data["calibration"] = calibration
    if unseen:
        other_data["unseen"] = unseen
    leaks = LeakCheck(known, other_data)
    recorder = _recorder(evaluator, known, records, settings.search.memory_limit)
    with clock.stage("collect"), forbid_batch_statistics(evaluator.model):
        results, set_aside = settings.samples.evaluate(
            evaluator,
            leaks.known,
            settings.target,
            everywhere=reference is not None,
            forward=recorder,
        )
        record = recorder.record()
    tables: dict[Role, SampleResults] = {"known": results}
    for role, sources in leaks.other_data.items():
        with clock.stage("unseen"):
            tables[role] = evaluate_other_data(evaluator, sources, settings)
    leaked = leaks.leaked(evaluator.collective)
    if "unseen" in tables:
        tables["unseen"] = leaks.mark(tables["unseen"], leaked, evaluator.collective)
    check_losses(results)
    check_classes(results, evaluator)
    check_task(settings, results, evaluator.task)
    warn_of_margins(results)
    before, update = results, None
    if reference is not None:
        with clock.stage("reference"):
            update = evaluate_old(reference, evaluator, {"known": known, **other_data}, tables)
        for role, table in tables.items():
            tables[role] = update.regressions(role, table)
        before = update.kept(tables["known"], settings.samples.keep)
    if settings.samples.set_aside == DOUBTFUL:
        with clock.stage("labels"):
            set_aside = find_label_issues(evaluator, known, before, record)
    return Baseline(
        _without(tables["known"], set_aside),
        _without(before, set_aside),
        {role: EvaluatedData(sources, tables[role]) for role, sources in other_data.items()},
        set_aside,
        update,
        {split: int(mask.sum()) for split, mask in leaked.items()},
        record,
    )


def _recorder(
    evaluator: Evaluator, known: Sequence[Source], records: bool, memory_limit: int | None
) -> HeadRecorder:
    head = None
    # Compiled code would ignore the hook, and a sharded layer holds only a part of its weights.
    if records and evaluator.spare_batch is None and not is_compiled(evaluator.model):
        _, head = last_linear(evaluator.model, evaluator.called)
    most_bytes = min(MAX_BYTES, memory_limit or MAX_BYTES)
    return HeadRecorder(evaluator, head, rows_of(known), most_bytes)


def _without(results: SampleResults, set_aside: Tensor) -> SampleResults:
    return normalise_weights(replace(results, targeted=results.targeted & ~set_aside))


@dataclass(frozen=True)
class EvaluatedData:
    """Calibration or unseen data: this rank's `sources`, and all results `before` the repair."""

    sources: Sequence[Source]
    before: SampleResults

    def flips(self, evaluator: Evaluator, state: State) -> Flips:
        """Compares the model with the tensors of `state` with `before`, on these data."""
        return Flips.between(self.before, evaluator.run_with(state, self.sources))


def evaluate_other_data(
    evaluator: Evaluator, sources: Sequence[Source], settings: Settings
) -> SampleResults:
    """Evaluates calibration or unseen data and marks the failures in the target, for the report.

    If the target cannot be applied, for instance because these data lack a column, a warning says
    so and no failure is marked. Any other error is raised. If it occurs on one rank only, the other
    ranks raise an error, too.
    """
    samples = settings.samples
    try:
        results, _ = samples.evaluate(
            evaluator, sources, settings.target, everywhere=True, known=False
        )
        return results
    except Exception as error:
        # If one rank fails, all ranks get here. They evaluate again unless a rank has an error of
        # another kind.
        if evaluator.collective.any(not isinstance(error, (TargetError, OtherRankError))):
            raise
        problem = f"the failures in the target are not counted on held-out data: {error}"
        warnings.warn(DataWarning(problem), stacklevel=3)
    results, _ = samples.evaluate(evaluator, sources, known=False)
    return results


class LeakCheck:
    """Finds samples that data share: calibration with known, unseen with known or calibration.

    First run the model over the attributes `known` and `other_data`, then call `leaked`. The
    attributes wrap the given sources to record a hash of each sample. Two samples are the same if
    their inputs and labels are equal in the coarsest dtype of both, or if they have the same
    position in the same data set, even if subsets or unions wrap the data set.
    """

    def __init__(
        self, known: Sequence[Source], other_data: Mapping[Role, Sequence[Source]]
    ) -> None:
        self.known = known
        self.other_data: dict[Role, list[RecordingSource]] = {}
        self._earlier: list[RecordingSource] = []
        if other_data:
            self.known = self._earlier = list(map(content_recorder, known))
        for role, sources in other_data.items():
            self.other_data[role] = list(map(content_recorder, sources))

    def leaked(self, collective: Collective) -> dict[str, Tensor]:
        """Returns a mask of the leaked samples by unseen split with leaks, and warns about them.

        Call this after a pass over all sources. Raises a `ConfigurationError` if a calibration
        sample is also known.
        """
        leaked: dict[str, Tensor] = {}
        earlier = self._earlier
        for role, sources in self.other_data.items():
            for source in sources:
                mask = _leaked_rows(source, earlier, collective)
                ids = source.index[mask].tolist()
                if not ids:
                    continue
                first = ids[:MAX_LISTED_IDS]
                count = f"{len(ids):,} of the {len(mask):,} samples of `{source.split}`"
                if role == "calibration":
                    raise ConfigurationError(
                        f"`calibration`: {count} are known data too ({first}).",
                        "remove them from one of the two: a bound holds only for unused samples.",
                    )
                leaked[source.split] = mask
                problem = f"`unseen`: {count} are known or calibration data too ({first})."
                hint = "remove them; they are not counted."
                warnings.warn(DataWarning(problem, hint), stacklevel=4)
            earlier = earlier + sources
        return leaked

    def mark(
        self, unseen: SampleResults, leaked: Mapping[str, Tensor], collective: Collective
    ) -> SampleResults:
        """Marks leaked samples, and groups repeated samples unless the user has given groups."""
        mask = unseen.leaked.clone()
        for split, rows in leaked.items():
            mask[unseen.of(split)] = rows
        keys = torch.cat([source.gathered(collective) for source in self.other_data["unseen"]])
        _, group = keys.unique(dim=0, return_inverse=True)
        unseen = replace(unseen, leaked=mask, targeted=unseen.targeted & ~mask)
        n_repeated = len(group) - len(group.unique())
        if not n_repeated or unseen.group is not None:
            return unseen
        problem = f"`unseen`: {n_repeated:,} of {len(group):,} samples repeat others."
        warnings.warn(DataWarning(problem, "tests and limits count each once."), stacklevel=4)
        return replace(unseen, group=group)


def _leaked_rows(
    source: RecordingSource, earlier: Sequence[RecordingSource], collective: Collective
) -> Tensor:
    """Marks the source's samples on all ranks that are also in `earlier`."""
    mask = torch.zeros(len(source.gathered(collective)), dtype=torch.bool)
    for recorder in earlier:
        mask |= has_content_of(source, recorder, collective)
        if isinstance(source.source, Identified) and isinstance(recorder.source, Identified):
            mask |= is_among(source.source.identity, recorder.source.identity)
    return mask
