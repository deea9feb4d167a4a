"""Initial candidates of a population, near the original weights or drawn from the distribution of
layer weights.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, check_choice
from lightning_nrl.search.searcher import RandomStreams, SearchOrigin, check_numbers

Start = Literal[
    "local", "half", "paper", "normal"
]  # initial distributions, which `ParticleSwarm` explains

ELITE_STEPS = (1.15, 0.8, 0.5, 1.3)
"""Positions of extra candidates on the line through the original weights (position 0) and an elite
(position 1).
"""


def first_positions(
    origin: SearchOrigin,
    streams: RandomStreams,
    n: int,
    start: Start,
    scale_min: float,
    scale_max: float,
) -> Tensor:
    """Returns `n` candidates per search, `S x n x K`. `ParticleSwarm` explains `start`, `scale_min`
    and `scale_max`.

    Candidate 0 is the original weights. With M elites, candidates 1 to M are the elites. Elites
    also move the other candidates that `start` would place near the original weights: up to half of
    these candidates lie on lines from the original weights through an elite, the rest lie around
    the original weights and around each elite in turn.
    """
    original = origin.original[:, None]
    dtype, device, n_weights = original.dtype, original.device, original.shape[-1]
    mean, std = broadcast_stat(origin.stats.mean, origin), broadcast_stat(origin.stats.std, origin)
    half = {"local": n, "normal": 1}.get(start, (n + 1) // 2)
    still = half if start == "paper" else 1
    scale = torch.ones(n, 1, dtype=dtype, device=device)
    scale[still:half, 0] = torch.logspace(
        math.log10(scale_min), math.log10(scale_max), half - still, dtype=dtype, device=device
    )
    candidate = torch.arange(n, device=device)[:, None]
    placed = candidate >= still
    if origin.searched is not None:
        placed = placed & origin.searched
    offset = scale * std * streams.normal(original, n, n_weights)
    position = torch.where(placed, torch.where(candidate < half, original, mean) + offset, original)
    if origin.elites is not None and origin.elites.shape[1]:
        position = _with_elites(position, original, origin.elites, offset.where(placed, 0.0), half)
        if origin.searched is not None:
            position = torch.where(origin.searched, position, original)
    return position


def broadcast_stat(x: float | Tensor, origin: SearchOrigin) -> Tensor:
    """Returns a statistic of `origin.stats` as a tensor that broadcasts to candidates `S x P x K`."""
    original = origin.original
    x = torch.as_tensor(x, dtype=original.dtype, device=original.device)
    return x[:, None] if x.ndim == 2 else x


def check_start(how: Any, **least: int) -> None:
    """Checks a searcher's `start`, `scale_min` and `scale_max`, and calls `check_numbers(how,
    **least)`.
    """
    check_numbers(how, **least)
    name, low, high = type(how).__name__, how.scale_min, how.scale_max
    check_choice(f"{name}.start", how.start, get_args(Start))
    if not isinstance(low, Real) or not isinstance(high, Real) or not 0 < low <= high < math.inf:  # type: ignore[operator]
        raise ConfigurationError(
            f"`{name}.scale_min={low!r}` and `scale_max={high!r}` are not a range.",
            "give 0 < scale_min <= scale_max.",
        )


def _with_elites(
    position: Tensor, original: Tensor, elites: Tensor, offset: Tensor, half: int
) -> Tensor:
    m = elites.shape[1]
    change = elites - original
    lines = torch.cat([original + step * change for step in ELITE_STEPS], 1)[
        :, : max(0, half - 1 - m) // 2
    ]
    begin = 1 + m + lines.shape[1]
    centres = torch.cat([original, elites], 1)
    turns = torch.arange(max(0, half - begin), device=position.device) % (m + 1)
    around = centres[:, turns] + offset[:, begin : begin + len(turns)]
    return torch.cat([position[:, :1], elites, lines, around, position[:, begin + len(turns) :]], 1)
