"""The search by particle swarm: start, then ask, score, tell until nothing better comes.

AllWeights stays on the device: the host looks whether it is time to stop no more often than once in ten iterations, and
a swarm whose time had come earlier was frozen meanwhile, so that the result does not depend on when the host looks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_nrl._scoring.scores import QuittingScorer, Scorer, Scores
from lightning_nrl.errors import ConfigurationError, EvaluationError, explain
from lightning_nrl.search.fitness import Fitness, FitnessFunction, per_swarm
from lightning_nrl.search.init_stats import WeightStats
from lightning_nrl.search.pso import ParticleSwarm, Swarm, ask, start, tell
from lightning_nrl.search.rng import RandomStreams
from lightning_nrl.search.search_result import SearchHistory, SearchResult

__all__ = ["search", "search_many"]

ROWS = 8
"""Numbers kept of each iteration: those of `SearchHistory`, and how many iterations ago the fitness grew."""

PROGRESS_EVERY = 10
"""Iterations between two reports, and between two looks at the stop rule where looking makes a device wait."""


def search(
    scorer: Scorer,
    original: Tensor,
    spread: WeightStats,
    *,
    fitness: Fitness | None = None,
    settings: ParticleSwarm | None = None,
    seed: int = 0,
    elites: Tensor | None = None,
    is_over: Callable[[], bool] | None = None,
    on_progress: Callable[[int, SearchHistory], None] | None = None,
) -> SearchResult:
    """Looks for better values of the localised weights.

    Args:
        scorer: scores candidates of `1 x P x K`, in the dtype of `original`.
        original: `K`, the weights before the repair, on the device where the search is to run.
        spread: the distribution of the layer's weights; its tensors broadcast to `K`.
        fitness: what to maximise; None: the lexicographic ranking.
        settings: of the swarm; None: the defaults.
        seed: the only source of randomness.
        elites: `M x K`, known good weights that particles are placed at, `M` below the number of particles. What is
            found is never worth less than any of them.
        is_over: asked after each iteration (on a GPU after each tenth) whether time is over; a search that is asked
            may end elsewhere on another run.
        on_progress: told after every tenth iteration and at the end how many were made, and the history so far.

    Returns:
        The best candidate. If nothing is better than the original weights, these are returned bit for bit.

    Raises:
        ConfigurationError: `elites` do not fit `original` or the number of particles, or are not finite.
        EvaluationError: the loss of the original weights is NaN or infinite.
    """
    report = None if on_progress is None else lambda done, histories: on_progress(done, histories[0])
    return search_many(
        scorer,
        original[None],
        spread,
        seeds=(seed,),
        fitness=fitness,
        settings=settings,
        elites=None if elites is None else elites[None],
        is_over=is_over,
        on_progress=report,
    )[0]


@torch.no_grad()
def search_many(
    scorer: Scorer,
    original: Tensor,
    spread: WeightStats,
    *,
    seeds: Sequence[int],
    fitness: Fitness | Sequence[Fitness] | None = None,
    settings: ParticleSwarm | None = None,
    sizes: Sequence[int] | None = None,
    elites: Tensor | None = None,
    is_over: Callable[[], bool] | None = None,
    on_progress: Callable[[int, list[SearchHistory]], None] | None = None,
) -> list[SearchResult]:
    """Runs S searches at once. Each finds, bit for bit, what `search` finds for it alone.

    Args:
        scorer: scores candidates of `S x P x K`, in the dtype of `original`; each swarm may have samples of its own.
        original: `S x K`, each swarm's weights before the repair, padded with finite values.
        spread: the distribution of the layers' weights; its tensors broadcast to `S x K`.
        seeds: one a swarm.
        fitness: one for all or one a swarm; None: the lexicographic ranking.
        settings: of every swarm; None: the defaults.
        sizes: how many of the K weights each swarm has. The rest is padding at the end and never moves. None: all.
        elites: `S x M x K`, known good weights of each swarm, padded likewise; see `search`.
        is_over: as for `search`.
        on_progress: as for `search`, with one history a swarm, each as long as its swarm was in search.

    Returns:
        One result a swarm, without padding. `seconds` is the time of all together.

    Raises:
        ConfigurationError: `seeds`, `fitness`, `sizes` or `elites` do not fit `original`.
        EvaluationError: the loss of a swarm's original weights is NaN or infinite.
    """
    began = time.perf_counter()
    settings = settings or ParticleSwarm()
    n_swarms, n_weights = original.shape
    _check(n_swarms, n_weights, seeds, fitness, sizes)
    _check_elites(original, elites, settings.particles)
    value = per_swarm(fitness, original.device) if isinstance(fitness, Sequence) else fitness or Fitness()
    streams = RandomStreams.seeded(seeds, original.device, sizes)

    swarm = start(original, spread, settings, streams, elites)
    scores = scorer(swarm.position.to(original.dtype))
    before = _first(scores)
    _check_original(before)
    books = _Books(settings, swarm, sizes)
    swarm = books.enter(swarm, scores, value(scores, before))
    original_fitness = swarm.best_fitness[:, 0]
    interval = _interval(original.device)
    rows, over = books.read(), is_over is not None and is_over()
    while books.done < settings.iterations and _searching(rows, settings) and not over:
        for _ in range(min(interval - books.done % interval, settings.iterations - books.done)):
            swarm = ask(swarm, settings, streams)
            scores = _score(scorer, swarm, original.dtype, value, before, books.frozen)
            swarm = books.enter(swarm, scores, value(scores, before))
        rows, over = books.read(), is_over is not None and is_over()
        if on_progress is not None and books.done % PROGRESS_EVERY == 0:
            histories = _histories(rows, settings)
            on_progress(_longest(histories), histories)
    histories = _histories(rows, settings)
    if on_progress is not None and (books.done % PROGRESS_EVERY or books.done == 0):
        on_progress(_longest(histories), histories)
    values = [
        row[:size].clone() for row, size in zip(swarm.leader.to(original.dtype), books.sizes.tolist(), strict=True)
    ]
    seconds = time.perf_counter() - began
    return [
        SearchResult(
            values=values[s],
            fitness=history.best[-1].item(),
            original_fitness=original_fitness[s].item(),
            iterations=len(history) - 1,
            stopped=_reason(rows[len(history) - 1, -1, s], len(history) - 1, settings),
            history=history,
            seconds=seconds,
        )
        for s, history in enumerate(histories)
    ]


def _score(
    scorer: Scorer, swarm: Swarm, dtype: torch.dtype, value: FitnessFunction, before: Scores, frozen: Tensor
) -> Scores:
    """Scores the swarms; tells a scorer that can give up which candidates can no longer be their particle's best.

    Those of a frozen swarm, `S` bool, can not, whatever they break.
    """
    position = swarm.position.to(dtype)
    if not isinstance(scorer, QuittingScorer):
        return scorer(position)
    limit = value.most_broken(swarm.best_fitness, before.n_failed) if isinstance(value, Fitness) else None
    if scorer.gives_up and len(frozen) > 1 and bool(frozen.any()):
        any_number = torch.full_like(swarm.best_fitness, math.inf)
        limit = (any_number if limit is None else limit).masked_fill(frozen[:, None], -1.0)
    return scorer(position) if limit is None else scorer(position, limit)


class _Books:
    """What is remembered of every iteration, `T + 1` of them, on the device.

    Attributes:
        done: iterations made.
        stale: `S`, iterations since the last better fitness. Once that reaches the patience, the swarm is frozen: no
            fitness counts any more.
    """

    def __init__(self, settings: ParticleSwarm, swarm: Swarm, sizes: Sequence[int] | None) -> None:
        n_swarms, _, n_weights = swarm.position.shape
        fitness = swarm.leader_fitness
        self.done = -1
        self.patience = settings.patience
        self.stale = torch.zeros_like(fitness)
        self.best = fitness.new_zeros(4, n_swarms)
        self.rows = fitness.new_zeros(settings.iterations + 1, ROWS, n_swarms)
        self.sizes = torch.tensor([n_weights] * n_swarms if sizes is None else list(sizes), device=fitness.device)

    @property
    def frozen(self) -> Tensor:
        """Which swarms are over, `S` bool."""
        return self.stale >= self.patience

    def enter(self, swarm: Swarm, scores: Scores, fitness: Tensor) -> Swarm:
        """Tells the swarm its fitness, `S x P`, and writes the iteration down."""
        fitness = fitness.masked_fill(self.frozen[:, None], -math.inf)
        told = tell(swarm, fitness)
        better = told.leader_fitness > swarm.leader_fitness
        which = fitness.argmax(1, keepdim=True)
        found = torch.stack([x.gather(1, which)[:, 0].to(fitness.dtype) for x in _columns(scores)])
        self.best = torch.where(better, found, self.best)
        self.stale = torch.where(better, 0.0, self.stale + 1)
        self.done += 1
        finite = fitness.isfinite()
        mean = fitness.masked_fill(~finite, 0.0).sum(1) / finite.sum(1)
        spread = (swarm.position - swarm.position.mean(1, keepdim=True)).square().mean(1).sqrt()
        diversity = spread.sum(1) / self.sizes
        self.rows[self.done] = torch.stack(
            [told.leader_fitness, mean, *self.best, diversity.to(fitness.dtype), self.stale]
        )
        return told

    def read(self) -> Tensor:
        """The iterations so far, `T x ROWS x S`, on the CPU. The host waits for the device here, and here alone."""
        return self.rows[: self.done + 1].cpu()


def _searching(rows: Tensor, settings: ParticleSwarm) -> bool:
    return bool((rows[-1, -1] < settings.patience).any())


def _histories(rows: Tensor, settings: ParticleSwarm) -> list[SearchHistory]:
    """One a swarm, as long as it was in search."""
    stale = rows[:, -1]
    length = torch.arange(1, len(rows) + 1)[:, None]
    ends = torch.where(stale < settings.patience, len(rows), length).amin(0).tolist()
    columns = rows[:, :-1].double().unbind(2)
    return [
        SearchHistory(*(column[:end].clone() for column in swarm.unbind(1)))
        for swarm, end in zip(columns, ends, strict=True)
    ]


def _reason(stale: Tensor, iterations: int, settings: ParticleSwarm) -> str:
    if iterations == settings.iterations:
        return f"all {iterations} iterations were made"
    return "time was over" if stale < settings.patience else f"no better fitness in {settings.patience} iterations"


def _check(
    n_swarms: int,
    n_weights: int,
    seeds: Sequence[int],
    fitness: Fitness | Sequence[Fitness] | None,
    sizes: Sequence[int] | None,
) -> None:
    for name, given in (("seeds", seeds), ("fitness", fitness), ("sizes", sizes)):
        if isinstance(given, Sequence) and len(given) != n_swarms:
            raise ConfigurationError(
                explain(f"`{name}` has {len(given)} entries for {n_swarms} swarms.", "give one entry a swarm.")
            )
    if n_weights == 0 or (sizes is not None and not all(0 < size <= n_weights for size in sizes)):
        found = f"`original` has {n_weights}" if sizes is None else f"`sizes` is {list(sizes)} of {n_weights}"
        raise ConfigurationError(
            explain(f"{found} weights.", "give each swarm at least one weight, and no more than there are.")
        )


def _check_elites(original: Tensor, elites: Tensor | None, particles: int) -> None:
    if elites is None:
        return
    fits = elites.ndim == 3 and elites.shape[::2] == original.shape and elites.shape[1] < particles
    if not fits or not bool(elites.isfinite().all()):
        found = f"has the shape {list(elites.shape)}" if not fits else "is not finite"
        raise ConfigurationError(
            explain(
                f"`elites` {found} for {list(original.shape)} weights and {particles} particles.",
                "give finite weights of the same swarms, fewer than particles.",
            )
        )


def _check_original(before: Scores) -> None:
    sound = before.loss_failed.isfinite() & before.loss_passed.isfinite()
    if not bool(sound.all()):
        raise EvaluationError(
            explain(
                "The original weights have a loss that is NaN or infinite on the known data.",
                "look at these samples with the model as it is, or leave them out of the data.",
            )
        )


def _interval(device: torch.device) -> int:
    return 1 if device.type == "cpu" else PROGRESS_EVERY


def _longest(histories: list[SearchHistory]) -> int:
    return max(len(history) for history in histories) - 1


def _columns(scores: Scores) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return scores.patched, scores.intact, scores.loss_failed, scores.loss_passed


def _first(scores: Scores) -> Scores:
    """The scores of each swarm's first particle, which starts at the original weights: `S x 1`."""
    patched, intact, loss_failed, loss_passed = (x[:, :1] for x in _columns(scores))
    return Scores(patched, intact, loss_failed, loss_passed, scores.n_failed, scores.n_passed)
