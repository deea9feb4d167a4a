"""A search algorithm: frozen settings and three functions from state to state; and its inputs.

The loop (`lightning_nrl.search.loop`) owns the rest: history, patience, time, early giving up, the best candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import check_whole
from lightning_nrl.evaluation.layers import ParameterSpace


@dataclass(frozen=True)
class WeightStats:
    """Statistics of a layer's weights: numbers, or tensors that broadcast to `S x K`."""

    mean: float | Tensor
    std: float | Tensor
    lowest: float | Tensor
    highest: float | Tensor

    @classmethod
    def of(cls, weights: Tensor) -> WeightStats:
        """Of one layer's weights, of any shape, in at least float32 and on their device."""
        return cls(*_moments(weights))

    @classmethod
    def around(cls, space: ParameterSpace, where: Tensor) -> WeightStats:
        """Of each weight at the flat positions `where` (int64), those of the parameter that it is part of."""
        parameters = space.parameters.values()
        ends = torch.tensor([p.numel() for p in parameters], device=where.device).cumsum(0)
        which = torch.bucketize(where, ends, right=True).to(space.device)
        moments = zip(*(_moments(p) for p in parameters), strict=True)
        return cls(*(torch.stack(of_each)[which] for of_each in moments))


def _moments(weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = weights.detach().to(search_dtype(weights.dtype))
    return weights.mean(), weights.std(correction=0), weights.min(), weights.max()


def search_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which weights of a dtype are searched: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@dataclass(frozen=True)
class RandomStreams:
    """One stream of random numbers a swarm. A swarm draws the same numbers alone, among others, and under padding."""

    generators: tuple[torch.Generator, ...]  # one a swarm, on the CPU, so that all devices get the same numbers
    sizes: tuple[int, ...] | None = None  # how many of its K weights each swarm has, the rest is padding; None: K

    @classmethod
    def seeded(cls, seeds: Sequence[int], sizes: Sequence[int] | None = None) -> RandomStreams:
        own = None if sizes is None else tuple(sizes)
        return cls(tuple(torch.Generator("cpu").manual_seed(seed) for seed in seeds), own)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """Draws from [0, 1) in the dtype of `like`: `shape`, with the swarms before its last two dimensions."""
        return self._draw(torch.rand, like, shape)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Draws standard normal numbers, shaped likewise."""
        return self._draw(torch.randn, like, shape)

    def seeds(self) -> list[int]:
        """Draws a whole number below 2^31 a swarm, to seed something else with."""
        return [int(torch.randint(2**31, (1,), generator=own, device="cpu")) for own in self.generators]

    def _draw(self, sample: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
        *lead, n_particles, n_weights = shape
        options: dict[str, Any] = {"dtype": like.dtype, "device": "cpu"}
        if self.sizes is None or n_weights == 1:
            own = [sample(*shape, generator=generator, **options) for generator in self.generators]
            drawn = own[0].unsqueeze(-3) if len(own) == 1 else torch.stack(own, -3)
        else:
            drawn = torch.zeros(*lead, len(self.generators), n_particles, n_weights, **options)
            for s, (generator, size) in enumerate(zip(self.generators, self.sizes, strict=True)):
                drawn[..., s, :, :size] = sample(*lead, n_particles, size, generator=generator, **options)
        # One transfer for all swarms; a GPU takes page-locked memory without a wait.
        drawn = drawn.pin_memory() if like.is_cuda else drawn
        return drawn.to(like.device, non_blocking=True)


@dataclass(frozen=True)
class SearchOrigin:
    """Start of S searches, in the dtype in which they search: float32 or float64."""

    original: Tensor  # S x K, the weights before the repair, padded with finite values
    stats: WeightStats  # the distribution of the layer's weights; its tensors broadcast to S x K
    elites: Tensor | None = None  # S x M x K, known good weights, padded likewise; None: there are none
    searched: Tensor | None = None  # S x 1 x K bool, False at padding, which must never move; None: there is no padding

    @property
    def first_candidates(self) -> Tensor:
        """`S x (1 + M) x K`: the original weights, then the elites, padding as in the original."""
        original = self.original[:, None]
        if self.elites is None:
            return original
        elites = self.elites if self.searched is None else self.elites.where(self.searched, original)
        return torch.cat([original, elites], 1)


class SearchState(Protocol):
    """A search in mid-flight: a named tuple or a frozen dataclass of tensors, of S searches with P candidates each."""

    @property
    def candidates(self) -> Tensor:
        """`S x P x K`, to be scored."""

    @property
    def threshold(self) -> Tensor | None:
        """`S x P`: what a candidate's fitness has to exceed to matter, so that scoring it can be given up early.

        Never above the best fitness so far. None: every candidate's fitness matters, however low.
        """


State = TypeVar("State", bound=SearchState)


@runtime_checkable
class Searcher(Protocol[State]):
    """A search algorithm with its settings, such as `ParticleSwarm`.

    Its functions are pure but for the numbers that they draw from `streams`, one stream a search: a search among many
    has to do what it does alone. It may have a `label`, its name in the steps of a report.
    """

    @property
    def n_candidates(self) -> int:
        """P, how many candidates are scored in each iteration; there may be fewer elites than that."""

    @property
    def iterations(self) -> int:
        """Steps at most; with 0 only the first candidates are scored."""

    @property
    def patience(self) -> int:
        """Steps without a better fitness after which the search stops, at least 1."""

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> State:
        """Returns the first candidates; they begin with `origin.first_candidates`, bit for bit."""

    def ask(self, state: State, streams: RandomStreams) -> State:
        """The next candidates."""

    def tell(self, state: State, fitness: Tensor) -> State:
        """Learns from the fitness of the state's candidates: `S x P`, larger is better, minus infinity for the worst.

        Once a search is over, all of its candidates are worth minus infinity.
        """


SEARCHERS: Registry[Searcher[Any]] = Registry(
    "searcher", "an object such as ParticleSwarm()", lambda value: isinstance(value, Searcher), group="searchers"
)
"""Search algorithms by name; each is a `method` of a repair, too."""


def check_numbers(how: Any, **least: int) -> None:
    """Checks whole numbers of a searcher, each with its least value, `iterations` and `patience` among them."""
    for name, lowest in (least | {"iterations": 0, "patience": 1}).items():
        check_whole(f"{type(how).__name__}.{name}", getattr(how, name), lowest)
