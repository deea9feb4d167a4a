"""Builds the `Problem` of a repair. Hashes the inputs of the repair, to tell whether saved steps
can be reused.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._utils.state import current_state, hash_file, hash_tensors
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.methods import Problem, Training
from lightning_nrl.pipeline.baseline import Baseline
from lightning_nrl.pipeline.settings import Settings, plain_value
from lightning_nrl.records import installed_versions


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
    """Builds the problem for a method. `layers` is the result of `find_scope`. `rest` are other
    fields of `Problem`.
    """
    space, scope = layers
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
        clock=StageTimer() if clock is None else clock,
        seed=settings.seed,
        memory_limit=settings.search.memory_limit,
        n_scored=settings.search.n_scored,
        training=training,
        whole=settings.layer == "auto",
        gate=settings.gate,
        **rest,
    )


def passed_rows(before: SampleResults, known: Sequence[Source], settings: Settings) -> Tensor:
    """Returns a mask of known samples. It marks the passed samples to score (I_pos): all or
    `n_passed` random ones.
    """
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


NEUTRAL_SETTINGS = ("save_every",)  # settings that do not affect the result


def origin_of(problem: Problem, baseline: Baseline, settings: Settings) -> dict[str, str]:
    """Returns hashes of everything that a repair depends on, by name. Steps saved with the same
    hashes
    can be reused.

    Instead of samples, the model's results on them are hashed: if the input of a sample changes,
    its loss changes, too.
    """
    model, training = problem.model, problem.training
    versions = installed_versions()
    plain = {
        name: value for name, value in settings.plain().items() if name not in NEUTRAL_SETTINGS
    }
    calibration = baseline.other_data.get("calibration")
    surroundings = {
        "task": plain_value(problem.evaluator.task),
        "device": problem.device.type,
        "ranks": problem.collective.world_size,
        "scope": list(problem.scope),
        "training": None if training is None else training.epochs,
        "update": problem.update,
        "tensors of the method": _tensors_of((settings.method, settings.localizer)),
    }
    return {
        "weights": hash_tensors(current_state(model)),
        "data": _text_hash(
            [_table(problem.before), None if calibration is None else _table(calibration.before)]
        ),
        "settings": _text_hash([type(model).__qualname__, plain, surroundings]),
        "training": _text_hash(None if training is None else training.origin),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("lightning_nrl", "torch")),
    }


def _text_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _table(results: SampleResults) -> list[Any]:
    columns = {f.name: getattr(results, f.name) for f in fields(results)}
    rest = {name: value for name, value in columns.items() if not isinstance(value, Tensor)}
    return [hash_tensors(columns), rest]


def _tensors_of(value: Any) -> Any:
    """Returns hashes of the models, states, files and folders in a method, since `plain_value`
    omits their contents.
    """
    if isinstance(value, nn.Module):
        return hash_tensors(value.state_dict())
    if isinstance(value, Mapping):
        own = {str(key): item for key, item in value.items()}
        return [
            hash_tensors(own),
            {key: _tensors_of(item) for key, item in own.items() if isinstance(item, Mapping)},
        ]
    if isinstance(value, (list, tuple)):
        return [_tensors_of(item) for item in value]
    if isinstance(value, (str, Path)):
        with suppress(OSError, ValueError):
            path = Path(value)
            if path.is_file():
                return hash_file(path)
            if str(value) and path.is_dir():
                return sorted(
                    (file.name, hash_file(file)) for file in path.iterdir() if file.is_file()
                )
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _tensors_of(getattr(value, f.name)) for f in fields(value)}
    return None
