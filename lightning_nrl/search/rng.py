"""Random numbers for many searches, each from a seed of its own, and the same on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomStreams:
    """One stream of random numbers a swarm. A swarm draws the same numbers alone, among others, and under padding."""

    generators: tuple[torch.Generator, ...]  # one a swarm, on the CPU, so that all devices get the same numbers
    sizes: tuple[int, ...] | None = None  # how many of its K weights each swarm has, the rest is padding; None: K

    @classmethod
    def seeded(cls, seeds: Sequence[int], sizes: Sequence[int] | None = None) -> RandomStreams:
        """Fresh streams, each from its own seed."""
        own = None if sizes is None else tuple(sizes)
        return cls(tuple(torch.Generator().manual_seed(seed) for seed in seeds), own)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """Numbers in [0, 1) of the dtype of `like`: `shape`, with the swarms before its last two dimensions."""
        return self._draw(torch.rand, like, shape)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Standard normal numbers, shaped likewise."""
        return self._draw(torch.randn, like, shape)

    def seeds(self) -> list[int]:
        """A whole number below 2^31 a swarm, to seed something else with."""
        return [int(torch.randint(2**31, (1,), generator=own)) for own in self.generators]

    def state(self) -> list[Tensor]:
        """What `restore` goes on from, on the CPU."""
        return [generator.get_state() for generator in self.generators]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Goes on where streams of the same seeds were when they gave this `state`."""
        for generator, own in zip(self.generators, state, strict=True):
            generator.set_state(own)

    def _draw(self, sample: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
        *lead, n_particles, n_weights = shape
        if self.sizes is None or n_weights == 1:
            own = [sample(*shape, generator=generator, dtype=like.dtype) for generator in self.generators]
            drawn = own[0].unsqueeze(-3) if len(own) == 1 else torch.stack(own, -3)
        else:
            drawn = torch.zeros(*lead, len(self.generators), n_particles, n_weights, dtype=like.dtype)
            for s, (generator, size) in enumerate(zip(self.generators, self.sizes, strict=True)):
                drawn[..., s, :, :size] = sample(*lead, n_particles, size, generator=generator, dtype=like.dtype)
        # One transfer for all swarms; a GPU takes page-locked memory without a wait.
        drawn = drawn.pin_memory() if like.is_cuda else drawn
        return drawn.to(like.device, non_blocking=True)
