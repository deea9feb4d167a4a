"""Searches of many settings and seeds on one recording of the activations of known data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_nrl.errors import EmptyLocalizationError
from lightning_nrl.evaluation.sample_results import NO_COUNTS
from lightning_nrl.localization import KnownData, Localization, Localizer
from lightning_nrl.methods import Problem
from lightning_nrl.methods.search_samples import record_known, scorer_for
from lightning_nrl.pipeline import Settings
from lightning_nrl.pipeline.problem_builder import passed_rows
from lightning_nrl.search import SearchHistory, WeightStats, search
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.study.grid import Setting
from lightning_nrl.study.run_store import Run, StoredRun

# Called with the number of iterations so far.
OnProgress = Callable[[int, SearchHistory], None]


@dataclass(frozen=True)
class RunRequest:
    """A setting and a seed to search with.

    The run is stored under `key`, a hash of setting, seed, model and data.
    """

    key: str
    setting: Setting
    seed: int

    @property
    def work(self) -> int:
        """Number of weight vectors that the search scores, as a measure of its time."""
        return self.setting.method.particles * (self.setting.method.iterations + 1)


@dataclass
class RecordedSearch:
    """Runs searches on one problem, which is recorded once. Equal localizers run once."""

    problem: Problem
    base: Settings
    _localizations: list[tuple[Localizer, Tensor, Localization | None]] = field(
        default_factory=list
    )
    _passed: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def run(self, request: RunRequest, on_progress: OnProgress | None = None) -> StoredRun:
        """Runs one search, with the same result as a repair. `Recount` then adds counts."""
        problem, space, setting = self.problem, self.problem.space, request.setting
        passed, localization = self.passed(request), self.localization(request)
        run = Run(
            setting=setting.name,
            **setting.columns(),
            seed=request.seed,
            layer=", ".join(site.name or type(site.module).__name__ for site in space.sites),
            n_localized=0,
            iterations=0,
            value=None,
            patched=0,
            intact=int(passed.sum()),
            changed=False,
            known=NO_COUNTS,
        )
        if localization is None:
            nothing = torch.zeros(0, dtype=space.dtype)
            return StoredRun(run, nothing.long(), nothing)
        where = localization.weights.to(space.device)
        original = space.flat()[where]
        with torch.no_grad():
            scorer = scorer_for(
                problem,
                self.recording,
                where,
                problem.before.targeted,
                passed,
                setting.fitness,
                problem.rounding_reserve,
            )
            result = search(
                scorer,
                original,
                WeightStats.around(space, where),
                fitness=setting.fitness,
                searcher=setting.method,
                seed=request.seed,
                on_progress=on_progress,
            )
        run = replace(
            run,
            n_localized=len(where),
            iterations=result.iterations,
            value=result.fitness,
            patched=int(result.history.patched[-1]),
            intact=int(result.history.intact[-1]),
            changed=not torch.equal(result.values, original),
            seconds=result.seconds,
        )
        return StoredRun(run, where.cpu(), result.values.cpu())

    @cached_property
    def recording(self) -> ActivationCache:
        with self.problem.clock.stage("localize"):
            before = self.problem.before
            return record_known(self.problem, before.targeted | before.passed)

    def localization(self, request: RunRequest) -> Localization | None:
        """Returns the weights to search; None if the localizer finds none."""
        localizer, passed = request.setting.localizer, self.passed(request)
        for known_localizer, known_passed, localization in self._localizations:
            if known_localizer == localizer and known_passed is passed:
                return localization
        problem, localization = self.problem, None
        known = KnownData(problem.evaluator, problem.known, problem.before, problem.space)
        with problem.clock.stage("localize"), suppress(EmptyLocalizationError):
            localize = localizer.on(known)
            localization = localize(
                self.recording, problem.evaluator, failed=problem.before.targeted, passed=passed
            )
        self._localizations.append((localizer, passed, localization))
        return localization

    def passed(self, request: RunRequest) -> Tensor:
        """Returns the mask of passed samples to score, the same object for equal requests."""
        n_passed = request.setting.n_passed
        seed = request.seed if n_passed else 0  # without a number, nothing is drawn
        if (n_passed, seed) not in self._passed:
            settings = replace(
                self.base, search=replace(self.base.search, n_passed=n_passed), seed=request.seed
            )
            self._passed[n_passed, seed] = passed_rows(
                self.problem.before, self.problem.known, settings
            )
        return self._passed[n_passed, seed]
