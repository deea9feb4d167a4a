"""Random numbers for many swarms, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomStreams"]


@dataclass(frozen=True)
class RandomStreams:
    """One stream of random numbers a swarm. A swarm draws the same numbers alone, among others, and under padding."""

    generators: tuple[torch.Generator, ...]  # one a swarm, on the device of the swarm
    sizes: tuple[int, ...] | None = None  # how many of its K weights each swarm has, the rest is padding; None: K

    @classmethod
    def seeded(cls, seeds: Sequence[int], device: torch.device, sizes: Sequence[int] | None = None) -> RandomStreams:
        """Fresh streams, each from its own seed."""
        generators = tuple(torch.Generator(device).manual_seed(seed) for seed in seeds)
        return cls(generators, None if sizes is None else tuple(sizes))

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """Numbers in [0, 1) of the dtype of `like`: `shape`, with the swarms before its last two dimensions."""
        return self._draw(torch.rand, like, shape)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Standard normal numbers, shaped likewise."""
        return self._draw(torch.randn, like, shape)

    def _draw(self, sample: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
        *lead, n_particles, n_weights = shape
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        if self.sizes is None or n_weights == 1:
            drawn = [sample(*shape, generator=generator, **options) for generator in self.generators]
            return drawn[0].unsqueeze(-3) if len(drawn) == 1 else torch.stack(drawn, -3)
        padded = torch.zeros(*lead, len(self.generators), n_particles, n_weights, **options)
        for s, (generator, size) in enumerate(zip(self.generators, self.sizes, strict=True)):
            padded[..., s, :, :size] = sample(*lead, n_particles, size, generator=generator, **options)
        return padded
