"""Many settings and seeds of the paper's search on one problem. Knows nothing of Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.analysis.sweep.batch_search import BatchSearch, Recount, RunRequest, batches
from lightning_nrl.analysis.sweep.grid import Grid, Setting, Sweepable, parse_settings
from lightning_nrl.analysis.sweep.run_store import Run, RunStore, StoredRun, digest, exchanged, results_digest
from lightning_nrl.analysis.sweep.sweep_result import SweepResult
from lightning_nrl.analysis.sweep.trials import Combination, Trials
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_scope, layer_names
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods import Auto, Problem
from lightning_nrl.pipeline.baseline import evaluate_baseline
from lightning_nrl.pipeline.input_checks import check_sources, check_targets, given_or_default
from lightning_nrl.pipeline.problem_builder import build_problem
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.report import Role
from lightning_nrl.search import ParticleSwarm, SearchHistory

RECOUNT_AFTER = 5
"""Where data have to be read again to count runs, that is done once searching took so many times as long."""


class SweepObserver(Observer, Protocol):
    """Is told how a sweep goes on."""

    def show(self, done: int, total: int, note: str) -> None:
        """How many runs of how many are done, and what is to be said of the rest."""
        ...


class _Progress:
    """Tells an observer how many runs of `total` are done, and how long the rest takes if it goes on as it did.

    `work` is what this process has to do, as `RunRequest.work` has it; `done` are the runs that it has not to make.
    """

    def __init__(self, observer: SweepObserver | None, total: int, done: int, work: int) -> None:
        self.observer, self.total, self.done, self.work = observer, total, done, work
        self.worked = 0.0
        self.began = time.perf_counter()

    def within(self, part: Sequence[RunRequest], done: int, histories: list[SearchHistory]) -> None:
        """In the middle of some runs of one swarm: so many iterations were made."""
        share = done / max(1, part[0].setting.method.iterations)
        self._show(self.worked + sum(request.work for request in part) * share)

    def finish(self, part: Sequence[RunRequest]) -> None:
        """Some runs are done, early or not."""
        self.worked += sum(request.work for request in part)
        self.done += len(part)
        self._show(self.worked)

    def _show(self, worked: float) -> None:
        if self.observer is not None and worked:
            left = (time.perf_counter() - self.began) / worked * (self.work - worked)
            self.observer.show(self.done, self.total, f"{_duration(left)} left")


@dataclass
class Study:
    """A model and its data, for any number of runs: `data` are sources and results of the original model by role."""

    problem: Problem
    base: Settings
    data: Mapping[Role, tuple[Sequence[Source], SampleResults]]
    collective: Collective
    store: RunStore
    observer: SweepObserver | None = None
    _searches: dict[bool, tuple[BatchSearch, Mapping[Role, Recount]]] = field(default_factory=dict)
    _there: dict[str, StoredRun] = field(default_factory=dict)

    def run(self, wanted: Sequence[tuple[Setting, int]]) -> SweepResult:
        """All that are wanted, in order, the same on each rank: ranks share out those that are not there yet."""
        requests = [RunRequest(self._key(setting, seed), setting, seed) for setting, seed in wanted]
        there = self._there
        unknown = [request.key for request in requests if request.key not in there]
        there |= self._on_each_rank(lambda: self.store.read(unknown))
        missing = [request for request in requests if request.key not in there]
        mine = missing[self.collective.rank :: self.collective.world_size]
        there |= self._on_each_rank(lambda: self._made(mine, requests))
        return self._result(requests, there)

    def _on_each_rank(self, work: Callable[[], dict[str, StoredRun]]) -> dict[str, StoredRun]:
        """What all ranks have worked out together; where one raises, all do."""
        own = self.collective.all_or_none(work, "another rank could not make its runs of the sweep.")
        return exchanged(own, self.collective)

    def explore(self, grid: Grid, trials: Trials, seeds: Sequence[int]) -> SweepResult:
        """All runs of the combinations that a sampler chooses, each setting once; the first rank has the sampler."""
        settings: dict[str, Setting] = {}

        def evaluate(combinations: Sequence[Combination]) -> list[tuple[Run, ...]]:
            agreed = self.collective.agreed(torch.tensor(combinations)).tolist()
            asked = [parse_settings(grid.at(one), self.base)[0] for one in agreed]
            new = {setting.name: setting for setting in asked}
            result = self.run([(setting, seed) for setting in new.values() for seed in seeds])
            settings.update({name: setting for name, setting in new.items() if name not in settings})
            return [result.of(setting.name) for setting in asked]

        trials.explore(grid, evaluate, chooses=self.collective.rank == 0)
        return self.run([(setting, seed) for setting in settings.values() for seed in seeds])

    def _made(self, mine: Sequence[RunRequest], requests: Sequence[RunRequest]) -> dict[str, StoredRun]:
        """This rank's runs."""
        made: dict[str, StoredRun] = {}
        work = sum(request.work for request in mine)
        progress = _Progress(self.observer, len(requests), len(requests) - len(mine), work)
        biased: dict[bool, list[RunRequest]] = {}
        for request in mine:
            biased.setdefault(request.setting.localizer.include_bias, []).append(request)
        with self.problem.clock.stage("sweep"):
            for include_bias, own in biased.items():
                for new in self._counted(include_bias, own, progress):
                    self.store.write(new)
                    made |= new
                    self._result(requests, self._there | made)
        return made

    def _counted(
        self, include_bias: bool, requests: Sequence[RunRequest], progress: _Progress
    ) -> Iterator[dict[str, StoredRun]]:
        """Runs as they are counted; where data are read again for that, not after each few."""
        search, recounts = self._search(include_bias)
        waiting: dict[str, StoredRun] = {}
        searching = counting = 0.0
        parts = list(batches(requests, search.problem))
        for i, part in enumerate(parts):
            began = time.perf_counter()
            waiting |= search.run(part, partial(progress.within, part))
            searching += time.perf_counter() - began
            streams = any(recount.streams for recount in recounts.values())
            if streams and searching < RECOUNT_AFTER * counting and i < len(parts) - 1:
                progress.finish(part)
                continue
            began = time.perf_counter()
            new = _with_counts(waiting, recounts)
            counting, searching, waiting = time.perf_counter() - began, 0.0, {}
            yield new
            progress.finish(part)

    def _search(self, include_bias: bool) -> tuple[BatchSearch, Mapping[Role, Recount]]:
        if include_bias not in self._searches:
            problem = self.problem
            if include_bias != self.base.localizer.include_bias:
                called = problem.evaluator.called
                layer = self.base.layer
                space, scope = find_scope(problem.model, layer, include_bias=include_bias, called=called)
                problem = replace(problem, space=space, scope=scope)
            recounts = {role: Recount(problem, sources, before) for role, (sources, before) in self.data.items()}
            self._searches[include_bias] = BatchSearch(problem, self.base), recounts
        return self._searches[include_bias]

    @cached_property
    def _ground(self) -> str:
        """Tells model, data and target from others."""
        evidence = {role: results_digest(before) for role, (_, before) in self.data.items()}
        model = hash_tensors(self.problem.model.state_dict())
        passed = [source.split for source in self.problem.known if source.passed]
        return digest([model, evidence, passed, self.base.plain()["layer"], repr(self.problem.evaluator.task)])

    def _key(self, setting: Setting, seed: int) -> str:
        return digest([self._ground, setting.plain(), seed])

    def _result(self, requests: Sequence[RunRequest], there: Mapping[str, StoredRun]) -> SweepResult:
        """Those of the runs that are there; their table is written."""
        requests = [request for request in requests if request.key in there]
        # What was kept may have had another label.
        kept = {(request.setting.name, request.seed): there[request.key] for request in requests}
        runs = tuple(replace(stored.run, setting=name) for (name, _), stored in kept.items())
        original = {
            include_bias: {
                name: parameter.detach().cpu().clone()
                for name, parameter in self._search(include_bias)[0].problem.space.parameters.items()
            }
            for include_bias in {request.setting.localizer.include_bias for request in requests}
        }
        settings = {request.setting.name: request.setting for request in requests}
        target, layer = str(self.base.target), ", ".join(layer_names(self.base.layer))
        result = SweepResult(runs, target, layer, settings=settings, weights=kept, original=original)
        if self.store.folder is not None and self.collective.rank == 0:
            self.store.folder.mkdir(parents=True, exist_ok=True)
            result.to_csv(self.store.folder / "sweep.csv")
        return result


def _with_counts(found: Mapping[str, StoredRun], recounts: Mapping[Role, Recount]) -> dict[str, StoredRun]:
    """The same runs, and what their weights do."""
    began = time.perf_counter()
    columns = {role: count(list(found.values())) for role, count in recounts.items()}
    share = (time.perf_counter() - began) / len(found)
    counted = {}
    for i, (key, stored) in enumerate(found.items()):
        counts: dict[str, Any] = {role: column[i] for role, column in columns.items()}
        run = replace(stored.run, seconds=round(stored.run.seconds + share, 4), **counts)
        counted[key] = replace(stored, run=run)
    return counted


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"about {math.ceil(seconds)} s"
    return f"about {math.ceil(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


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
