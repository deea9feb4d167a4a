"""Initial candidates, near the original weights or drawn from the distribution of weights."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, check_choice
from lightning_nrl.search.searcher import RandomStream, SearchOrigin

# Initial distributions, which `ParticleSwarm` explains.
Start = Literal["local", "half", "paper", "normal"]


def first_positions(
    origin: SearchOrigin,
    random: RandomStream,
    n: int,
    start: Start,
    scale_min: float,
    scale_max: float,
) -> Tensor:
    """Returns `n` candidates, `n x K`. `ParticleSwarm` explains the last three arguments.

    Candidate 0 is the original weights. With M elites, candidates 1 to M are the elites.
    """
    original = origin.original
    mean, std = origin.tensor(origin.stats.mean), origin.tensor(origin.stats.std)
    n_near = {"local": n, "normal": 1}.get(start, (n + 1) // 2)
    n_unmoved = n_near if start == "paper" else 1
    scale = original.new_ones(n, 1)
    scale[n_unmoved:n_near, 0] = torch.logspace(
        math.log10(scale_min),
        math.log10(scale_max),
        n_near - n_unmoved,
        dtype=original.dtype,
        device=original.device,
    )
    offset = scale * std * random.normal(original, n, len(original))
    candidate = torch.arange(n, device=original.device)[:, None]
    centre = torch.where(candidate < n_near, original, mean)
    position = torch.where(candidate >= n_unmoved, centre + offset, original)
    first = origin.first_candidates
    return torch.cat([first, position[len(first) :]])


def check_start(searcher: str, start: Start, scale_min: float, scale_max: float) -> None:
    """Raises a `ConfigurationError` for a wrong value. `searcher` is the name for the message."""
    check_choice(f"{searcher}.start", start, get_args(Start))
    are_numbers = isinstance(scale_min, Real) and isinstance(scale_max, Real)
    if not are_numbers or not 0 < scale_min <= scale_max < math.inf:
        raise ConfigurationError(
            f"`{searcher}.scale_min={scale_min!r}` and `scale_max={scale_max!r}` are not a range.",
            "give 0 < scale_min <= scale_max.",
        )
