"""What the original model does on all data, and what of that a repair is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_nrl._model.layers import refusing_batch_statistics
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data import Source
from lightning_nrl.evaluation import DOUBTFUL, Evaluator, SampleResults
from lightning_nrl.evaluation._neighbors import find_label_issues
from lightning_nrl.evaluation._quotas import normalised
from lightning_nrl.pipeline._calibration_bounds import Groups, groups_of
from lightning_nrl.pipeline._data_leakage import LeakCheck
from lightning_nrl.pipeline._held_out import HeldOut, evaluate_held_out
from lightning_nrl.pipeline._input_checks import check_losses, check_task
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.reference._update import Update, look_back
from lightning_nrl.reference.old_model import Reference
from lightning_nrl.report import Role

__all__ = ["Baseline", "evaluate_baseline"]


@dataclass(frozen=True)
class Baseline:
    """What the original model does on all data.

    Attributes:
        known: its results on known data; what is to be repaired is `targeted`, without what is set aside.
        before: the same, with those samples as `passed` that may not break; other than `known` only in an update that
            keeps no more than what the replaced model gets right.
        held_out: data that no search uses, and its results on them, by role; roles without data are left out.
        set_aside: `N` bool, known failed samples that are no targets although they are in the target.
        update: what the replaced model does; None: there is none.
        groups: the slices of calibration and repair data; None without calibration data.
        leaked: by unseen split, how many of its samples are known too; splits without any are left out.
    """

    known: SampleResults
    before: SampleResults
    held_out: Mapping[Role, HeldOut]
    set_aside: Tensor
    update: Update | None = None
    groups: Groups | None = None
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
    """Makes a pass over all data; the clock keeps the time of each. The arguments are those of `repair_module`.

    Raises:
        ConfigurationError: the data, the target, the task or the reference cannot be used, or calibration data are
            known too.
        EvaluationError: losses are not finite; the samples are named.
    """
    roles: dict[Role, Sequence[Source]] = {"calibration": calibration, "unseen": unseen}
    held_out = {role: sources for role, sources in roles.items() if sources}
    leaks = LeakCheck(known, held_out)
    with clock.stage("collect"), refusing_batch_statistics(evaluator.model):
        before, set_aside = settings.samples.evaluate(
            evaluator, leaks.known, settings.target, everywhere=reference is not None
        )
    others: dict[Role, SampleResults] = {}
    for role, sources in leaks.held_out.items():
        with clock.stage("unseen"):
            others[role] = evaluate_held_out(evaluator, sources, settings)
    leaked = leaks.leaked(evaluator.collective)
    groups = groups_of(known, before, others["calibration"], settings) if "calibration" in others else None
    check_losses(before)
    check_task(settings, before, evaluator.task)
    update, own = None, before
    if reference is not None:
        with clock.stage("reference"):
            update = look_back(reference, evaluator, {"known": known, **held_out}, {"known": before, **others})
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
        {role: HeldOut(held_out[role], results) for role, results in others.items()},
        set_aside,
        update,
        groups,
        leaked,
    )


def _without(results: SampleResults, set_aside: Tensor) -> SampleResults:
    """The results without targets that are set aside, those that are left weighing 1 on average."""
    return normalised(replace(results, targeted=results.targeted & ~set_aside))
