"""Many settings and seeds of the paper's search on one problem. Knows nothing of Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch

from lightning_nrl._model.layers import find_scope, layer_names
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.hashing import hash_tensors
from lightning_nrl._utils.timing import Observer
from lightning_nrl.analysis.sweep._batch_search import BatchSearch, RunRequest, batches
from lightning_nrl.analysis.sweep._recount import Recount
from lightning_nrl.analysis.sweep._store import RunStore, StoredRun, digest, exchanged, results_digest
from lightning_nrl.analysis.sweep.grid import Grid, Setting, parse_settings
from lightning_nrl.analysis.sweep.run import Run
from lightning_nrl.analysis.sweep.sweep_result import SweepResult
from lightning_nrl.analysis.sweep.trials import Combination, Trials
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.problem import Problem
from lightning_nrl.report import Role
from lightning_nrl.search import SearchHistory

__all__ = ["Study", "SweepObserver"]

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
        return digest([model, evidence, passed, self.base.plain()["layer"], repr(self.problem.task)])

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
