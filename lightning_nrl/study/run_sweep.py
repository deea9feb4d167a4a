"""Runs many settings and seeds of the paper's search on one problem, without Lightning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_scope, layer_names
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods import Auto, Problem
from lightning_nrl.pipeline.baseline import evaluate_baseline
from lightning_nrl.pipeline.input_checks import check_sources, check_targets, given_or_default
from lightning_nrl.pipeline.problem_builder import build_problem
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.records import Provenance, Role
from lightning_nrl.search import ParticleSwarm, SearchHistory
from lightning_nrl.study.grid import Setting, Sweepable, parse_settings
from lightning_nrl.study.recorded_search import RecordedSearch, RunRequest
from lightning_nrl.study.recount import Recount
from lightning_nrl.study.run_store import RunStore, StoredRun, digest, gather_runs, results_digest
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
    include_bias = base.localizer.include_bias
    layers = find_scope(
        evaluator.model, base.layer, include_bias=include_bias, called=evaluator.called
    )
    # Each rank evaluates all data, since the ranks share the runs, not the data.
    alone, clock = replace(evaluator, collective=Collective()), StageTimer(observer)
    with preserve_state(evaluator.model):
        baseline = evaluate_baseline(
            alone, known, base, unseen=unseen, calibration=calibration, clock=clock
        )
        check_targets(found.before, base)
        problem = build_problem(own, known, found.before, layers, base, clock=clock)
        data: dict[Role, tuple[Sequence[Source], SampleResults]] = {"known": (known, found.before)}
        data |= {role: (data.sources, data.before) for role, data in found.other_data.items()}
        store = RunStore(None if dirpath is None else Path(dirpath))
        sweep = _Sweep(problem, base, data, evaluator.collective, store)
        return sweep.run(parsed_settings, parsed_seeds)


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
    samples = base.samples
    for name, option in (
        ("slices", samples.slices),
        ("quotas", samples.quotas),
        ("protected", samples.protected),
    ):
        if option is not None:
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
    """Sweep over one problem.

    `data` has the sources of each role and the results of the original model on them.
    """

    problem: Problem
    base: Settings
    data: Mapping[Role, tuple[Sequence[Source], SampleResults]]
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
        made = self._on_each_rank(lambda: self._made(share, requests, stored))
        return self._result(requests, stored | made)

    def _requests(self, settings: Sequence[Setting], seeds: Sequence[int]) -> list[RunRequest]:
        # The key of a run also depends on model, data and target.
        evidence = {role: results_digest(before) for role, (_, before) in self.data.items()}
        passed = [source.split for source in self.problem.known if source.passed]
        model = hash_tensors(self.problem.model.state_dict())
        layer, task = self.base.plain()["layer"], repr(self.problem.evaluator.task)
        ground = digest([model, evidence, passed, layer, task])
        return [
            RunRequest(digest([ground, setting.plain(), seed]), setting, seed)
            for setting in settings
            for seed in seeds
        ]

    def _on_each_rank(self, work: Callable[[], dict[str, StoredRun]]) -> dict[str, StoredRun]:
        """Calls `work` on each rank and returns the runs of all ranks.

        If `work` fails on one rank, all ranks fail.
        """
        runs = self.collective.all_or_none(
            work, "another rank could not make its runs of the sweep."
        )
        return gather_runs(runs, self.collective)

    def _made(
        self,
        share: Sequence[RunRequest],
        requests: Sequence[RunRequest],
        stored: Mapping[str, StoredRun],
    ) -> dict[str, StoredRun]:
        made: dict[str, StoredRun] = {}
        clock = self.problem.clock
        recorded = RecordedSearch(self.problem, self.base)
        recounts = {
            role: Recount(self.problem, sources, before)
            for role, (sources, before) in self.data.items()
        }
        work, done = sum(request.work for request in share), 0
        with clock.stage("sweep"):
            clock.expect({"sweep": 0.0})
            for request in share:
                progress = partial(self._tell, request, done, work)
                run = _with_counts(recorded.run(request, progress), recounts)
                self.store.write({request.key: run})
                made[request.key] = run
                self._write_table(requests, {**stored, **made})
                done += request.work
                clock.tell(done, work)
        return made

    def _tell(
        self, request: RunRequest, done: int, work: int, iterations: int, _: SearchHistory
    ) -> None:
        share = iterations / max(1, request.setting.method.iterations)
        self.problem.clock.tell(round(done + request.work * share), work)

    def _write_table(self, requests: Sequence[RunRequest], stored: Mapping[str, StoredRun]) -> None:
        folder = self.store.folder
        if folder is not None and self.collective.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            runs = _runs_by_setting(requests, stored)
            SweepResult(tuple(run.run for run in runs.values())).to_csv(folder / "sweep.csv")

    def _result(
        self, requests: Sequence[RunRequest], stored: Mapping[str, StoredRun]
    ) -> SweepResult:
        self._write_table(requests, stored)
        runs = _runs_by_setting(requests, stored)
        results = [before for _, before in self.data.values()]
        return SweepResult(
            tuple(run.run for run in runs.values()),
            str(self.base.target),
            ", ".join(layer_names(self.base.layer)),
            settings={request.setting.name: request.setting for request in requests},
            weights=runs,
            provenance=Provenance.of(self.problem.model, *results),
            original={
                name: value.detach().cpu().clone()
                for name, value in self.problem.space.parameters.items()
            },
        )


def _runs_by_setting(
    requests: Sequence[RunRequest], stored: Mapping[str, StoredRun]
) -> dict[tuple[str, int], StoredRun]:
    """Returns the stored runs by setting and seed, in the order of the requests."""
    runs = {}
    for request in requests:
        if request.key in stored:
            run = stored[request.key]
            # The stored run may have another name for the setting.
            named = replace(run, run=replace(run.run, setting=request.setting.name))
            runs[request.setting.name, request.seed] = named
    return runs


def _with_counts(stored: StoredRun, recounts: Mapping[Role, Recount]) -> StoredRun:
    began = time.perf_counter()
    counts: dict[str, Any] = {role: recount(stored) for role, recount in recounts.items()}
    seconds = stored.run.seconds + time.perf_counter() - began
    return replace(stored, run=replace(stored.run, seconds=round(seconds, 4), **counts))
