"""A sweep of settings and seeds over a module and its data, without Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from lightning_nrl._model.layers import find_scope
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.analysis.sweep._store import RunStore
from lightning_nrl.analysis.sweep.grid import Grid, Sweepable, parse_settings
from lightning_nrl.analysis.sweep.study import Study, SweepObserver
from lightning_nrl.analysis.sweep.sweep_result import SweepResult
from lightning_nrl.analysis.sweep.trials import Trials
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.methods import Auto
from lightning_nrl.pipeline.baseline import evaluate_baseline
from lightning_nrl.pipeline.input_checks import check_sources, check_targets, given_or_default
from lightning_nrl.pipeline.problem_builder import build_problem
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.report import Role
from lightning_nrl.search import ParticleSwarm

__all__ = ["Seeds", "check_trials", "parse_seeds", "swarming", "sweep_module"]

Seeds = int | Sequence[int]
"""How many seeds, from 0 on, or which."""


def sweep_module(
    model: nn.Module | Evaluator,
    known: Sequence[Source],
    settings: Sweepable,
    *,
    seeds: Seeds = 10,
    base: Settings | None = None,
    unseen: Sequence[Source] = (),
    calibration: Sequence[Source] = (),
    dirpath: str | Path | None = None,
    trials: Trials | None = None,
    observer: SweepObserver | None = None,
) -> SweepResult:
    """Runs every setting with every seed, each as a single repair by `ParticleSwarm` would, and counts all of them.

    Known data are recorded once and swarms searched many at a time; each finds, bit for bit, what `repair` finds with
    the same arguments at strength 1. No gate judges, and the model is left as found.

    Args:
        model: the trained model on its device, as for `repair_module`; it runs in evaluation mode. The ranks of an
            `Evaluator` share out the runs; each ends with the same result.
        known: data that searches may look at. All of it on each rank: ranks share out the runs, not the data.
        settings: what to try: a `Grid`, names of rows of Table II, or mappings of arguments.
        seeds: how many seeds, from 0 on, or a list of them.
        base: what all settings share, such as target, layer and what they leave open of the search; its method is a
            `ParticleSwarm`, or the default, which stands for one. Its `gate`, `strength`, `limit`, `sparse`, `keep`,
            `max_time` and `seed` do not matter.
        unseen: data that is only counted.
        calibration: data that no search looks at, to choose among runs by.
        dirpath: a folder in which runs are kept; those that are there already are not made again.
        trials: lets an Optuna sampler choose combinations of the grid, instead of running all.
        observer: is told how it goes.

    Raises:
        ConfigurationError: a setting, the layer, the data, the target or the task cannot be used, no failed sample is
            in the target or none passes.
        EvaluationError: the original model gives losses that are not finite.
    """
    evaluator, base = Evaluator.of(model), swarming(given_or_default(base))
    tried, numbers = parse_settings(settings, base), parse_seeds(seeds)
    check_trials(trials, settings)
    check_sources(known, (*calibration, *unseen), base)
    _check_counting(base)
    _check_whole((*known, *calibration, *unseen))
    include_bias = base.localizer.include_bias
    layers = find_scope(evaluator.model, base.layer, include_bias=include_bias, called=evaluator.called)
    # Each rank looks at all data, as they share out the runs.
    own, clock = replace(evaluator, collective=Collective()), StageTimer(observer)
    with preserve(evaluator.model):
        found = evaluate_baseline(own, known, base, unseen=unseen, calibration=calibration, clock=clock)
        check_targets(found.before, base)
        problem = build_problem(own, known, found.before, layers, base, clock=clock)
        data: dict[Role, tuple[Sequence[Source], SampleResults]] = {"known": (known, found.before)}
        data |= {role: (held_out.sources, held_out.before) for role, held_out in found.held_out.items()}
        store = RunStore(None if dirpath is None else Path(dirpath))
        study = Study(problem, base, data, evaluator.collective, store, observer)
        if trials is not None and isinstance(settings, Grid):
            return study.explore(settings, trials, numbers)
        return study.run([(setting, seed) for setting in tried for seed in numbers])


def check_trials(trials: Trials | None, settings: Sweepable) -> None:
    """Refuses trials of another kind, and of what is no grid."""
    check_kind("trials", trials, trials is None or isinstance(trials, Trials), "Trials", "Trials(40)")
    if trials is not None and not isinstance(settings, Grid):
        raise ConfigurationError(
            "`trials` go through a grid, and `settings` is none.", "write `settings=Grid(alpha=[4, 5, 6])`."
        )


def swarming(base: Settings) -> Settings:
    """The settings with a swarm where they name no method, and as they are where they do."""
    return replace(base, method=ParticleSwarm()) if isinstance(base.method, Auto) else base


def parse_seeds(seeds: Seeds) -> tuple[int, ...]:
    """The seeds that are meant; a `ConfigurationError` if there is none, one is there twice or out of range."""
    whole = isinstance(seeds, int) and not isinstance(seeds, bool)
    found = tuple(range(seeds)) if whole else tuple(seeds) if isinstance(seeds, Iterable) else ()  # type: ignore[arg-type]
    if not found or len(set(found)) < len(found):
        raise ConfigurationError(
            f"`seeds={seeds!r}` names no seed, or one twice.", "give how many, or a list such as [0, 1, 2]."
        )
    for seed in found:
        Settings(seed=seed)
    return found


def _check_counting(base: Settings) -> None:
    for name in ("slices", "quotas", "protected"):
        if getattr(base.samples, name) is not None:
            raise ConfigurationError(
                f"`{name}`: the table of a sweep has no column for it.",
                f"leave `{name}` out, and give it to `repair` with the run that you choose.",
            )


def _check_whole(sources: Iterable[Source]) -> None:
    for source in sources:
        if len(source.positions) < len(source.index):
            raise ConfigurationError(
                f"`{source.split}` data are shared out: {len(source.positions)} of {len(source.index)} are here.",
                "give each rank all of the data; a sweep shares out the runs.",
            )
