"""Many settings and seeds of the paper's search on one problem. Knows nothing of Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from lightning_nrl.as_found import as_found
from lightning_nrl.batches import Source
from lightning_nrl.clock import Clock, Observer
from lightning_nrl.collective import Collective
from lightning_nrl.diagnosis.labels import doubtful_labels
from lightning_nrl.errors import ConfigurationError, RepairError, check_kind, explain
from lightning_nrl.evidence import Context, Evidence, collect
from lightning_nrl.importance import DOUBTFUL
from lightning_nrl.known import check_losses, check_sources, check_task, given_or_default, see_aside
from lightning_nrl.methods import Strongest
from lightning_nrl.problem import Problem
from lightning_nrl.quotas import normalised
from lightning_nrl.report import hash_tensors
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.settings import Settings
from lightning_nrl.sites import find_scope
from lightning_nrl.sweeps.grid import Grid, Setting, Sweepable, parse_settings
from lightning_nrl.sweeps.recount import Recount
from lightning_nrl.sweeps.result import SweepResult
from lightning_nrl.sweeps.run import Run
from lightning_nrl.sweeps.searching import Bench, Found, Job, batches
from lightning_nrl.sweeps.store import Kept, Store, digest, evidence_digest, exchanged
from lightning_nrl.sweeps.trials import Trials, chosen
from lightning_nrl.tasks import Task

__all__ = ["Seeds", "Study", "SweepObserver", "check_trials", "parse_seeds", "study", "swarming", "sweep_module"]

Seeds = int | Sequence[int]
"""How many seeds, from 0 on, or which."""

PATIENCE = 5
"""Where data have to be read again to count runs, that is done once searching took so many times as long."""


class SweepObserver(Observer, Protocol):
    """Is told how a sweep goes on."""

    def show(self, done: int, total: int, note: str) -> None:
        """How many runs of how many are done, and what is to be said of the rest."""
        ...


def sweep_module(
    model: nn.Module,
    known: Sequence[Source],
    settings: Sweepable,
    *,
    seeds: Seeds = 10,
    base: Settings | None = None,
    unseen: Sequence[Source] = (),
    calibration: Sequence[Source] = (),
    task: str | Task | None = None,
    context: Context = nullcontext,
    collective: Collective | None = None,
    dirpath: str | Path | None = None,
    trials: Trials | None = None,
    observer: SweepObserver | None = None,
) -> SweepResult:
    """Runs every setting with every seed, each as a single repair by `ParticleSwarm` would, and counts all of them.

    Known data are recorded once and swarms searched many at a time; each finds, bit for bit, what `repair` finds with
    the same arguments at strength 1. No gate judges, and the model is left as found.

    Args:
        model: the trained model on its device; it runs in evaluation mode.
        known: data that searches may look at. All of it on each rank: ranks share out the runs, not the data.
        settings: what to try: a `Grid`, names of rows of Table II, or mappings of arguments.
        seeds: how many seeds, from 0 on, or a list of them.
        base: what all settings share, such as target, layer and what they leave open of the search; its method is a
            `ParticleSwarm`, or the default, which stands for one. Its `gate`, `strength`, `limit`, `sparse`, `keep`,
            `max_time` and `seed` do not matter.
        unseen: data that is only counted.
        calibration: data that no search looks at, to choose among runs by.
        task: what passed and loss mean, a name or an object of `lightning_nrl.tasks`; None: `Multiclass`.
        context: entered around every forward pass, such as autocast.
        collective: the ranks that share out the runs; each ends with the same result.
        dirpath: a folder in which runs are kept; those that are there already are not made again.
        trials: lets an Optuna sampler choose combinations of the grid, instead of running all.
        observer: is told how it goes.

    Raises:
        ConfigurationError: a setting, the layer, the data, the target or the task cannot be used, no failed sample is
            in the target or none passes.
        EvidenceError: the original model gives losses that are not finite.
    """
    base, task = given_or_default(base, task)
    base = swarming(base)
    tried, numbers = parse_settings(settings, base), parse_seeds(seeds)
    check_trials(trials, settings)
    with as_found(model):
        made = study(
            model,
            known,
            base,
            unseen=unseen,
            calibration=calibration,
            task=task,
            context=context,
            collective=collective,
            dirpath=dirpath,
            observer=observer,
        )
        if trials is not None and isinstance(settings, Grid):
            return made.explore(settings, trials, numbers)
        return made.run([(setting, seed) for setting in tried for seed in numbers])


def check_trials(trials: Trials | None, settings: Sweepable) -> None:
    """Refuses trials of another kind, and of what is no grid.

    Raises:
        ConfigurationError: as above.
    """
    if trials is None:
        return
    check_kind("trials", trials, isinstance(trials, Trials), "Trials", "Trials(40)")
    if not isinstance(settings, Grid):
        raise ConfigurationError(
            explain("`trials` go through a grid, and `settings` is none.", "write `settings=Grid(alpha=[4, 5, 6])`.")
        )


def swarming(base: Settings) -> Settings:
    """The settings with a swarm where they name no method, and as they are where they do."""
    return replace(base, method=ParticleSwarm()) if isinstance(base.method, Strongest) else base


def parse_seeds(seeds: Seeds) -> tuple[int, ...]:
    """The seeds that are meant.

    Raises:
        ConfigurationError: there is none, one is there twice or out of range.
    """
    whole = isinstance(seeds, int) and not isinstance(seeds, bool)
    found = tuple(range(seeds)) if whole else tuple(seeds) if isinstance(seeds, Iterable) else ()  # type: ignore[arg-type]
    if not found or len(set(found)) < len(found):
        raise ConfigurationError(
            explain(f"`seeds={seeds!r}` names no seed, or one twice.", "give how many, or a list such as [0, 1, 2].")
        )
    for seed in found:
        Settings(seed=seed)
    return found


def study(
    model: nn.Module,
    known: Sequence[Source],
    base: Settings,
    *,
    unseen: Sequence[Source],
    calibration: Sequence[Source],
    task: Task,
    context: Context = nullcontext,
    collective: Collective | None = None,
    dirpath: str | Path | None = None,
    observer: SweepObserver | None = None,
) -> Study:
    """Looks at model and data, for any number of runs on them; see `sweep_module` for the arguments.

    The model has to stay in evaluation mode while runs are made (`as_found`).
    """
    collective, clock = collective or Collective(), Clock(observer)
    check_sources(known, (*calibration, *unseen), base)
    _check_counting(base)
    _check_whole((*known, *calibration, *unseen))
    space, scope = find_scope(model, base.layer, include_bias=base.localizer.include_bias)
    alone = Collective()
    see = partial(collect, task=task, context=context, collective=alone)
    with clock.stage("collect"):
        whole = partial(see, model, target=base.target)
        before, left_out = base.counting.over(whole, known, task, alone)
        others = {"calibration": calibration, "unseen": unseen}
        aside = {role: see_aside(see, model, sources, base, task, alone) for role, sources in others.items() if sources}
    check_losses(before)
    check_task(base, before, task)
    if base.set_aside == DOUBTFUL:
        left_out = doubtful_labels(model, known, before, task=task, context=context, collective=alone)
    before = normalised(replace(before, targeted=before.targeted & ~left_out))
    if not (before.targeted.any() and before.passed.any()):
        what = "fails in the target" if before.passed.any() else "passes"
        raise ConfigurationError(
            explain(f"`known`: no sample {what} ({base.target}).", "give data on which there is something to repair.")
        )
    problem = Problem(
        model,
        known,
        before,
        space,
        scope,
        task,
        base.localizer,
        base.fitness,
        before.passed,
        clock=clock,
        budget=base.budget,
        context=context,
    )
    data = {"known": (known, before), **{role: (others[role], evidence) for role, evidence in aside.items()}}
    store = Store(None if dirpath is None else Path(dirpath))
    return Study(problem, base, data, collective, store, observer)


@dataclass
class Study:
    """A model and its data, looked at once, for any number of runs.

    Attributes:
        problem: what is to be repaired.
        base: the settings that it was made of.
        data: for each role its data, and what the original model does on them.
        collective: the ranks that share out the runs.
        store: where runs are kept.
        observer: is told how it goes.
    """

    problem: Problem
    base: Settings
    data: Mapping[str, tuple[Sequence[Source], Evidence]]
    collective: Collective
    store: Store
    observer: SweepObserver | None = None
    _benches: dict[bool, Bench] = field(default_factory=dict)
    _recounts: dict[bool, dict[str, Recount]] = field(default_factory=dict)
    _there: dict[str, Kept] = field(default_factory=dict)
    _ground: str = ""

    def run(self, wanted: Sequence[tuple[Setting, int]]) -> SweepResult:
        """Makes the runs that are not there yet, shared out over ranks.

        Returns:
            All that were wanted, in their order, the same on each rank.
        """
        jobs = [Job(self._key(setting, seed), setting, seed) for setting, seed in wanted]
        unknown = [job.key for job in jobs if job.key not in self._there]
        there = self._there
        there |= exchanged(self.store.read(unknown), self.collective)
        missing = [job for job in jobs if job.key not in there]
        error, made = None, {}
        try:
            made = self._made(missing[self.collective.rank :: self.collective.world_size], jobs, there)
        except Exception as caught:
            error = caught
        if self.collective.any(error is not None):
            raise error or RepairError("another rank could not make its runs of the sweep.")
        there |= exchanged(made, self.collective)
        result = self._result(jobs, there)
        self._keep_table(result)
        return result

    def explore(self, grid: Grid, trials: Trials, seeds: Sequence[int]) -> SweepResult:
        """Runs the combinations that a sampler chooses; the first rank has it.

        Returns:
            All runs of all trials, each setting once.
        """
        settings: list[Setting] = []

        def evaluate(combinations: Sequence[tuple[int, ...]]) -> list[tuple[Run, ...]]:
            agreed = self.collective.agreed(torch.tensor(combinations))
            asked = [parse_settings(one, self.base)[0] for one in chosen(grid, agreed)]
            new = {setting.name: setting for setting in asked}
            result = self.run([(setting, seed) for setting in new.values() for seed in seeds])
            settings.extend(setting for name, setting in new.items() if name not in {one.name for one in settings})
            return [result.of(setting.name) for setting in asked]

        trials.explore(grid, evaluate, chooses=self.collective.rank == 0)
        return self.run([(setting, seed) for setting in settings for seed in seeds])

    def _made(self, mine: Sequence[Job], jobs: Sequence[Job], there: Mapping[str, Kept]) -> dict[str, Kept]:
        """This rank's runs."""
        made: dict[str, Kept] = {}
        progress = _Progress(self.observer, len(jobs), len(jobs) - len(mine), sum(job.work for job in mine))
        biased: dict[bool, list[Job]] = {}
        for job in mine:
            biased.setdefault(job.setting.localizer.include_bias, []).append(job)
        with self.problem.clock.stage("sweep"):
            for include_bias, own in biased.items():
                bench, recounts = self._bench(include_bias), self._recounts[include_bias]
                waiting: list[Found] = []
                searching, counting = 0.0, 0.0
                parts = list(batches(own, bench.problem))
                for i, part in enumerate(parts):
                    began = time.perf_counter()
                    waiting += bench.find(part, partial(progress.within, part))
                    searching += time.perf_counter() - began
                    streams = any(recount.streams for recount in recounts.values())
                    if streams and searching < PATIENCE * counting and i < len(parts) - 1:
                        progress.finish(part)
                        continue
                    began = time.perf_counter()
                    new = _counted(waiting, recounts, bench)
                    counting, searching, waiting = time.perf_counter() - began, 0.0, []
                    self.store.write(new)
                    made |= new
                    progress.finish(part)
                    so_far = {**there, **made}
                    self._keep_table(self._result([job for job in jobs if job.key in so_far], so_far))
        return made

    def _bench(self, include_bias: bool) -> Bench:
        if include_bias not in self._benches:
            problem = self.problem
            if include_bias != self.base.localizer.include_bias:
                space, scope = find_scope(problem.model, self.base.layer, include_bias=include_bias)
                problem = replace(problem, space=space, scope=scope)
            self._benches[include_bias] = Bench(problem, self.base)
            self._recounts[include_bias] = {
                role: Recount(problem, sources, before) for role, (sources, before) in self.data.items()
            }
        return self._benches[include_bias]

    def _key(self, setting: Setting, seed: int) -> str:
        if not self._ground:
            evidence = {role: evidence_digest(before) for role, (_, before) in self.data.items()}
            model = hash_tensors(self.problem.model.state_dict())
            passed = [source.split for source in self.problem.known if source.passed]
            said = self.base.plain()
            self._ground = digest([model, evidence, passed, said["layer"], repr(self.problem.task)])
        return digest([self._ground, setting.plain(), seed])

    def _result(self, jobs: Sequence[Job], there: Mapping[str, Kept]) -> SweepResult:
        # What was kept may have had another label.
        kept = {(job.setting.name, job.seed): there[job.key] for job in jobs}
        runs = tuple(replace(there[job.key].run, setting=job.setting.name) for job in jobs)
        original = {
            include_bias: {
                name: parameter.detach().cpu().clone()
                for site in self._bench(include_bias).problem.space.sites
                for name, parameter in site.parameters.items()
            }
            for include_bias in {job.setting.localizer.include_bias for job in jobs}
        }
        layer = self.base.layer if isinstance(self.base.layer, str) else ", ".join(self.base.layer)
        settings = {job.setting.name: job.setting for job in jobs}
        return SweepResult(runs, str(self.base.target), layer, settings=settings, weights=kept, original=original)

    def _keep_table(self, result: SweepResult) -> None:
        if self.store.folder is not None and self.collective.rank == 0:
            self.store.folder.mkdir(parents=True, exist_ok=True)
            result.to_csv(self.store.folder / "sweep.csv")


def _counted(found: Sequence[Found], recounts: Mapping[str, Recount], bench: Bench) -> dict[str, Kept]:
    """Rows and weights of some runs by their keys."""
    began = time.perf_counter()
    counts = {role: recount(found) for role, recount in recounts.items()}
    share = (time.perf_counter() - began) / len(found)
    layer = ", ".join(site.name or type(site.module).__name__ for site in bench.problem.space.sites)
    kept = {}
    for i, one in enumerate(found):
        columns = {key: value for role in counts for key, value in counts[role][i].columns(role).items()}
        run = _row(one, layer, one.seconds + share, columns)
        kept[one.job.key] = Kept(run, one.where, one.values)
    return kept


def _row(found: Found, layer: str, seconds: float, counts: Mapping[str, float]) -> Run:
    setting, result = found.job.setting, found.result
    fitness = setting.fitness
    kind = getattr(fitness, "kind", None)
    return Run(
        setting=setting.name,
        fitness=str(kind or getattr(fitness, "__name__", type(fitness).__name__)),
        alpha=float(fitness.alpha) if kind in ("eq1", "eq2") else None,
        perfect_intact=bool(getattr(fitness, "perfect_intact", False)),
        n_weights=getattr(setting.localizer, "n_weights", None),
        n_passed=setting.n_passed,
        particles=setting.method.particles,
        seed=found.job.seed,
        layer=layer,
        n_localized=len(found.where),
        iterations=0 if result is None else result.iterations,
        value=None if result is None else result.fitness,
        patched=0 if result is None else int(result.history.patched[-1]),
        intact=found.n_passed if result is None else int(result.history.intact[-1]),
        changed=found.changed,
        seconds=round(seconds, 4),
        **counts,  # type: ignore[arg-type]
    )


class _Progress:
    """Tells an observer how many runs are done, and how long the rest takes if it goes on as it did.

    Args:
        observer: is told.
        total: runs in all.
        done: those that this process has not to make.
        work: what all others take, as `Job.work` has it.
    """

    def __init__(self, observer: SweepObserver | None, total: int, done: int, work: int) -> None:
        self.observer, self.total, self.done, self.work = observer, total, done, work
        self.worked = 0.0
        self.began = time.perf_counter()

    def within(self, part: Sequence[Job], done: int, total: int) -> None:
        """In the middle of some runs: this many iterations of at most so many were made."""
        self._show(self.worked + sum(job.work for job in part) * done / max(1, total))

    def finish(self, part: Sequence[Job]) -> None:
        """Some runs are done, early or not."""
        self.worked += sum(job.work for job in part)
        self.done += len(part)
        self._show(self.worked)

    def _show(self, worked: float) -> None:
        if self.observer is not None and worked:
            left = (time.perf_counter() - self.began) / worked * (self.work - worked)
            self.observer.show(self.done, self.total, f"{_duration(left)} left")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"about {math.ceil(seconds)} s"
    return f"about {math.ceil(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _check_counting(base: Settings) -> None:
    for name in ("slices", "quotas", "protected"):
        if getattr(base, name) is not None:
            raise ConfigurationError(
                explain(
                    f"`{name}`: the table of a sweep has no column for it.",
                    f"leave `{name}` out, and give it to `repair` with the run that you choose.",
                )
            )


def _check_whole(sources: Iterable[Source]) -> None:
    for source in sources:
        if len(source.positions) < len(source.index):
            raise ConfigurationError(
                explain(
                    f"`{source.split}` data are shared out: {len(source.positions)} of {len(source.index)} are here.",
                    "give each rank all of the data; a sweep shares out the runs.",
                )
            )
