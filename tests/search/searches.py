"""Searches whose best weights are known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.search import SearchResult, WeightStats
from lightning_nrl.search.scores import Scores

WIDE = WeightStats(mean=0.0, std=1.0, lowest=-3.0, highest=3.0)
N = 50


def sphere(values: Tensor) -> Scores:
    """The loss is the mean square; nothing is ever repaired or broken."""
    loss = values.double().square().mean(-1)
    none = torch.zeros_like(loss)
    return Scores(none, none + N, loss, loss, N, N)


def wall(values: Tensor) -> Scores:
    """Each weight below 0 breaks a passed sample, each weight within 1/4 of 1/2 repairs a failed
    one.
    """
    values = values.double()
    loss = (values - 0.5).abs().mean(-1)
    patched = ((values - 0.5).abs() < 0.25).sum(-1)
    return Scores(
        patched.double(), N - (values < 0).sum(-1).double(), loss, loss, values.shape[-1], N
    )


def first_weight(values: Tensor) -> Scores:
    """Looks at the first weight only, which no search has as padding."""
    return wall(values[..., :1])


class Quitting:
    """`wall`, which gives up whom it may."""

    gives_up = True

    def __init__(self, score: Any = wall) -> None:
        self.score = score
        self.given_up = 0
        self.over: list[list[bool]] = []

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        scores = self.score(values)
        if most_broken is None:
            return scores
        self.over.append((most_broken < 0).all(1).tolist())
        out = N - scores.intact > most_broken
        self.given_up += int(out.sum())
        losses = (
            loss.masked_fill(out, math.nan) for loss in (scores.loss_failed, scores.loss_passed)
        )
        return Scores(
            scores.patched + 99 * out, scores.intact, *losses, scores.n_failed, scores.n_passed
        )


def original(n_searches: int = 1, n_weights: int = 4, seed: int = 0, least: float = 1.0) -> Tensor:
    return torch.rand(n_searches, n_weights, generator=torch.Generator().manual_seed(seed)) + least


def same(a: SearchResult, b: SearchResult) -> bool:
    """The same but for the mean fitness, which leaves out candidates that were given up."""
    return (
        torch.equal(a.values, b.values)
        and (a.fitness, a.iterations, a.stopped) == (b.fitness, b.iterations, b.stopped)
        and all(
            torch.equal(getattr(a.history, name), getattr(b.history, name))
            for name in ("best", "patched", "intact")
        )
        and torch.equal(a.history.loss_failed, b.history.loss_failed)
    )
