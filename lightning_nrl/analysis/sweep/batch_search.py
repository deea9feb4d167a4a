"""Many searches on one recording: what each would find by itself, found together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._scoring import ActivationCache, make_scorer
from lightning_nrl._scoring.memory import default_budget
from lightning_nrl.analysis.sweep.grid import Setting
from lightning_nrl.errors import EmptyLocalizationError
from lightning_nrl.localization import Localization
from lightning_nrl.methods.known_activations import half_budget, record_known
from lightning_nrl.pipeline.input_checks import passed_rows
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.problem import Problem
from lightning_nrl.search import SearchHistory, SearchResult, WeightStats, search_many
from lightning_nrl.search.fitness import Fitness, needs_passed_loss

__all__ = ["BatchSearch", "RunRequest", "SearchOutcome", "batches"]

SWARMS_BY_DEVICE = {"cpu": 32}
"""Swarms of one call at most: a CPU gains nothing by more, and progress is told and kept after each call."""
SWARMS_ELSEWHERE = 512
"""The same on other devices."""
TENSORS_PER_SWARM = 16
"""Tensors of the size of all particles that a search holds at once, about."""


@dataclass(frozen=True)
class RunRequest:
    """One run to be made.

    Attributes:
        key: tells it from every other search on any model and data.
        setting: how.
        seed: of the sample of passed data and of the swarm.
    """

    key: str
    setting: Setting
    seed: int

    @property
    def work(self) -> int:
        """How much it takes at most, to compare with others."""
        return self.setting.method.particles * (self.setting.method.iterations + 1)


@dataclass(frozen=True)
class SearchOutcome:
    """What a search gave.

    Attributes:
        request: the run.
        n_passed: |I_pos|.
        where: `K` int64, flat positions of the weights that were searched, on the CPU; none if localisation left none.
        values: `K`, what they are to be, on the CPU.
        result: the course of the search; None if there was none.
        changed: whether the values differ from the original ones.
        seconds: its share of the time that it took together with others.
    """

    request: RunRequest
    n_passed: int
    where: Tensor
    values: Tensor
    result: SearchResult | None
    changed: bool
    seconds: float


@dataclass
class BatchSearch:
    """A problem with what searches share: known data are recorded once, each localisation is made once.

    Attributes:
        problem: what is to be repaired; its own localizer, fitness and sample of passed data do not matter.
        base: the settings that the problem was made of.
    """

    problem: Problem
    base: Settings
    _recording: ActivationCache | None = None
    _localized: list[tuple[Any, Localization | None]] = field(default_factory=list)
    _passed: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @property
    def recording(self) -> ActivationCache:
        """Targets and passed samples of the known data, as a single repair records them."""
        if self._recording is None:
            problem = self.problem
            keep = problem.before.targeted | problem.before.passed
            with problem.clock.stage("localize"):
                self._recording = record_known(problem, keep)
        return self._recording

    def localization(self, setting: Setting) -> Localization | None:
        """Which weights a setting searches; None if none is left."""
        for localizer, found in self._localized:
            if localizer == setting.localizer:
                return found
        problem, localized = self.problem, None
        recording = self.recording
        with problem.clock.stage("localize"), suppress(EmptyLocalizationError):
            localized = setting.localizer(
                recording, problem.evaluator, failed=problem.before.targeted, passed=problem.before.passed
            )
        self._localized.append((setting.localizer, localized))
        return localized

    def passed(self, request: RunRequest) -> Tensor:
        """The passed samples that a request scores, `N` bool."""
        which = request.setting.n_passed, request.seed
        if which not in self._passed:
            search = replace(self.base.search, n_passed=request.setting.n_passed)
            asked = replace(self.base, search=search, seed=request.seed)
            self._passed[which] = passed_rows(self.problem.before, self.problem.known, asked)
        return self._passed[which]

    def run(self, requests: Sequence[RunRequest], on_progress: Any = None) -> list[SearchOutcome]:
        """Runs searches of one kind at once (see `batches`). Each finds, bit for bit, what it finds alone.

        Args:
            requests: searches whose swarms are of one size.
            on_progress: is told how many iterations of how many were made.
        """
        localized = [self.localization(request.setting) for request in requests]
        searched = [(request, found) for request, found in zip(requests, localized, strict=True) if found is not None]
        results = iter(self._search(searched, on_progress) if searched else ())
        return [
            self._unsearched(request) if found is None else next(results)
            for request, found in zip(requests, localized, strict=True)
        ]

    def _unsearched(self, request: RunRequest) -> SearchOutcome:
        none = torch.zeros(0, dtype=torch.int64)
        values = torch.zeros(0, dtype=self.problem.space.dtype)
        return SearchOutcome(request, int(self.passed(request).sum()), none, values, None, False, 0.0)

    @torch.no_grad()
    def _search(self, searched: Sequence[tuple[RunRequest, Localization]], on_progress: Any) -> list[SearchOutcome]:
        problem, space = self.problem, self.problem.space
        before, requests = problem.before, [request for request, _ in searched]
        sizes = [len(found.weights) for _, found in searched]
        where = torch.full((len(requests), max(sizes)), -1)
        for row, (_, found) in zip(where, searched, strict=True):
            row[: len(found.weights)] = found.weights.cpu()
        passed = torch.stack([self.passed(request) for request in requests])
        fitness = [request.setting.fitness for request in requests]
        alike = all(one == fitness[0] for one in fitness)
        scorer = make_scorer(
            self.recording,
            where,
            before.targeted,
            passed,
            problem.evaluator,
            budget=half_budget(problem),
            passed_loss=needs_passed_loss(fitness[0]),
            fragility=before.loss,
            weight=before.finite_weight if before.weighted else None,
        )
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
            on_progress=partial(_report_progress, on_progress, requests[0].setting.method.iterations),
        )
        return [
            SearchOutcome(
                request,
                int(mask.sum()),
                row[:size].clone(),
                result.values.cpu(),
                result,
                not torch.equal(result.values, start[:size]),
                result.seconds / len(requests),
            )
            for request, mask, row, size, result, start in zip(
                requests, passed, where, sizes, results, original, strict=True
            )
        ]


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
        kind.sort(
            key=lambda request: (
                getattr(request.setting.localizer, "n_weights", None) or 0,
                request.setting.n_passed or 0,
            )
        )
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


def _report_progress(on_progress: Any, total: int, done: int, histories: list[SearchHistory]) -> None:
    if on_progress is not None:
        on_progress(done, total)
