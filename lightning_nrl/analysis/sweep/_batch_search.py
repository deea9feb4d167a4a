"""Many searches on one recording: what each would find by itself, found together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._scoring import ActivationCache
from lightning_nrl._scoring.memory import default_budget
from lightning_nrl.analysis.sweep._store import StoredRun
from lightning_nrl.analysis.sweep.grid import Setting
from lightning_nrl.analysis.sweep.run import NO_COUNTS, Run
from lightning_nrl.errors import EmptyLocalizationError
from lightning_nrl.evaluation.deployed_precision import rounding_reserve
from lightning_nrl.localization import Known, Localization, on_data
from lightning_nrl.methods.search_samples import record_known, scorer_for
from lightning_nrl.pipeline.problem_builder import passed_rows
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.problem import Problem
from lightning_nrl.search import SearchHistory, SearchResult, WeightStats, search_many
from lightning_nrl.search.fitness import Fitness

__all__ = ["BatchSearch", "RunRequest", "batches"]

SWARMS_BY_DEVICE = {"cpu": 32}
"""Swarms of one call at most: a CPU gains nothing by more, and progress is told and kept after each call."""
SWARMS_ELSEWHERE = 512
"""The same on other devices."""
TENSORS_PER_SWARM = 16
"""Tensors of the size of all particles that a search holds at once, about."""

OnProgress = Callable[[int, list[SearchHistory]], None]
"""Is told how many iterations were made."""


@dataclass(frozen=True)
class RunRequest:
    """One run to be made; `key` tells it from every other one on any model and data, `seed` draws I_pos and swarm."""

    key: str
    setting: Setting
    seed: int

    @property
    def work(self) -> int:
        """How much it takes at most, to compare with others."""
        return self.setting.method.particles * (self.setting.method.iterations + 1)


@dataclass
class BatchSearch:
    """A problem with what searches share: known data are recorded once, each localisation is made once.

    The problem's own localizer, fitness and sample of passed data do not matter.
    """

    problem: Problem
    base: Settings
    _recording: ActivationCache | None = None
    _localized: list[tuple[Any, Tensor, Localization | None]] = field(default_factory=list)
    _passed: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @property
    def recording(self) -> ActivationCache:
        """Targets and passed samples of the known data, as a single repair records them."""
        if self._recording is None:
            with self.problem.clock.stage("localize"):
                before = self.problem.before
                self._recording = record_known(self.problem, before.targeted | before.passed)
        return self._recording

    def localization(self, request: RunRequest) -> Localization | None:
        """Which weights a request searches; None if none is left."""
        problem, localizer, passed, localized = self.problem, request.setting.localizer, self.passed(request), None
        for known, of, found in self._localized:
            if known == localizer and of is passed:
                return found
        recording = self.recording
        with problem.clock.stage("localize"), suppress(EmptyLocalizationError):
            on = on_data(localizer, Known(problem.evaluator, problem.known, problem.before, problem.space))
            localized = on(recording, problem.evaluator, failed=problem.before.targeted, passed=passed)
        self._localized.append((localizer, passed, localized))
        return localized

    def passed(self, request: RunRequest) -> Tensor:
        """The passed samples that a request scores, `N` bool."""
        which = request.setting.n_passed, request.seed if request.setting.n_passed else 0
        if which not in self._passed:
            search = replace(self.base.search, n_passed=request.setting.n_passed)
            asked = replace(self.base, search=search, seed=request.seed)
            self._passed[which] = passed_rows(self.problem.before, self.problem.known, asked)
        return self._passed[which]

    def run(self, requests: Sequence[RunRequest], on_progress: OnProgress | None = None) -> dict[str, StoredRun]:
        """Searches of one kind at once (see `batches`); each finds, bit for bit, what it finds alone.

        Returns:
            What was found, by key, with its share of the time; it is not counted yet.
        """
        localized = [(request, self.localization(request)) for request in requests]
        none, values = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=self.problem.space.dtype)
        runs = {request.key: self._found(request, none, values) for request, found in localized if found is None}
        searched = [(request, found.weights.cpu().clone()) for request, found in localized if found is not None]
        return runs | self._search(searched, on_progress) if searched else runs

    @torch.no_grad()
    def _search(
        self, searched: Sequence[tuple[RunRequest, Tensor]], on_progress: OnProgress | None
    ) -> dict[str, StoredRun]:
        problem, space = self.problem, self.problem.space
        before, requests = problem.before, [request for request, _ in searched]
        sizes = [len(weights) for _, weights in searched]
        where = torch.full((len(requests), max(sizes)), -1)
        for row, (_, weights) in zip(where, searched, strict=True):
            row[: len(weights)] = weights
        fitness: list[Any] = [request.setting.fitness for request in requests]
        alike = all(one == fitness[0] for one in fitness)
        passed = torch.stack([self.passed(request) for request in requests])
        reserve = rounding_reserve(problem.evaluator.precision, before)
        scorer = scorer_for(problem, self.recording, where, before.targeted, passed, fitness[0], reserve=reserve)
        there = where.clamp_min(0).to(space.device)
        original = space.flat()[there]
        results = search_many(
            scorer,
            original,
            WeightStats.around(space, there),
            seeds=[request.seed for request in requests],
            fitness=fitness[0] if alike else fitness,
            searcher=requests[0].setting.method,
            sizes=sizes,
            on_progress=on_progress,
        )
        runs = {}
        for (request, weights), result, start in zip(searched, results, original, strict=True):
            changed = not torch.equal(result.values, start[: len(weights)])
            seconds = result.seconds / len(requests)
            runs[request.key] = self._found(request, weights, result.values.cpu(), result, changed, seconds)
        return runs

    def _found(
        self,
        request: RunRequest,
        where: Tensor,
        values: Tensor,
        result: SearchResult | None = None,
        changed: bool = False,
        seconds: float = 0.0,
    ) -> StoredRun:
        """A run that is not counted yet; no result if localisation left nothing to search."""
        setting: Setting = request.setting
        fitness: Any = setting.fitness
        kind = getattr(fitness, "kind", None)
        run = Run(
            setting=setting.name,
            fitness=str(kind or getattr(fitness, "__name__", type(fitness).__name__)),
            alpha=float(fitness.alpha) if kind in ("eq1", "eq2") else None,
            perfect_intact=bool(getattr(fitness, "perfect_intact", False)),
            n_weights=getattr(setting.localizer, "n_weights", None),
            n_passed=setting.n_passed,
            particles=setting.method.particles,
            seed=request.seed,
            layer=", ".join(site.name or type(site.module).__name__ for site in self.problem.space.sites),
            n_localized=len(where),
            iterations=0 if result is None else result.iterations,
            value=None if result is None else result.fitness,
            patched=0 if result is None else int(result.history.patched[-1]),
            intact=int(self.passed(request).sum() if result is None else result.history.intact[-1]),
            changed=changed,
            known=NO_COUNTS,
            seconds=seconds,
        )
        return StoredRun(run, where, values)


def batches(requests: Sequence[RunRequest], problem: Problem) -> Iterator[list[RunRequest]]:
    """Requests that are searched in one call: of one swarm, few enough to fit into memory.

    On a CPU they also have one fitness, so that candidates are given up as early as in a single search.
    """
    device = problem.space.device
    budget = default_budget(device) if problem.budget is None else problem.budget
    kinds: dict[Any, list[RunRequest]] = {}
    for request in requests:
        kinds.setdefault(_kind(request, device), []).append(request)
    for kind in kinds.values():
        # Equal numbers of weights beside each other need no padding, equal samples are prepared once.
        kind.sort(key=lambda one: (getattr(one.setting.localizer, "n_weights", None) or 0, one.setting.n_passed or 0))
        size = kind[0].setting.method.particles * problem.space.size * problem.space.dtype.itemsize * TENSORS_PER_SWARM
        n = max(1, min(budget // size, SWARMS_BY_DEVICE.get(device.type, SWARMS_ELSEWHERE)))
        for start in range(0, len(kind), n):
            yield kind[start : start + n]


def _kind(request: RunRequest, device: torch.device) -> Any:
    fitness = request.setting.fitness
    if not isinstance(fitness, Fitness):
        return request.setting.method, id(fitness), request.setting.name
    if device.type == "cpu":
        return request.setting.method, fitness, request.setting.name
    return request.setting.method, fitness.uses_passed_loss
