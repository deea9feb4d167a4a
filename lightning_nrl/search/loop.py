"""The search loop asks a searcher for candidates, scores them, and tells the searcher their
fitness.

A search ends when its fitness stops improving. On a GPU the loop checks only once in ten iterations
whether all searches have ended, because a check waits for the device. The best candidate of a
search that has ended no longer changes, so the result does not depend on when the loop checks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, EvaluationError
from lightning_nrl.search.fitness import Fitness, FitnessFunction, fitness_per_search
from lightning_nrl.search.scores import Scorer, Scores
from lightning_nrl.search.search_log import SearchHistory, SearchLog, SearchResult, histories
from lightning_nrl.search.searcher import (
    SEARCHERS,
    RandomStreams,
    Searcher,
    SearchOrigin,
    SearchState,
    WeightStats,
    search_dtype,
)

TIME_WAS_OVER = "time was over"  # stop reason of a search that hit its deadline

PROGRESS_EVERY = 10  # iterations between progress reports; on a GPU also between checks whether searches have ended


def search(
    scorer: Scorer,
    original: Tensor,
    stats: WeightStats,
    *,
    fitness: FitnessFunction | None = None,
    searcher: str | Searcher[Any] = "swarm",
    seed: int = 0,
    elites: Tensor | None = None,
    deadline: Deadline | None = None,
    on_progress: Callable[[int, SearchHistory], None] | None = None,
    check_every: int | None = None,
) -> SearchResult:
    """Searches for better values of the localised weights. `search_many` explains the arguments.

    `original` has the shape `K` and `elites` has `M x K`, without the dimension of the searches.
    The original weights are returned bit for bit if no candidate is better.
    """
    report = (
        None if on_progress is None else lambda done, histories: on_progress(done, histories[0])
    )
    return search_many(
        scorer,
        original[None],
        stats,
        seeds=(seed,),
        fitness=fitness,
        searcher=searcher,
        elites=None if elites is None else elites[None],
        deadline=deadline,
        on_progress=report,
        check_every=check_every,
    )[0]


@torch.no_grad()
def search_many(
    scorer: Scorer,
    original: Tensor,
    stats: WeightStats,
    *,
    seeds: Sequence[int],
    fitness: FitnessFunction | Sequence[Fitness] | None = None,
    searcher: str | Searcher[Any] = "swarm",
    sizes: Sequence[int] | None = None,
    elites: Tensor | None = None,
    deadline: Deadline | None = None,
    on_progress: Callable[[int, list[SearchHistory]], None] | None = None,
    check_every: int | None = None,
) -> list[SearchResult]:
    """Runs S searches in one batch. Each search gives bit for bit the same result as `search`.

    One exception: a GPU library may sum in another order for another number of searches. This can
    change the choice between candidates that are equal up to rounding.

    Args:
        scorer: scores P candidates per search, `S x P x K` in the dtype of `original`, on that
            search's samples.
        original: `S x K`, the weights before the repair, on the device of the search. Padding may
            be any finite number.
        stats: statistics of the layers' weights: floats, or tensors that broadcast to `S x K`.
        seeds: one seed per search, the only source of randomness.
        fitness: one function to maximise, or one `Fitness` per search; None: `Fitness()`, the
            lexicographic ranking.
        searcher: search algorithm, by name or as an object.
        sizes: number of weights of each search. Further columns are padding, which never changes.
            None: K for each.
        elites: `S x M x K`, candidates that are known to be good, with M below P. They are among
            the first candidates, so the result is never worse than any elite.
        deadline: time limit, checked every `check_every` iterations. With a limit, results may
            differ between runs.
        on_progress: called with the number of iterations and all histories, at the end and at each
            check (see `check_every`) after a multiple of ten iterations.
        check_every: iterations between checks whether all searches have ended; a check waits for
            the device. None: 1 on a CPU, 10 elsewhere. Results do not depend on this number.

    Returns:
        One result per search, without padding. `SearchResult.seconds` is the time of all searches
        together.

    Raises:
        ConfigurationError: `seeds`, `fitness` or `sizes` does not have one entry per search.
        EvaluationError: the loss of a search's original weights is NaN or infinite.
    """
    began = time.perf_counter()
    method = SEARCHERS.parse("searcher", searcher)
    for name, given in (("seeds", seeds), ("fitness", fitness), ("sizes", sizes)):
        if isinstance(given, Sequence) and len(given) != len(original):
            problem = f"`{name}` has {len(given)} entries for {len(original)} searches."
            raise ConfigurationError(problem, "give one entry per search.")
    value = (
        fitness_per_search(fitness, original.device)
        if isinstance(fitness, Sequence)
        else fitness or Fitness()
    )
    streams = RandomStreams.seeded(seeds, sizes)
    origin = _origin(original, stats, sizes, elites)

    state = method.init(origin, streams)
    _check_first(method, state, origin)
    log = SearchLog(origin.original, method.iterations, method.patience, sizes)
    scores = scorer(state.candidates.to(original.dtype))
    first = [
        x[:, :1] for x in (scores.patched, scores.intact, scores.loss_failed, scores.loss_passed)
    ]
    before = Scores(first[0], first[1], first[2], first[3], scores.n_failed, scores.n_passed)
    _check_original(before)
    counted = log.record(state.candidates, scores, value(scores, before))
    state, original_fitness = method.tell(state, counted), counted[:, 0]
    interval = check_every or (1 if original.device.type == "cpu" else PROGRESS_EVERY)

    def report() -> None:
        if on_progress is not None:
            so_far = histories(rows, method.patience)
            on_progress(max(len(history) for history in so_far) - 1, so_far)

    rows, over = log.read(), deadline is not None and deadline.is_over()
    while (
        log.done < method.iterations and bool((rows[-1, -1] < method.patience).any()) and not over
    ):
        for _ in range(min(interval - log.done % interval, method.iterations - log.done)):
            state = method.ask(state, streams)
            scores = _score(scorer, state, original.dtype, value, before, log.frozen)
            state = method.tell(state, log.record(state.candidates, scores, value(scores, before)))
        rows, over = log.read(), deadline is not None and deadline.is_over()
        if log.done % PROGRESS_EVERY == 0:
            report()
    if log.done % PROGRESS_EVERY or log.done == 0:
        report()
    return _results(
        log, rows, method, original.dtype, original_fitness, time.perf_counter() - began
    )


def _results(
    log: SearchLog,
    rows: Tensor,
    method: Searcher[Any],
    dtype: torch.dtype,
    original_fitness: Tensor,
    seconds: float,
) -> list[SearchResult]:
    ended, found = histories(rows, method.patience), log.best.to(dtype)
    return [
        SearchResult(
            values=found[s, :size].clone(),
            fitness=history.best[-1].item(),
            original_fitness=original_fitness[s].item(),
            iterations=len(history) - 1,
            stopped=_stop_reason(rows[len(history) - 1, -1, s], len(history) - 1, method),
            history=history,
            seconds=seconds,
        )
        for s, (history, size) in enumerate(zip(ended, log.sizes.tolist(), strict=True))
    ]


def _origin(
    original: Tensor, stats: WeightStats, sizes: Sequence[int] | None, elites: Tensor | None
) -> SearchOrigin:
    dtype, device = search_dtype(original.dtype), original.device
    searched = None
    if sizes is not None:
        ends = torch.tensor(list(sizes), device=device)[:, None, None]
        searched = torch.arange(original.shape[1], device=device) < ends
    return SearchOrigin(
        original.to(dtype), stats, None if elites is None else elites.to(dtype), searched
    )


def _score(
    scorer: Scorer,
    state: SearchState,
    dtype: torch.dtype,
    value: FitnessFunction,
    before: Scores,
    frozen: Tensor,
) -> Scores:
    """Scores candidates. A scorer that can stop early skips the candidates of searches that have
    ended (`frozen`).
    """
    candidates = state.candidates.to(dtype)
    if not getattr(scorer, "gives_up", False):
        return scorer(candidates)
    limit: Tensor | None = None
    if state.threshold is not None and hasattr(value, "most_broken"):
        limit = value.most_broken(state.threshold, before.n_failed)
    if len(frozen) > 1 and bool(frozen.any()):
        if limit is None:
            shape, kind = candidates.shape[:2], widest(candidates.device)
            limit = torch.full(shape, math.inf, dtype=kind, device=candidates.device)
        limit = limit.masked_fill(frozen[:, None], -1.0)
    scored: Scores = scorer(candidates) if limit is None else scorer(candidates, limit)  # type: ignore[call-arg]
    return scored


def _stop_reason(stale: Tensor, iterations: int, method: Searcher[Any]) -> str:
    if iterations == method.iterations:
        return f"all {iterations} iterations were made"
    return (
        TIME_WAS_OVER
        if stale < method.patience
        else f"no better fitness in {method.patience} iterations"
    )


def _check_original(before: Scores) -> None:
    sound = before.loss_failed.isfinite() & before.loss_passed.isfinite()
    if not bool(sound.all()):
        raise EvaluationError(
            "The original weights have a loss that is NaN or infinite on the known data.",
            "look for inputs with a loss of NaN, or leave these samples out of the data.",
        )


def _check_first(method: Searcher[Any], state: SearchState, origin: SearchOrigin) -> None:
    first, (n_searches, n_weights) = origin.first_candidates, origin.original.shape
    fits = state.candidates.shape == (n_searches, method.n_candidates, n_weights)
    given = state.candidates[:, : first.shape[1]]
    if not fits or not torch.allclose(given, first, rtol=0.0, atol=0.0, equal_nan=True):
        raise ConfigurationError(
            f"`searcher`: {type(method).__name__}.init does not begin with the original weights and the elites.",
            "return `S x n_candidates x K` candidates that begin with `SearchOrigin.first_candidates`.",
        )
