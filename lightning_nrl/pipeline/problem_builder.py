"""The one place that turns evaluated data and settings into a `Problem`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.methods import Problem, Training
from lightning_nrl.pipeline.settings import Settings


def build_problem(
    evaluator: Evaluator,
    known: Sequence[Source],
    before: SampleResults,
    layers: tuple[ParameterSpace, tuple[str, ...]],
    settings: Settings,
    *,
    clock: StageTimer | None = None,
    training: Training | None = None,
    **rest: Any,
) -> Problem:
    """What a method is given; `layers` as of `find_scope`, no limit of time without a clock, `rest` as of `Problem`."""
    space, scope = layers
    for_targets = getattr(training, "for_targets", None)
    if for_targets is not None:
        training = for_targets(before.targeted)
    return Problem(
        evaluator,
        known,
        before,
        space,
        scope,
        settings.localizer,
        settings.fitness,
        passed_rows(before, known, settings),
        clock=StageTimer() if clock is None else clock,
        seed=settings.seed,
        budget=settings.search.budget,
        n_scored=settings.search.n_scored,
        training=training,
        whole=settings.layer == "auto",
        gate=settings.gate,
        **rest,
    )


def passed_rows(before: SampleResults, known: Sequence[Source], settings: Settings) -> Tensor:
    """I_pos, `N` bool: every known passed sample, or a sample of those from the passed data (#pos in the paper)."""
    if settings.search.n_passed is None:
        return before.passed
    pool = torch.zeros_like(before.passed)
    for source in known:
        if source.passed:
            pool[before.of(source.split)] = before.passed[before.of(source.split)]
    rows = pool.nonzero().flatten()
    generator = torch.Generator().manual_seed(settings.seed)
    if 0 < len(rows) < settings.search.n_passed:
        splits = " and ".join(source.split for source in known if source.passed)
        problem = f"`n_passed={settings.search.n_passed}`: only {len(rows):,} samples of {splits} pass; all are scored."
        hint = "leave `n_passed` out to score every known passed sample, or mark more data as `passed`."
        warnings.warn(DataWarning(problem, hint), stacklevel=2)
    drawn = torch.zeros_like(pool)
    drawn[rows[torch.randperm(len(rows), generator=generator)[: settings.search.n_passed]]] = True
    return drawn
