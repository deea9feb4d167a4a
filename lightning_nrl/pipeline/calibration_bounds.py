"""Limits on what an accepted repair breaks in data to come, from calibration data that may have chosen its strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.data.batch import Source
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.flips import Flips
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.evaluation.slices import renumbered
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.report.calibration import CalibrationBounds, SliceLimit
from lightning_nrl.stats import SliceBounds, check_mix, weighted_bound
from lightning_nrl.stats.post_selection import Selection, limit_after
from lightning_nrl.stats.slice_bounds import Name

__all__ = ["Groups", "bounds_after", "groups_of"]


@dataclass(frozen=True)
class Groups:
    """Which slice each sample is in; without slices its class.

    Attributes:
        names: of the slices.
        calibration: `N` int64, a number for each calibration sample; -1: in none.
        repair: `M` int64, likewise for each sample of the data whose failures may be repaired.
    """

    names: tuple[str, ...]
    calibration: Tensor
    repair: Tensor


def groups_of(known: Sequence[Source], before: SampleResults, calibration: SampleResults, settings: Settings) -> Groups:
    """The slices of calibration and of repair data.

    Args:
        known: all known sources; those marked `failed` are the repair data.
        before: the original model on them.
        calibration: likewise on calibration data.
        settings: whether slices are told apart, and which mix of them is expected.

    Raises:
        ConfigurationError: the expected mix is not about the slices of the calibration data.
    """
    failed = torch.cat([torch.full((len(source.index),), source.failed) for source in known])
    if settings.samples.slices is not None:
        names = tuple(sorted({*calibration.names, *before.names}))
        here, there = (renumbered(table.names, table.group, names) for table in (calibration, before))
    else:
        classes = torch.cat([calibration.label, before.label]).unique()
        classes = classes[classes >= 0]
        names = tuple(map(str, classes.tolist()))
        here, there = (_classes(table.label, classes) for table in (calibration, before))
    found = Groups(names, here, there[failed])
    if settings.bounds.mix is not None:
        _check_mix(found, calibration, _mix(settings))
    return found


def bounds_after(
    before: SampleResults, after: SampleResults, groups: Groups, selection: Selection, settings: Settings
) -> CalibrationBounds:
    """The limits that hold of the accepted model.

    The one on all samples is that of `limit_after`. Those of slices, all together, and that under a mix hold for each
    set of weights that might have been chosen: each of C has the C-th part of what may fail (Bonferroni).

    Args:
        before: the original model on calibration data.
        after: the accepted one.
        groups: the slices.
        selection: what say the calibration data had.
        settings: the confidence, the slices and the mix.
    """
    flips = Flips.between(before, after)
    counts = flips.counts()
    sure = 1 - (1 - settings.bounds.confidence) / selection.states
    passed = flips.kept | flips.broken
    slices = _slices(groups, flips.broken, passed, sure) if groups.names else None
    shown = slices is not None and (settings.samples.slices is not None or settings.bounds.mix is not None)
    weighted = (
        weighted_bound(slices, _mix(settings), sure).upper if slices is not None and settings.bounds.mix else None
    )
    return CalibrationBounds(
        broken=counts.broken,
        n=counts.passed,
        confidence=settings.bounds.confidence,
        upper=limit_after(counts.broken, counts.passed, selection, settings.bounds.confidence),
        states=selection.states,
        allowed=selection.allowed,
        slices=tuple(SliceLimit(str(name), b.broken, b.n, b.upper) for name, b in slices.bounds.items())
        if slices is not None and shown
        else (),
        mix=None if weighted is None else {str(name): share for name, share in _mix(settings).items()},
        weighted=weighted,
        warning=_warning(groups),
    )


def _check_mix(groups: Groups, calibration: SampleResults, mix: Mapping[Name, float]) -> None:
    """Before the repair, whose work would be lost if it came to light at the end."""
    nothing = torch.zeros_like(calibration.passed)
    try:
        weighted_bound(_slices(groups, nothing, calibration.passed, 0.95), mix)
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("`shares`", "`mix`")) from error


def _slices(groups: Groups, broken: Tensor, passed: Tensor, confidence: float) -> SliceBounds:
    rows = {name: groups.calibration == i for i, name in enumerate(groups.names)}
    there = {name: own for name, own in rows.items() if own.any()}
    bad: dict[Name, int] = {name: int((broken & own).sum()) for name, own in there.items()}
    right: dict[Name, int] = {name: int((passed & own).sum()) for name, own in there.items()}
    return SliceBounds.of(bad, right, confidence)


def _warning(groups: Groups) -> str:
    here, there = (group[group >= 0].tolist() for group in (groups.calibration, groups.repair))
    if not here or not there:
        return ""
    return check_mix([groups.names[i] for i in here], [groups.names[i] for i in there]).warning


def _classes(label: Tensor, classes: Tensor) -> Tensor:
    """Each label's place among ascending classes; -1 where the task has none."""
    return torch.where(label < 0, -1, torch.searchsorted(classes, label.contiguous()))


def _mix(settings: Settings) -> dict[Name, float]:
    return {str(name): share for name, share in (settings.bounds.mix or {}).items()}
