"""What the original model does on all data, and what of that a repair is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation import DOUBTFUL
from lightning_nrl.evaluation.evaluator import Context, SampleResults, collect
from lightning_nrl.evaluation.label_issues import find_label_issues
from lightning_nrl.evaluation.quotas import normalised
from lightning_nrl.pipeline.calibration_bounds import Groups, groups_of
from lightning_nrl.pipeline.input_checks import check_losses, check_task, see_aside
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.reference.old_model import Reference
from lightning_nrl.reference.update import Update, look_back
from lightning_nrl.report import Role
from lightning_nrl.tasks import Task

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
    model: nn.Module,
    known: Sequence[Source],
    others: Mapping[Role, Sequence[Source]],
    settings: Settings,
    *,
    task: Task,
    context: Context,
    collective: Collective,
    clock: StageTimer,
    reference: Reference | None = None,
) -> Baseline:
    """Makes a pass over all data.

    Args:
        model: the original model, in evaluation mode on its device.
        known: data that the repair may look at.
        others: data that no search looks at, by role; none of them empty.
        settings: what is targeted, how much samples count, and what is set aside.
        task: what passed and loss mean.
        context: entered around every forward pass.
        collective: the ranks that share the data.
        clock: keeps the time of each pass.
        reference: the model that this one replaces.

    Raises:
        ConfigurationError: the data, the target, the task or the reference cannot be used.
        EvaluationError: losses are not finite; the samples are named.
    """
    see = partial(collect, task=task, context=context, collective=collective)
    with clock.stage("collect"):
        whole = partial(see, model, target=settings.target, everywhere=reference is not None)
        before, left_out = settings.counting.over(whole, known, task, collective)
    aside: dict[Role, SampleResults] = {}
    for role, sources in others.items():
        with clock.stage("unseen"):
            aside[role] = see_aside(see, model, sources, settings, task, collective)
    groups = groups_of(known, before, aside["calibration"], settings) if "calibration" in aside else None
    check_losses(before)
    check_task(settings, before, task)
    update, own = None, before
    if reference is not None:
        with clock.stage("reference"):
            update = look_back(
                reference,
                model,
                {"known": known, **others},
                {"known": before, **aside},
                task=task,
                context=context,
                collective=collective,
            )
        own = update.regressions("known", before)
        aside = {role: update.regressions(role, evidence) for role, evidence in aside.items()}
        before = update.kept(own, settings.keep)
    if settings.set_aside == DOUBTFUL:
        with clock.stage("labels"):
            left_out = find_label_issues(model, known, before, task=task, context=context, collective=collective)
    same, before = own is before, _weighed(before, left_out)
    return Baseline(before if same else _weighed(own, left_out), before, aside, left_out, update, groups)


def _weighed(evidence: SampleResults, left_out: Tensor) -> SampleResults:
    """The evidence without targets that are set aside, those that are left weighing 1 on average."""
    return normalised(replace(evidence, targeted=evidence.targeted & ~left_out))
