"""Runs many settings and seeds of the paper's search on one problem, without Lightning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

from torch import nn

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.data import Source
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import layer_names
from lightning_nrl.methods import Auto, Problem
from lightning_nrl.pipeline import Settings
from lightning_nrl.pipeline.baseline import evaluate_baseline
from lightning_nrl.pipeline.input_checks import (
    check_sources,
    check_targets,
    given_or_default,
    scope_of,
)
from lightning_nrl.pipeline.plain_values import text_hash
from lightning_nrl.pipeline.problem_builder import build_problem
from lightning_nrl.records import Provenance, Role
from lightning_nrl.search import ParticleSwarm, SearchHistory
from lightning_nrl.study.grid import Setting, Sweepable, parse_settings
from lightning_nrl.study.recorded_search import RecordedSearch, RunRequest
from lightning_nrl.study.recount import Recount, record_other_data
from lightning_nrl.study.run_store import RunStore, StoredRun, results_digest
from lightning_nrl.study.sweep_result import SweepResult

Seeds = int | Sequence[int]
"""A list of seeds, or a number n, which stands for the seeds 0 to n - 1."""


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
    observer: Observer | None = None,
) -> SweepResult:
    """Runs every setting with every seed, and counts what each run repairs and breaks.

    Activations of the known data are recorded once. Each run is like a single repair by
    `ParticleSwarm`: it gives the same weights, bit for bit, as `repair` with the same arguments and
    `strength=1`. No gate judges the runs; the model stays unchanged. The ranks of an `Evaluator`
    share the runs: each rank needs all data and returns the same result.

    Model and data are as in `repair_module`. No search reads the calibration data; they serve to
    choose among the runs. `settings`, `seeds` and `dirpath` are as in `sweep`. `base` has the
    options that all runs share, such as the target, and the defaults of the settings. Its method
    must be a `ParticleSwarm`; the default, `auto`, is replaced by one.

    Raises:
        ConfigurationError: an argument is invalid, no failed sample is in the target, or no known
            sample passes.
        EvaluationError: the original model gives losses that are not finite.
    """
    evaluator, base = Evaluator.of(model), swarming(given_or_default(base))
    parsed_settings, parsed_seeds = parse_settings(settings, base), parse_seeds(seeds)
    check_sources(known, (*calibration, *unseen), base)
    _check_options(base)
    _check_undivided((*known, *calibration, *unseen))
    layers = scope_of(base, evaluator)
    # Each rank evaluates all data, since the ranks share the runs, not the data.
    alone, clock = replace(evaluator, collective=Collective()), StageTimer(observer)
    with preserve_state(evaluator.model):
        baseline = evaluate_baseline(
            alone,
            known,
            base,
            unseen=unseen,
            calibration=calibration,
            clock=clock,
            records=True,
        )
        check_targets(baseline.before, base)
        problem = build_problem(alone, known, baseline, layers, base, clock=clock)
        recounts: dict[Role, Recount] = {
            "known": Recount(problem, known, baseline.before, problem.record)
        }
        for role, data in baseline.other_data.items():
            record = record_other_data(problem, data.sources)
            recounts[role] = Recount(problem, data.sources, data.before, record)
        store = RunStore(None if dirpath is None else Path(dirpath))
        return _Sweep(problem, base, recounts, evaluator.collective, store).run(
            parsed_settings, parsed_seeds
        )


def swarming(base: Settings) -> Settings:
    """Returns the settings, with a `ParticleSwarm` as method if they have the default method."""
    return replace(base, method=ParticleSwarm()) if isinstance(base.method, Auto) else base


def parse_seeds(seeds: Seeds) -> tuple[int, ...]:
    """Returns the seeds.

    Raises:
        ConfigurationError: there is no seed, a duplicate, or a seed out of range.
    """
    parsed: tuple[int, ...] = ()
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        parsed = tuple(range(seeds))
    elif isinstance(seeds, Iterable):
        parsed = tuple(seeds)
    if not parsed or len(set(parsed)) < len(parsed):
        raise ConfigurationError(
            f"`seeds={seeds!r}` names no seed, or one twice.",
            "give the number of seeds, or a list such as [0, 1, 2].",
        )
    for seed in parsed:
        Settings(seed=seed)
    return parsed


def _check_options(base: Settings) -> None:
    for name in ("slices", "groups", "quotas", "protected", "sample_id"):
        if vars(base.samples)[name] is not None:
            raise ConfigurationError(
                f"`{name}`: the table of a sweep has no column for it.",
                f"leave `{name}` out, and give it to `repair` with the run that you choose.",
            )


def _check_undivided(sources: Sequence[Source]) -> None:
    for source in sources:
        n_here, n = len(source.positions), len(source.index)
        if n_here < n:
            raise ConfigurationError(
                f"`{source.split}` data are split: this rank has {n_here} of {n}.",
                "give each rank all data; the ranks share the runs.",
            )


@dataclass
class _Sweep:
    """Sweep over one problem."""

    problem: Problem
    base: Settings
    recounts: Mapping[Role, Recount]
    collective: Collective
    store: RunStore

    def run(self, settings: Sequence[Setting], seeds: Sequence[int]) -> SweepResult:
        """Makes the runs that are not stored.

        The ranks share these runs; every rank returns the same result.
        """
        requests = self._requests(settings, seeds)
        keys = [request.key for request in requests]
        stored = self._on_each_rank(lambda: self.store.read(keys))
        missing = [request for request in requests if request.key not in stored]
        share = missing[self.collective.rank :: self.collective.world_size]
        new = self._on_each_rank(lambda: self._make(share, requests, stored))
        return self._result(requests, stored | new)

    def _requests(self, settings: Sequence[Setting], seeds: Sequence[int]) -> list[RunRequest]:
        # The key of a run also depends on model, data and target.
        evidence = {role: results_digest(data.before) for role, data in self.recounts.items()}
        passed = [source.split for source in self.problem.known if source.passed]
        model = hash_tensors(self.problem.model.state_dict())
        layer, task = self.base.plain()["layer"], repr(self.problem.evaluator.task)
        ground = text_hash([model, evidence, passed, layer, task])
        requests = []
        for setting, seed in product(settings, seeds):
            requests.append(RunRequest(text_hash([ground, setting.plain(), seed]), setting, seed))
        return requests

    def _on_each_rank(self, work: Callable[[], dict[str, StoredRun]]) -> dict[str, StoredRun]:
        """Calls `work` on each rank and returns the runs of all ranks.

        If `work` fails on one rank, all ranks fail.
        """
        own_runs = self.collective.all_or_none(
            work, "another rank could not make its runs of the sweep."
        )
        runs: dict[str, StoredRun] = {}
        for runs_of_rank in self.collective.gather_objects(own_runs):
            runs |= runs_of_rank
        return runs

    def _make(
        self,
        share: Sequence[RunRequest],
        requests: Sequence[RunRequest],
        stored: dict[str, StoredRun],
    ) -> dict[str, StoredRun]:
        new: dict[str, StoredRun] = {}
        clock = self.problem.clock
        recorded = RecordedSearch(self.problem, self.base)
        work, done = sum(request.work for request in share), 0
        with clock.stage("sweep"):
            clock.expect({"sweep": 0.0})
            # Stored by setting: a file and a table for each run would take longer than small runs.
            for _, requests_of_setting in groupby(share, lambda request: request.setting.name):
                runs = {}
                for request in requests_of_setting:
                    runs[request.key] = self._with_counts(
                        recorded.run(request, partial(self._tell, request, done, work))
                    )
                    done += request.work
                    clock.tell(done, work)
                self.store.write(runs)
                new |= runs
                self._result(requests, stored | new)
        return new

    def _tell(
        self, request: RunRequest, done: int, work: int, iterations: int, _: SearchHistory
    ) -> None:
        share = iterations / max(1, request.setting.method.iterations)
        self.problem.clock.tell(round(done + request.work * share), work)

    def _with_counts(self, stored: StoredRun) -> StoredRun:
        began = time.perf_counter()
        counts: dict[str, Any] = {role: recount(stored) for role, recount in self.recounts.items()}
        seconds = round(stored.run.seconds + time.perf_counter() - began, 4)
        return replace(stored, run=replace(stored.run, seconds=seconds, **counts))

    def _result(
        self, requests: Sequence[RunRequest], stored: Mapping[str, StoredRun]
    ) -> SweepResult:
        """Returns the stored runs in the order of `requests`, and writes their table."""
        runs = {}
        for request in requests:
            if request.key in stored:
                run = stored[request.key]
                name = request.setting.name  # the stored run may have another one
                runs[name, request.seed] = replace(run, run=replace(run.run, setting=name))
        results = [data.before for data in self.recounts.values()]
        parameters = self.problem.space.parameters.items()
        result = SweepResult(
            tuple(run.run for run in runs.values()),
            str(self.base.target),
            ", ".join(layer_names(self.base.layer)),
            settings={request.setting.name: request.setting for request in requests},
            weights=runs,
            provenance=Provenance.of(self.problem.model, *results),
            original={name: value.detach().cpu().clone() for name, value in parameters},
        )
        if self.store.folder is not None and self.collective.rank == 0:
            result.to_csv(self.store.folder / "sweep.csv")
        return result
