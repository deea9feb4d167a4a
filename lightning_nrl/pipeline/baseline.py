"""What the original model does on all data, and what of that a repair is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation import DOUBTFUL, Evaluator
from lightning_nrl.evaluation.label_issues import find_label_issues
from lightning_nrl.evaluation.quotas import normalised
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.pipeline.calibration_bounds import Groups, groups_of
from lightning_nrl.pipeline.input_checks import check_losses, check_task, see_aside
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.reference.old_model import Reference
from lightning_nrl.reference.update import Update, look_back
from lightning_nrl.report import Role

__all__ = ["Baseline", "look"]


@dataclass(frozen=True)
class Baseline:
    """What the original model does on all data.

    Attributes:
        known: the evidence on known data; what is to be repaired is `targeted`, without what is set aside.
        before: the same, with those samples as `passed` that may not break; other than `known` only in an update that
            keeps no more than what the replaced model gets right.
        aside: the evidence on data that no search looks at, by role.
        left_out: `N` bool, known failed samples that are set aside.
        update: what the replaced model does; None: there is none.
        groups: the slices of calibration and repair data; None without calibration data.
    """

    known: SampleResults
    before: SampleResults
    aside: Mapping[Role, SampleResults]
    left_out: Tensor
    update: Update | None = None
    groups: Groups | None = None


def look(
    evaluator: Evaluator,
    known: Sequence[Source],
    others: Mapping[Role, Sequence[Source]],
    settings: Settings,
    *,
    clock: StageTimer,
    reference: Reference | None = None,
) -> Baseline:
    """Makes a pass over all data.

    Args:
        evaluator: the original model, in evaluation mode, and what judges it.
        known: data that the repair may look at.
        others: data that no search looks at, by role; none of them empty.
        settings: what is targeted, how much samples count, and what is set aside.
        clock: keeps the time of each pass.
        reference: the model that this one replaces.

    Raises:
        ConfigurationError: the data, the target, the task or the reference cannot be used.
        EvaluationError: losses are not finite; the samples are named.
    """
    with clock.stage("collect"):
        before, left_out = settings.samples.over(evaluator, known, settings.target, everywhere=reference is not None)
    aside: dict[Role, SampleResults] = {}
    for role, sources in others.items():
        with clock.stage("unseen"):
            aside[role] = see_aside(evaluator, sources, settings)
    groups = groups_of(known, before, aside["calibration"], settings) if "calibration" in aside else None
    check_losses(before)
    check_task(settings, before, evaluator.task)
    update, own = None, before
    if reference is not None:
        with clock.stage("reference"):
            update = look_back(reference, evaluator, {"known": known, **others}, {"known": before, **aside})
        own = update.regressions("known", before)
        aside = {role: update.regressions(role, evidence) for role, evidence in aside.items()}
        before = update.kept(own, settings.samples.keep)
    if settings.samples.set_aside == DOUBTFUL:
        with clock.stage("labels"):
            left_out = find_label_issues(evaluator, known, before)
    same, before = own is before, _weighed(before, left_out)
    return Baseline(before if same else _weighed(own, left_out), before, aside, left_out, update, groups)


def _weighed(evidence: SampleResults, left_out: Tensor) -> SampleResults:
    """The evidence without targets that are set aside, those that are left weighing 1 on average."""
    return normalised(replace(evidence, targeted=evidence.targeted & ~left_out))
