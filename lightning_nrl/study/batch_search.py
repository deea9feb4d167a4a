"""Runs many searches on one recording of the activations of known data, and counts their results
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.errors import EmptyLocalizationError
from lightning_nrl.evaluation.deployed_precision import rounding_reserve
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import LayerRef, ParameterSpace
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts, flip_masks
from lightning_nrl.localization import KnownData, Localization
from lightning_nrl.methods import Problem
from lightning_nrl.methods.search_samples import record_known, scorer_for
from lightning_nrl.pipeline.problem_builder import passed_rows
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.search import SearchHistory, WeightStats, search_many
from lightning_nrl.search.fitness import Fitness
from lightning_nrl.search.scoring.activation_cache import (
    ActivationCache,
    Chunk,
    ReplayGroup,
    split_inputs,
)
from lightning_nrl.search.scoring.memory import default_budget
from lightning_nrl.search.scoring.recording import can_be_cut, find_group
from lightning_nrl.search.scoring.sparse_delta import output_under
from lightning_nrl.search.scoring.traced_model import EditableModel
from lightning_nrl.study.grid import Setting
from lightning_nrl.study.run_store import NO_COUNTS, Run, StoredRun

SWARMS_BY_DEVICE = {
    "cpu": 32
}  # swarms in a batch, 512 on other devices; larger batches are no faster on a CPU
TENSORS_PER_SWARM = 16  # approximate number of tensors of the size of all particles, held at once
STATES_MEMORY = 256 << 20  # bytes for the changed layers of runs, kept from one batch to the next

OnProgress = Callable[
    [int, list[SearchHistory]], None
]  # called with the number of iterations so far


@dataclass(frozen=True)
class RunRequest:
    """A setting and a seed to search with. The run is stored under `key`, a hash of setting, seed,
    model and data.
    """

    key: str
    setting: Setting
    seed: int

    @property
    def work(self) -> int:
        """Number of weight vectors that the search scores, as a measure of its time."""
        return self.setting.method.particles * (self.setting.method.iterations + 1)


@dataclass
class BatchSearch:
    """Runs searches on one problem. They share recorded activations of known data, and equal
    localizers run once.
    """

    problem: Problem
    base: Settings
    _localized: list[tuple[Any, Tensor, Localization | None]] = field(default_factory=list)
    _passed: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    @cached_property
    def recording(self) -> ActivationCache:
        with self.problem.clock.stage("localize"):
            before = self.problem.before
            return record_known(self.problem, before.targeted | before.passed)

    def localization(self, request: RunRequest) -> Localization | None:
        problem, localizer, passed, localized = (
            self.problem,
            request.setting.localizer,
            self.passed(request),
            None,
        )
        for known, of, found in self._localized:
            if known == localizer and of is passed:
                return found
        recording = self.recording
        with problem.clock.stage("localize"), suppress(EmptyLocalizationError):
            known_data = KnownData(problem.evaluator, problem.known, problem.before, problem.space)
            localized = localizer.on(known_data)(
                recording, problem.evaluator, failed=problem.before.targeted, passed=passed
            )
        self._localized.append((localizer, passed, localized))
        return localized

    def passed(self, request: RunRequest) -> Tensor:
        which = request.setting.n_passed, request.seed if request.setting.n_passed else 0
        if which not in self._passed:
            search = replace(self.base.search, n_passed=request.setting.n_passed)
            asked = replace(self.base, search=search, seed=request.seed)
            self._passed[which] = passed_rows(self.problem.before, self.problem.known, asked)
        return self._passed[which]

    def run(
        self, requests: Sequence[RunRequest], on_progress: OnProgress | None = None
    ) -> dict[str, StoredRun]:
        """Runs a batch of searches (see `batches`), each with the same result as alone. `Recount`
        then adds counts.
        """
        problem, space, before = self.problem, self.problem.space, self.problem.before
        runs = {request.key: self._unsearched(request) for request in requests}
        localized = [(request, self.localization(request)) for request in requests]
        searched = [
            (request, found.weights.cpu().clone())
            for request, found in localized
            if found is not None
        ]
        if not searched:
            return runs
        sizes = [len(weights) for _, weights in searched]
        where = torch.full((len(searched), max(sizes)), -1)
        for row, (_, weights) in zip(where, searched, strict=True):
            row[: len(weights)] = weights
        fitness: list[Any] = [request.setting.fitness for request, _ in searched]
        alike = all(one == fitness[0] for one in fitness)
        passed = torch.stack([self.passed(request) for request, _ in searched])
        with torch.no_grad():
            reserve = rounding_reserve(problem.evaluator.precision, before)
            scorer = scorer_for(
                problem, self.recording, where, before.targeted, passed, fitness[0], reserve=reserve
            )
            there = where.clamp_min(0).to(space.device)
            original = space.flat()[there]
            results = search_many(
                scorer,
                original,
                WeightStats.around(space, there),
                seeds=[request.seed for request, _ in searched],
                fitness=fitness[0] if alike else fitness,
                searcher=requests[0].setting.method,
                sizes=sizes,
                on_progress=on_progress,
            )
        for (request, weights), result, start in zip(searched, results, original, strict=True):
            run = replace(
                runs[request.key].run,
                n_localized=len(weights),
                iterations=result.iterations,
                value=result.fitness,
                patched=int(result.history.patched[-1]),
                intact=int(result.history.intact[-1]),
                changed=not torch.equal(result.values, start[: len(weights)]),
                seconds=result.seconds / len(searched),
            )
            runs[request.key] = StoredRun(run, weights, result.values.cpu())
        return runs

    def _unsearched(self, request: RunRequest) -> StoredRun:
        space = self.problem.space
        run = Run(
            setting=request.setting.name,
            **request.setting.columns(),
            seed=request.seed,
            layer=", ".join(site.name or type(site.module).__name__ for site in space.sites),
            n_localized=0,
            iterations=0,
            value=None,
            patched=0,
            intact=int(self.passed(request).sum()),
            changed=False,
            known=NO_COUNTS,
        )
        return StoredRun(run, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=space.dtype))


def batches(requests: Sequence[RunRequest], problem: Problem) -> Iterator[list[RunRequest]]:
    """Splits requests into batches that fit into memory. On a CPU a batch has one setting only,
    which is faster.
    """
    device, kinds = problem.space.device, dict[Any, list[RunRequest]]()
    for request in requests:
        fitness, method = request.setting.fitness, request.setting.method
        alike: Any = request.setting.name
        if isinstance(fitness, Fitness) and device.type != "cpu":
            alike = fitness.uses_passed_loss
        kinds.setdefault((method, alike), []).append(request)
    for kind in kinds.values():
        # Sorted, since equal numbers of weights need no padding and equal samples are prepared
        # once.
        kind.sort(
            key=lambda one: (
                getattr(one.setting.localizer, "n_weights", None) or 0,
                one.setting.n_passed or 0,
            )
        )
        size = (
            kind[0].setting.method.particles
            * problem.space.size
            * problem.space.dtype.itemsize
            * TENSORS_PER_SWARM
        )
        n = max(1, min(_budget(problem) // size, SWARMS_BY_DEVICE.get(device.type, 512)))
        for start in range(0, len(kind), n):
            yield kind[start : start + n]


def _budget(problem: Problem) -> int:
    return (
        default_budget(problem.space.device)
        if problem.memory_limit is None
        else problem.memory_limit
    )


@dataclass(frozen=True)
class ExactBatch:
    """One recorded batch, whose logits under other weights equal those of the deployed model bit
    for
    bit.

    A replay runs the model only from the first searched layer on. Replays are used if a replay
    under the original weights gives exactly the logits of the whole model. Otherwise the whole
    model runs.
    """

    cache: ActivationCache  # activations of this batch alone
    chunk: Chunk  # rows and targets of the whole batch

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.cache.groups)

    def logits(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the deployed model's logits. `parameters` has new values of all parameters of the
        searched layers.
        """
        model = self.cache.model

        def edit(site: LayerRef, x: Tensor, y: Tensor) -> Tensor:
            with model.evaluator.context():
                return output_under(parameters, site, x)

        if self.cache.is_replayable(self.chunk):
            return self.cache.replay(self.chunk, edit)
        group = self.cache.groups[0]
        return model.logits(
            group.inputs(group.take(self.chunk.samples, model.space.device)), parameters
        )


@torch.no_grad()
def exact_batches(
    evaluator: Evaluator, batches: Iterable[tuple[Batch, Tensor]], space: ParameterSpace
) -> Iterator[ExactBatch]:
    """Records each batch. `batches` has pairs of a batch and its samples' rows in the results, `n`
    int64 on the CPU.
    """
    model = EditableModel(evaluator, space)
    own = {name: parameter.detach() for name, parameter in space.parameters.items()}
    known: list[ReplayGroup] = []  # replay plans of earlier batches
    sliceable: bool | None = None  # unknown before the first batch
    for batch, rows in batches:
        inputs, n = (batch.args, batch.kwargs), len(rows)
        if sliceable is None:
            sliceable = can_be_cut(model, inputs, n)
        made = None
        if sliceable:
            cache = ActivationCache(model, list(known), rows)
            made = _of_one_batch(model, *find_group(cache, inputs, n, space.device), batch, rows)
            known = [group for group in cache.groups if group.plan is not None]
        if made is None or not torch.equal(made.logits(own), model.logits(inputs, {})):
            made = _of_one_batch(model, *split_inputs(inputs, n, space.device), batch, rows)
        yield made


def _of_one_batch(
    model: EditableModel, group: ReplayGroup, stored: list[Tensor], batch: Batch, rows: Tensor
) -> ExactBatch:
    # Every tensor keeps its own layout: another layout may round differently.
    own = group.empty_like(model.space.device, False, ())
    own.add(stored, batch.target, rows)
    own.finish()
    cache = ActivationCache(model, [own], rows)
    (chunk,) = cache.chunks()
    return ExactBatch(cache, chunk)


@dataclass
class Recount:
    """Counts what runs repair and break on some data. Keeps its recorded batches for later calls if
    memory allows.
    """

    problem: Problem
    sources: Sequence[Source]
    before: SampleResults
    _kept: list[ExactBatch] | None = None

    @torch.no_grad()
    def __call__(self, runs: Sequence[StoredRun]) -> list[TargetCounts]:
        before, space = self.before, self.problem.space
        right, targeted = before.right, before.targeted
        spared = right & before.in_target
        sums = torch.zeros(4, len(runs), dtype=torch.int64, device=space.device)
        changed = [r for r, stored in enumerate(runs) if stored.run.changed]
        at_once = max(1, STATES_MEMORY // (space.size * space.dtype.itemsize))
        state = lru_cache(at_once)(lambda r: space.changed(runs[r].where, runs[r].values))
        for batch in self._batches() if changed else ():
            was, aimed, own = (
                mask[batch.chunk.rows].to(space.device) for mask in (right, targeted, spared)
            )
            task, target = self.problem.evaluator.task, batch.chunk.target
            now = torch.stack([task.right(batch.logits(state(r)), target) for r in changed])
            _, broken, repaired, _ = flip_masks(was, now)
            sums[:, changed] += torch.stack([repaired & aimed, repaired, broken, broken & own]).sum(
                2
            )
        n, passed, n_targeted, n_spared = (
            len(before),
            *(int(mask.sum()) for mask in (right, targeted, spared)),
        )
        return [
            TargetCounts(
                passed - broken,
                broken,
                repaired,
                n - passed - repaired,
                n_targeted,
                aimed,
                n_spared,
                own,
            )
            for aimed, repaired, broken, own in sums.t().tolist()
        ]

    def _batches(self) -> Iterator[ExactBatch]:
        if self._kept is not None:
            yield from self._kept
            return
        free, kept = _budget(self.problem) // 2, list[ExactBatch]()
        batches = (
            (batch, self.before.rows(source.split, batch.position))
            for source in self.sources
            for batch in source
        )
        for batch in exact_batches(self.problem.evaluator, batches, self.problem.space):
            free -= batch.nbytes
            if free >= 0:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        self._kept = kept if free >= 0 else None
