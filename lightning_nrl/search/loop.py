"""The search loop: it asks a searcher for candidates, scores them and tells it their fitness.

A search ends when its fitness stops improving. On a GPU the loop checks only once in ten iterations
whether the search has ended, because a check waits for the device. The best candidate of a search
that has ended no longer changes, so the result does not depend on when the loop checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, EvaluationError
from lightning_nrl.search.fitness import Fitness, FitnessFunction
from lightning_nrl.search.scores import Scorer, Scores
from lightning_nrl.search.search_log import SearchHistory, SearchLog, SearchResult
from lightning_nrl.search.searcher import (
    SEARCHERS,
    RandomStream,
    Searcher,
    SearchOrigin,
    SearchState,
    WeightStats,
    search_dtype,
)

TIME_WAS_OVER = "time was over"  # stop reason of a search that hit its deadline

# Iterations between progress reports; on a GPU also between checks whether the search has ended.
PROGRESS_EVERY = 10


@torch.no_grad()
def search(
    scorer: Scorer,
    original: Tensor,
    stats: WeightStats,
    *,
    fitness: FitnessFunction | None = None,
    searcher: str | Searcher = "swarm",
    seed: int = 0,
    elites: Tensor | None = None,
    deadline: Deadline | None = None,
    on_progress: Callable[[int, SearchHistory], None] | None = None,
) -> SearchResult:
    """Searches for better values of the localised weights.

    The original weights are returned bit for bit if no candidate is better.

    Args:
        scorer: scores P candidates, `P x K` in the dtype of `original`.
        original: `K`, the weights before the repair, on the device of the search.
        stats: statistics of the layers' weights: floats, or tensors `K`.
        fitness: function to maximise; None: `Fitness()`, the lexicographic ranking.
        searcher: search algorithm, by name or as an object.
        seed: the only source of randomness.
        elites: `M x K`, candidates that are known to be good, with M below P. They are among the
            first candidates, so the result is never worse than any elite.
        deadline: time limit. With a limit, results may differ between runs.
        on_progress: called with the number of iterations and the history, after every ten
            iterations and at the end.

    Raises:
        EvaluationError: the loss of the original weights is NaN or infinite.
    """
    began = time.perf_counter()
    method = SEARCHERS.parse("searcher", searcher)
    fitness = fitness or Fitness()
    random = RandomStream(seed)
    dtype = search_dtype(original.dtype)
    if elites is None:
        elites = original.new_empty(0, len(original))
    origin = SearchOrigin(original.to(dtype), stats, elites.to(dtype))
    check_every = 1 if original.device.type == "cpu" else PROGRESS_EVERY

    state = method.init(origin, random)
    _check_first(method, state, origin)
    log = SearchLog(origin.original, method.iterations, method.patience)
    scores = scorer(state.candidates.to(original.dtype))
    before = scores.of_original()
    _check_original(before)
    ranking = log.record(state.candidates, scores, fitness(scores, before))
    state, original_fitness = method.tell(state, ranking), ranking[0]

    history, n_stale = log.read()
    time_is_over = deadline is not None and deadline.is_over()
    while log.done < method.iterations and n_stale < method.patience and not time_is_over:
        for _ in range(min(check_every - log.done % check_every, method.iterations - log.done)):
            state = method.ask(state, random)
            limit = None
            if state.threshold is not None:
                limit = fitness.most_broken(state.threshold, before.n_failed)
            scores = scorer(state.candidates.to(original.dtype), limit)
            ranking = log.record(state.candidates, scores, fitness(scores, before))
            state = method.tell(state, ranking)
        history, n_stale = log.read()
        time_is_over = deadline is not None and deadline.is_over()
        if on_progress is not None and log.done % PROGRESS_EVERY == 0:
            on_progress(len(history) - 1, history)
    if on_progress is not None and (log.done % PROGRESS_EVERY or log.done == 0):
        on_progress(len(history) - 1, history)

    iterations = len(history) - 1
    return SearchResult(
        values=log.best.to(original.dtype).clone(),
        fitness=history.best[-1].item(),
        original_fitness=original_fitness.item(),
        iterations=iterations,
        stopped=_stop_reason(method, iterations, n_stale),
        history=history,
        seconds=time.perf_counter() - began,
        n_failed=before.n_failed,
        n_passed=before.n_passed,
    )


def _stop_reason(method: Searcher, iterations: int, n_stale: int) -> str:
    if iterations == method.iterations:
        return f"all {iterations} iterations were made"
    if n_stale < method.patience:
        return TIME_WAS_OVER
    return f"no better fitness in {method.patience} iterations"


def _check_original(before: Scores) -> None:
    is_finite = before.loss_failed.isfinite() & before.loss_passed.isfinite()
    if not bool(is_finite):
        raise EvaluationError(
            "The original weights have a loss that is NaN or infinite on the known data.",
            "look for inputs with a loss of NaN, or leave these samples out of the data.",
        )


def _check_first(method: Searcher, state: SearchState, origin: SearchOrigin) -> None:
    first = origin.first_candidates
    begin = state.candidates[: len(first)]
    expected_shape = (method.n_candidates, len(origin.original))
    if state.candidates.shape != expected_shape or not torch.equal(begin, first):
        name = type(method).__name__
        raise ConfigurationError(
            f"`searcher`: {name}.init does not begin with the original weights and the elites.",
            "return `n_candidates x K` candidates that begin with `SearchOrigin.first_candidates`.",
        )
