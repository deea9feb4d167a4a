"""Random numbers for many swarms, each from a seed of its own.

On a CPU each swarm has a generator. On other devices, where launches are what costs, numbers are counted out for all
swarms at once: the `i`-th is a mix of its swarm's key and `i` (SplitMix64, Steele, Lea & Flood 2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CountedNumbers", "RandomStreams"]

GAMMA = 0x9E3779B97F4A7C15
"""The step from one number to the next before they are mixed: 2^64 over the golden ratio, made odd."""
FIRST_FACTOR, SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ROWS_A_DRAW = 1 << 32
"""How many rows of numbers a swarm can take in one draw."""


@dataclass
class CountedNumbers:
    """Numbers that depend on a swarm's key, on which draw it is, and on their place in it, and on nothing else."""

    keys: Tensor  # S int64, on the device of the swarms
    sizes: Tensor | None = None  # S x 1 x 1 int64, how many weights each swarm has; None: none is padding
    draws: int = 0  # how many were made

    @classmethod
    def seeded(cls, seeds: Sequence[int], device: torch.device, sizes: Sequence[int] | None = None) -> CountedNumbers:
        """From the beginning, each from its own seed."""
        keys = [_signed(_mixed_int(_mixed_int(seed) + GAMMA)) for seed in seeds]
        own = None if sizes is None else torch.tensor(sizes, device=device).view(-1, 1, 1)
        return cls(torch.tensor(keys, device=device), own)

    def bits(self, *shape: int) -> Tensor:
        """64 random bits as int64: `shape`, with the swarms before its last two dimensions."""
        *lead, n_particles, n_weights = shape
        rows, device = math.prod(lead) * n_particles, self.keys.device
        row = torch.arange(self.draws * ROWS_A_DRAW + 1, self.draws * ROWS_A_DRAW + rows + 1, device=device)
        keys = _mixed(self.keys[:, None] + row * _signed(GAMMA))
        keys = keys.view(len(self.keys), *lead, n_particles, 1).movedim(0, -3)
        self.draws += 1
        return _mixed(keys + torch.arange(1, n_weights + 1, device=device) * _signed(GAMMA))

    def uniform(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Numbers in [0, 1), as many bits of each as the type keeps."""
        kept = 53 if dtype == torch.float64 else 24
        return self._without_padding(_shifted(self.bits(*shape), 64 - kept).to(dtype).mul_(2.0**-kept))

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers, each of two times 32 bits (Box & Muller 1958); none is above 6.8."""
        bits = self.bits(*shape)
        radius = _shifted(bits, 32).to(dtype).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).clamp_min_(0.0).sqrt_()
        angle = (bits & 0xFFFFFFFF).to(dtype).mul_(2 * math.pi * 2.0**-32)
        return self._without_padding(radius.mul_(angle.cos_()))

    def _without_padding(self, drawn: Tensor) -> Tensor:
        """The same with 0 where a swarm has no weights."""
        if self.sizes is None or drawn.shape[-1] == 1:
            return drawn
        return drawn.masked_fill_(torch.arange(drawn.shape[-1], device=drawn.device) >= self.sizes, 0.0)


@dataclass(frozen=True)
class RandomStreams:
    """One stream of random numbers a swarm. A swarm draws the same numbers alone, among others, and under padding."""

    source: tuple[torch.Generator, ...] | CountedNumbers  # a generator a swarm, or numbers of all, on their device
    sizes: tuple[int, ...] | None = None  # how many of its K weights each swarm has, the rest is padding; None: K

    @classmethod
    def seeded(cls, seeds: Sequence[int], device: torch.device, sizes: Sequence[int] | None = None) -> RandomStreams:
        """Fresh streams, each from its own seed."""
        if device.type != "cpu":
            return cls.counted(seeds, device, sizes)
        own = None if sizes is None else tuple(sizes)
        return cls(tuple(torch.Generator(device).manual_seed(seed) for seed in seeds), own)

    @classmethod
    def counted(cls, seeds: Sequence[int], device: torch.device, sizes: Sequence[int] | None = None) -> RandomStreams:
        """The same of counted numbers, which are equal on all devices."""
        own = None if sizes is None else tuple(sizes)
        return cls(CountedNumbers.seeded(seeds, device, own), own)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """Numbers in [0, 1) of the dtype of `like`: `shape`, with the swarms before its last two dimensions."""
        if isinstance(self.source, CountedNumbers):
            return self.source.uniform(*shape, dtype=like.dtype)
        return self._draw(self.source, torch.rand, like, shape)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Standard normal numbers, shaped likewise."""
        if isinstance(self.source, CountedNumbers):
            return self.source.normal(*shape, dtype=like.dtype)
        return self._draw(self.source, torch.randn, like, shape)

    def seeds(self) -> list[int]:
        """A whole number below 2^31 a swarm, to seed something else with; the host waits for it."""
        if isinstance(self.source, CountedNumbers):
            return [int(number) for number in _shifted(self.source.bits(1, 1), 33).flatten().tolist()]
        return [int(torch.randint(2**31, (1,), generator=own, device=own.device)) for own in self.source]

    def _draw(
        self, generators: Sequence[torch.Generator], sample: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        *lead, n_particles, n_weights = shape
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        if self.sizes is None or n_weights == 1:
            drawn = [sample(*shape, generator=generator, **options) for generator in generators]
            return drawn[0].unsqueeze(-3) if len(drawn) == 1 else torch.stack(drawn, -3)
        padded = torch.zeros(*lead, len(generators), n_particles, n_weights, **options)
        for s, (generator, size) in enumerate(zip(generators, self.sizes, strict=True)):
            padded[..., s, :, :size] = sample(*lead, n_particles, size, generator=generator, **options)
        return padded


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's mix of each number, int64 for 64 unsigned bits."""
    z = (z ^ _shifted(z, 30)).mul_(_signed(FIRST_FACTOR))
    z = (z ^ _shifted(z, 27)).mul_(_signed(SECOND_FACTOR))
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shifted right with zeros moving in, which int64 has no operation for."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mixed_int(z: int) -> int:
    """`_mixed` of one number, unsigned."""
    mask = (1 << 64) - 1
    z &= mask
    z = ((z ^ (z >> 30)) * FIRST_FACTOR) & mask
    z = ((z ^ (z >> 27)) * SECOND_FACTOR) & mask
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    """The same 64 bits as a number that int64 has."""
    return z - (1 << 64) if z >= 1 << 63 else z
