"""Builds the `Problem` of a repair, and hashes its inputs to tell if saved steps can be reused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.preserve import shuffled
from lightning_nrl._utils.state import current_state, hash_tensors
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data import Source
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.head_features import HeadRecord, row_batches
from lightning_nrl.evaluation.layers import ParameterSpace, last_linear
from lightning_nrl.methods import Problem, Training
from lightning_nrl.methods.known_record import KnownRecord
from lightning_nrl.pipeline.baseline import Baseline
from lightning_nrl.pipeline.plain_values import (
    content_hashes,
    fields_of,
    plain_value,
    text_hash,
)
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.records import installed_versions
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.recording import head_cache

FEW = 4  # samples that show if the last layer gives the logits


def build_problem(
    evaluator: Evaluator,
    known: Sequence[Source],
    baseline: Baseline,
    layers: tuple[ParameterSpace, tuple[str, ...]],
    settings: Settings,
    *,
    clock: StageTimer | None = None,
    training: Training | None = None,
) -> Problem:
    """Builds the problem for a method.

    `layers` is the result of `find_scope`. The other arguments are fields of `Problem`.
    """
    space, scope = layers
    before = baseline.before
    if training is not None:
        training = training.for_targets(before.targeted)
    return Problem(
        evaluator,
        known,
        before,
        space,
        scope,
        settings.localizer,
        settings.fitness,
        passed_rows(before, known, settings),
        clock=clock or StageTimer(),
        seed=settings.seed,
        memory_limit=settings.search.memory_limit,
        n_scored=settings.search.n_scored,
        training=training,
        whole_network=settings.layer == "auto",
        update=baseline.update is not None,
        gate=settings.gate,
        record=KnownRecord(_head_cache(evaluator, known, before, space, baseline.record)),
    )


def _head_cache(
    evaluator: Evaluator,
    known: Sequence[Source],
    before: SampleResults,
    space: ParameterSpace,
    record: HeadRecord | None,
) -> ActivationCache | None:
    """Returns the recorded activations if the last layer is what the method changes."""
    _, head = last_linear(evaluator.model, evaluator.called)
    if record is None or [site.module for site in space.sites] != [head]:
        return None
    few = next(row_batches(known, before, record.rows[:FEW]), None)
    cache = None
    if few is not None:
        cache = head_cache(evaluator, space, record, few[0])
    return None if evaluator.collective.any(cache is None) else cache


def passed_rows(before: SampleResults, known: Sequence[Source], settings: Settings) -> Tensor:
    """Returns a mask of the passed samples to score (I_pos): all, or `n_passed` random ones."""
    n_passed = settings.search.n_passed
    if n_passed is None:
        return before.passed
    mask = torch.zeros_like(before.passed)
    splits = [source.split for source in known if source.passed]
    for split in splits:
        mask[before.of(split)] = True
    rows = (mask & before.passed).nonzero().flatten()
    if 0 < len(rows) < n_passed:
        names = " and ".join(splits)
        problem = (
            f"`n_passed={n_passed}`: only {len(rows):,} samples of {names} pass; all are scored."
        )
        hint = (
            "leave `n_passed` out to score every known passed sample, "
            "or mark more data as `passed`."
        )
        warnings.warn(DataWarning(problem, hint), stacklevel=2)
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.zeros_like(mask)
    drawn[shuffled(rows, generator)[:n_passed]] = True
    return drawn


def origin_of(problem: Problem, baseline: Baseline, settings: Settings) -> dict[str, str]:
    """Returns hashes of everything that a repair depends on, by name.

    Steps saved with the same hashes can be reused. Instead of samples, the model's results on them
    are hashed: if the input of a sample changes, its loss changes, too.
    """
    plain = settings.plain()
    del plain["save_every"]  # does not affect the result
    tables = [_plain_table(problem.before)]
    if "calibration" in baseline.other_data:
        tables.append(_plain_table(baseline.other_data["calibration"].before))
    surroundings = {
        "model": type(problem.model).__qualname__,
        "task": plain_value(problem.evaluator.task),
        "device": problem.device.type,
        "ranks": problem.collective.world_size,
        "scope": problem.scope,
        "update": problem.update,
        "tensors of the method": content_hashes((settings.method, settings.localizer)),
    }
    training = None
    if problem.training is not None:
        training = problem.training.epochs, problem.training.origin
    versions = installed_versions()
    return {
        "weights": hash_tensors(current_state(problem.model)),
        "data": text_hash(tables),
        "settings": text_hash([plain, surroundings]),
        "training": text_hash(training),
        "versions": f"lightning_nrl {versions['lightning_nrl']}, torch {versions['torch']}",
    }


def _plain_table(results: SampleResults) -> list[object]:
    return [hash_tensors(fields_of(results)), results.splits, results.sizes, results.slices]
