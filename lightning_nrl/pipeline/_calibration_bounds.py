"""Upper limits on what an accepted repair breaks in data to come, from calibration data that may choose strength."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.data.batch import Source
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation.sample_results import Flips, SampleResults
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
        calibration: `N` int64, the slice of each calibration sample, by its place among `names`; -1: in none.
        repair: `M` int64, likewise for the known samples of the data whose failures may be repaired.
    """

    names: tuple[str, ...]
    calibration: Tensor
    repair: Tensor


def groups_of(known: Sequence[Source], before: SampleResults, calibration: SampleResults, settings: Settings) -> Groups:
    """The slices of calibration data and of the known data whose failures may be repaired.

    Warns:
        DataWarning: the expected mix is not about the slices of the calibration data; there will be no limit for it.
    """
    tables = (calibration, before)
    if settings.samples.slices is not None:
        names = tuple(sorted({*calibration.names, *before.names}))
        numbers = [renumbered(table.names, table.group, names) for table in tables]
    else:
        classes = torch.cat([table.label for table in tables]).unique()
        classes = classes[classes >= 0]
        names = tuple(map(str, classes.tolist()))
        numbers = [_class_numbers(table.label, classes) for table in tables]
    repairable = torch.cat([torch.full((len(source.index),), source.failed) for source in known])
    groups = Groups(names, numbers[0], numbers[1][repairable])
    if settings.bounds.mix is not None:
        # Before the repair, whose work would be lost if it came to light at the end.
        nothing_broken = torch.zeros_like(calibration.passed)
        try:
            weighted_bound(_slice_bounds(groups, nothing_broken, calibration.passed, 0.95), _mix(settings))
        except ConfigurationError as error:
            # Training is over, and this is known only now.
            problem, _, hint = str(error).replace("`shares`", "`mix`").partition("\nHINT: ")
            warnings.warn(DataWarning(f"{problem} The report gives no limit under this mix.", hint), stacklevel=2)
    return groups


def bounds_after(
    before: SampleResults, after: SampleResults, groups: Groups, selection: Selection, settings: Settings
) -> CalibrationBounds:
    """The limits that hold of the accepted model, from both models' results on calibration data.

    The one on all samples is that of `limit_after`. Those of slices, all together, and that under a mix hold for each
    set of weights that might have been chosen: each of C has the C-th part of what may fail (Bonferroni).
    """
    flips, options = Flips.between(before, after), settings.bounds
    counts, confidence = flips.counts(), 1 - (1 - options.confidence) / selection.states
    limits: tuple[SliceLimit, ...] = ()
    weighted: float | None = None
    if groups.names and (settings.samples.slices is not None or options.mix is not None):
        slices = _slice_bounds(groups, flips.broken, flips.kept | flips.broken, confidence)
        limits = tuple(SliceLimit(str(name), b.broken, b.n, b.upper) for name, b in slices.bounds.items())
        with suppress(ConfigurationError):  # was warned of
            weighted = weighted_bound(slices, _mix(settings), confidence).upper if options.mix else None
    return CalibrationBounds(
        broken=counts.broken,
        n=counts.passed,
        confidence=options.confidence,
        upper=limit_after(counts.broken, counts.passed, selection, options.confidence),
        states=selection.states,
        allowed=selection.allowed,
        slices=limits,
        mix=None if weighted is None else {str(name): share for name, share in _mix(settings).items()},
        weighted=weighted,
        warning=_mix_warning(groups),
    )


def _slice_bounds(groups: Groups, broken: Tensor, passed: Tensor, confidence: float) -> SliceBounds:
    """Of the slices that calibration samples are in; `broken` and `passed` are `N` bool."""
    members = {name: groups.calibration == number for number, name in enumerate(groups.names)}
    n_broken: dict[Name, int] = {name: int((broken & own).sum()) for name, own in members.items() if own.any()}
    n_passed: dict[Name, int] = {name: int((passed & own).sum()) for name, own in members.items() if own.any()}
    return SliceBounds.of(n_broken, n_passed, confidence)


def _mix_warning(groups: Groups) -> str:
    """What there is to say of calibration and repair data that mix slices otherwise; empty if nothing."""
    calibration, repair = (
        [groups.names[i] for i in own[own >= 0].tolist()] for own in (groups.calibration, groups.repair)
    )
    return check_mix(calibration, repair).warning if calibration and repair else ""


def _class_numbers(label: Tensor, classes: Tensor) -> Tensor:
    """Each label's place among ascending classes; -1 where the task has none."""
    return torch.where(label < 0, -1, torch.searchsorted(classes, label.contiguous()))


def _mix(settings: Settings) -> dict[Name, float]:
    return {str(name): share for name, share in (settings.bounds.mix or {}).items()}
