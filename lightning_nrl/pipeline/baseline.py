"""Evaluates the original model on all data, marks the failures to repair, and finds samples that
leaked between splits.

Other data here are calibration data, which choose the strength, and unseen data, which are only
counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data import Source
from lightning_nrl.data.batch import RecordingSource
from lightning_nrl.data.sample_identity import Identified, content_recorder, is_among
from lightning_nrl.errors import ConfigurationError, DataWarning, OtherRankError, TargetError
from lightning_nrl.evaluation import DOUBTFUL, Evaluator, Flips, SampleResults
from lightning_nrl.evaluation.head_features import find_label_issues
from lightning_nrl.evaluation.layers import forbid_batch_statistics
from lightning_nrl.evaluation.slices import normalise_weights
from lightning_nrl.pipeline.input_checks import check_losses, check_task
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
    """

    known: SampleResults
    before: SampleResults
    other_data: Mapping[Role, EvaluatedData]
    set_aside: Tensor
    update: Update | None = None
    leaked: Mapping[str, int] = field(default_factory=dict)


def evaluate_baseline(
    evaluator: Evaluator,
    known: Sequence[Source],
    settings: Settings,
    *,
    unseen: Sequence[Source] = (),
    calibration: Sequence[Source] = (),
    clock: StageTimer,
    reference: Reference | None = None,
) -> Baseline:
    """Evaluates the model on all data. `clock` measures the time. Other arguments are as in
    `repair_module`.
    """
    roles: dict[Role, Sequence[Source]] = {"calibration": calibration, "unseen": unseen}
    other_data = {role: sources for role, sources in roles.items() if sources}
    leaks = LeakCheck(known, other_data)
    with clock.stage("collect"), forbid_batch_statistics(evaluator.model):
        before, set_aside = settings.samples.evaluate(
            evaluator, leaks.known, settings.target, everywhere=reference is not None
        )
    others: dict[Role, SampleResults] = {}
    for role, sources in leaks.other_data.items():
        with clock.stage("unseen"):
            others[role] = evaluate_other_data(evaluator, sources, settings)
    leaked = leaks.leaked(evaluator.collective)
    check_losses(before)
    check_task(settings, before, evaluator.task)
    update, own = None, before
    if reference is not None:
        with clock.stage("reference"):
            update = evaluate_old(
                reference, evaluator, {"known": known, **other_data}, {"known": before, **others}
            )
        own = update.regressions("known", before)
        others = {role: update.regressions(role, results) for role, results in others.items()}
        before = update.kept(own, settings.samples.keep)
    if settings.samples.set_aside == DOUBTFUL:
        with clock.stage("labels"):
            set_aside = find_label_issues(evaluator, known, before)
    same, before = own is before, _without(before, set_aside)
    return Baseline(
        before if same else _without(own, set_aside),
        before,
        {role: EvaluatedData(other_data[role], results) for role, results in others.items()},
        set_aside,
        update,
        leaked,
    )


def _without(results: SampleResults, set_aside: Tensor) -> SampleResults:
    return normalise_weights(replace(results, targeted=results.targeted & ~set_aside))


@dataclass(frozen=True)
class EvaluatedData:
    """Calibration or unseen data: this rank's `sources`, and the results of all ranks `before` the
    repair.
    """

    sources: Sequence[Source]
    before: SampleResults

    def flips(self, evaluator: Evaluator, state: State) -> Flips:
        """Evaluates the model with the tensors of `state` on these data, and compares the results
        with `before`.
        """
        return Flips.between(self.before, evaluator.run_with(state, self.sources))


def evaluate_other_data(
    evaluator: Evaluator, sources: Sequence[Source], settings: Settings
) -> SampleResults:
    """Evaluates calibration or unseen data and marks the failures in the target. These failures are only
    reported.

    If the target cannot be applied, for instance because these data lack a column, a warning says
    so and no failure is marked. Any other error is raised. If it occurs on one rank only, the other
    ranks raise an error, too.
    """
    try:
        return settings.samples.evaluate(
            evaluator, sources, settings.target, everywhere=True, known=False
        )[0]
    except Exception as error:
        # If one rank fails, all ranks get here. They evaluate again unless a rank has an error of
        # another kind.
        if evaluator.collective.any(not isinstance(error, (TargetError, OtherRankError))):
            raise
        problem = f"the failures in the target are not counted on held-out data: {error}"
        warnings.warn(DataWarning(problem), stacklevel=3)
    return settings.samples.evaluate(evaluator, sources, known=False)[0]


MAX_LISTED_IDS = 10  # ids of samples in a message


class LeakCheck:
    """Finds calibration samples that are also known, and unseen samples that are also known or
    calibration data.

    First run the model over the attributes `known` and `other_data`, then call `leaked`. The
    attributes wrap the given sources to record a hash of each sample. Two samples are the same if
    their inputs and labels are bitwise equal, or if they have the same position in the same data
    set, even if subsets or unions wrap the data set.
    """

    def __init__(
        self, known: Sequence[Source], other_data: Mapping[Role, Sequence[Source]]
    ) -> None:
        watched = any(other_data.values())
        self.known: Sequence[Source] = (
            [content_recorder(source) for source in known] if watched else known
        )
        self.other_data: dict[Role, Sequence[Source]] = {
            role: [content_recorder(source) for source in sources]
            for role, sources in other_data.items()
        }

    def leaked(self, collective: Collective) -> dict[str, int]:
        """Returns the number of leaked samples for each unseen split with leaks, and warns about
        these
        samples.

        Call this after a pass over all sources. Raises a `ConfigurationError` if a calibration
        sample is also known.
        """
        found: dict[str, int] = {}
        others = [source for source in self.known if isinstance(source, RecordingSource)]
        for role in ("calibration", "unseen"):
            own = [
                source
                for source in self.other_data.get(role, ())
                if isinstance(source, RecordingSource)
            ]
            for source in own:
                again = _leaked_rows(source, others, collective)
                if not again.any():
                    continue
                ids = source.index[again].tolist()
                some = f"{ids[:MAX_LISTED_IDS]}{' ...' if len(ids) > MAX_LISTED_IDS else ''}"
                what = f"{len(ids):,} of the {len(again):,} samples of `{source.split}` are"
                if role == "calibration":
                    raise ConfigurationError(
                        f"`calibration`: {what} known data too ({some}).",
                        "remove them from one of the two: a bound holds only for unused samples.",
                    )
                found[source.split] = len(ids)
                problem = f"`unseen`: {what} known or calibration data too ({some})."
                hint = "remove them: they make the counts on unseen data too good."
                warnings.warn(DataWarning(problem, hint), stacklevel=4)
            others += own
        return found


def _leaked_rows(
    source: RecordingSource, others: Sequence[RecordingSource], collective: Collective
) -> Tensor:
    """Returns a mask of the source's samples on all ranks. It is True for samples that are also in
    `others`.
    """
    keys = source.gathered(collective)
    again = is_among(keys, torch.cat([other.gathered(collective) for other in others]))
    identified = [other.source.identity for other in others if isinstance(other.source, Identified)]
    if isinstance(source.source, Identified) and identified:
        again |= is_among(source.source.identity, torch.cat(identified))
    return again
