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
from lightning_nrl.study.batch_search import BatchSearch, Recount, RunRequest, batches
from lightning_nrl.study.grid import Setting, Sweepable, parse_settings
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
    """Runs every setting with every seed, each like a single repair by `ParticleSwarm`, and counts
    all
    results.

    Activations of the known data are recorded once, and many swarms search at the same time. Each
    run gives the same weights, bit for bit, as `repair` with the same arguments and `strength=1`.
    No gate judges the runs; the model stays unchanged. The ranks of an `Evaluator` share the runs:
    each rank needs all data and returns the same result.

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
    tried, numbers = parse_settings(settings, base), parse_seeds(seeds)
    check_sources(known, (*calibration, *unseen), base)
    _check(base, (*known, *calibration, *unseen))
    include_bias = base.localizer.include_bias
    layers = find_scope(
        evaluator.model, base.layer, include_bias=include_bias, called=evaluator.called
    )
    # Each rank evaluates all data, since the ranks share the runs, not the data.
    own, clock = replace(evaluator, collective=Collective()), StageTimer(observer)
    with preserve_state(evaluator.model):
        found = evaluate_baseline(
            own, known, base, unseen=unseen, calibration=calibration, clock=clock
        )
        check_targets(found.before, base)
        problem = build_problem(own, known, found.before, layers, base, clock=clock)
        data: dict[Role, tuple[Sequence[Source], SampleResults]] = {"known": (known, found.before)}
        data |= {role: (data.sources, data.before) for role, data in found.other_data.items()}
        store = RunStore(None if dirpath is None else Path(dirpath))
        sweep = _Sweep(problem, base, data, evaluator.collective, store)
        return sweep.run([(setting, seed) for setting in tried for seed in numbers])


def swarming(base: Settings) -> Settings:
    """Returns the settings, with a `ParticleSwarm` as method if they have the default method."""
    return replace(base, method=ParticleSwarm()) if isinstance(base.method, Auto) else base


def parse_seeds(seeds: Seeds) -> tuple[int, ...]:
    """Returns the seeds. Raises `ConfigurationError` if there is no seed, a duplicate, or a seed
    out of range.
    """
    whole = isinstance(seeds, int) and not isinstance(seeds, bool)
    found = tuple(range(seeds)) if whole else tuple(seeds) if isinstance(seeds, Iterable) else ()  # type: ignore[arg-type]
    if not found or len(set(found)) < len(found):
        raise ConfigurationError(
            f"`seeds={seeds!r}` names no seed, or one twice.",
            "give the number of seeds, or a list such as [0, 1, 2].",
        )
    for seed in found:
        Settings(seed=seed)
    return found


def _check(base: Settings, sources: Iterable[Source]) -> None:
    for name in ("slices", "quotas", "protected"):
        if getattr(base.samples, name) is not None:
            raise ConfigurationError(
                f"`{name}`: the table of a sweep has no column for it.",
                f"leave `{name}` out, and give it to `repair` with the run that you choose.",
            )
    for source in sources:
        if len(source.positions) < len(source.index):
            raise ConfigurationError(
                f"`{source.split}` data are split: this rank has {len(source.positions)} of {len(source.index)}.",
                "give each rank all data; the ranks share the runs.",
            )


@dataclass
class _Sweep:
    """Sweep over one problem. `data` has the sources of each role and the results of the original
    model on them.
    """

    problem: Problem
    base: Settings
    data: Mapping[Role, tuple[Sequence[Source], SampleResults]]
    collective: Collective
    store: RunStore

    def run(self, wanted: Sequence[tuple[Setting, int]]) -> SweepResult:
        """Makes the runs that are not stored. The ranks share these runs; every rank returns the
        same result.
        """
        # The key of a run also depends on model, data and target.
        evidence = {role: results_digest(before) for role, (_, before) in self.data.items()}
        passed = [source.split for source in self.problem.known if source.passed]
        model, layer = hash_tensors(self.problem.model.state_dict()), self.base.plain()["layer"]
        ground = digest([model, evidence, passed, layer, repr(self.problem.evaluator.task)])
        requests = [
            RunRequest(digest([ground, setting.plain(), seed]), setting, seed)
            for setting, seed in wanted
        ]
        there = self._on_each_rank(lambda: self.store.read(request.key for request in requests))
        missing = [request for request in requests if request.key not in there]
        mine = missing[self.collective.rank :: self.collective.world_size]
        made = self._on_each_rank(lambda: self._made(mine, requests, there))
        return self._result(requests, there | made)

    def _on_each_rank(self, work: Callable[[], dict[str, StoredRun]]) -> dict[str, StoredRun]:
        """Calls `work` on each rank and returns the runs of all ranks. If `work` fails on one rank,
        all ranks fail.
        """
        own = self.collective.all_or_none(
            work, "another rank could not make its runs of the sweep."
        )
        return gather_runs(own, self.collective)

    def _made(
        self,
        mine: Sequence[RunRequest],
        requests: Sequence[RunRequest],
        there: Mapping[str, StoredRun],
    ) -> dict[str, StoredRun]:
        made: dict[str, StoredRun] = {}
        clock, worked, work = self.problem.clock, 0.0, sum(request.work for request in mine)
        search = BatchSearch(self.problem, self.base)
        recounts = {
            role: Recount(self.problem, sources, before)
            for role, (sources, before) in self.data.items()
        }
        with clock.stage("sweep"):
            clock.expect({"sweep": 0.0})
            for part in batches(mine, self.problem):
                new = _with_counts(
                    search.run(part, partial(self._tell, part, worked, work)), recounts
                )
                self.store.write(new)
                made |= new
                self._result(requests, {**there, **made})
                worked += sum(request.work for request in part)
                clock.tell(round(worked), round(work))
        return made

    def _tell(
        self,
        part: Sequence[RunRequest],
        worked: float,
        work: float,
        iterations: int,
        _: Sequence[SearchHistory],
    ) -> None:
        worked += (
            sum(request.work for request in part)
            * iterations
            / max(1, part[0].setting.method.iterations)
        )
        self.problem.clock.tell(round(worked), round(work))

    def _result(
        self, requests: Sequence[RunRequest], there: Mapping[str, StoredRun]
    ) -> SweepResult:
        kept = {
            (one.setting.name, one.seed): there[one.key] for one in requests if one.key in there
        }
        result = SweepResult(
            # The stored run may have another name for the setting.
            tuple(replace(stored.run, setting=name) for (name, _), stored in kept.items()),
            str(self.base.target),
            ", ".join(layer_names(self.base.layer)),
            settings={request.setting.name: request.setting for request in requests},
            weights=kept,
            provenance=Provenance.of(
                self.problem.model, *(before for _, before in self.data.values())
            ),
            original={
                name: value.detach().cpu().clone()
                for name, value in self.problem.space.parameters.items()
            },
        )
        if self.store.folder is not None and self.collective.rank == 0:
            self.store.folder.mkdir(parents=True, exist_ok=True)
            result.to_csv(self.store.folder / "sweep.csv")
        return result


def _with_counts(
    found: Mapping[str, StoredRun], recounts: Mapping[Role, Recount]
) -> dict[str, StoredRun]:
    began = time.perf_counter()
    columns = {role: count(list(found.values())) for role, count in recounts.items()}
    share = (time.perf_counter() - began) / len(found)
    counted = {}
    for i, (key, stored) in enumerate(found.items()):
        counts: dict[str, Any] = {role: column[i] for role, column in columns.items()}
        run = replace(stored.run, seconds=round(stored.run.seconds + share, 4), **counts)
        counted[key] = replace(stored, run=run)
    return counted
