"""Searches whose best weights are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_nrl.search import SearchResult, WeightStats
from lightning_nrl.search.scores import Scores

WIDE = WeightStats(mean=0.0, std=1.0, lowest=-3.0, highest=3.0)
N = 50


class Plain:
    """Scores by a function, and remembers the candidates of each call."""

    def __init__(self, score: Callable[[Tensor], Scores]) -> None:
        self.score = score
        self.seen = []

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        self.seen.append(values.clone())
        return self.score(values)


class Quitting(Plain):
    """Gives up all candidates that it may, and counts them."""

    given_up = 0

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        scores = self.score(values)
        if most_broken is None:
            return scores
        hopeless = N - scores.intact > most_broken
        self.given_up += int(hopeless.sum())
        return Scores(
            scores.patched + 99 * hopeless,
            scores.intact,
            scores.loss_failed.masked_fill(hopeless, math.nan),
            scores.loss_passed.masked_fill(hopeless, math.nan),
            scores.n_failed,
            scores.n_passed,
        )


@Plain
def sphere(values: Tensor) -> Scores:
    """The loss is the mean square; nothing is ever repaired or broken."""
    loss = values.double().square().mean(-1)
    nothing = torch.zeros_like(loss)
    return Scores(nothing, nothing + N, loss, loss, N, N)


@Plain
def wall(values: Tensor) -> Scores:
    """Each weight below 0 breaks a sample, each weight within 1/4 of 1/2 repairs one."""
    values = values.double()
    loss = (values - 0.5).abs().mean(-1)
    patched = ((values - 0.5).abs() < 0.25).double().sum(-1)
    intact = N - (values < 0).double().sum(-1)
    return Scores(patched, intact, loss, loss, values.shape[-1], N)


def original(n_weights: int = 4, seed: int = 0, least: float = 1.0) -> Tensor:
    return torch.rand(n_weights, generator=torch.Generator().manual_seed(seed)) + least


def same(a: SearchResult, b: SearchResult) -> bool:
    """True if all is the same but the mean fitness, which leaves out candidates given up."""
    return (
        torch.equal(a.values, b.values)
        and (a.fitness, a.iterations, a.stopped) == (b.fitness, b.iterations, b.stopped)
        and torch.equal(a.history.best, b.history.best)
        and torch.equal(a.history.patched, b.history.patched)
        and torch.equal(a.history.intact, b.history.intact)
        and torch.equal(a.history.loss_failed, b.history.loss_failed)
    )
