"""The interface of a search algorithm, and the objects that are passed to it.

A candidate is one set of values for the K weights of a search. A searcher holds only settings: its
methods take a state and return the next state. `lightning_nrl.search.loop` records the best
candidate and stops the search.
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
    """Statistics of a layer's weights: floats, or tensors that broadcast to `S x K` (searches x
    weights).
    """

    mean: float | Tensor
    std: float | Tensor
    lowest: float | Tensor
    highest: float | Tensor

    @classmethod
    def of(cls, weights: Tensor) -> WeightStats:
        """Computes the statistics of one layer's weights, in float32 or float64. The tensor may
        have any shape.
        """
        return cls(*_moments(weights))

    @classmethod
    def around(cls, space: ParameterSpace, where: Tensor) -> WeightStats:
        """Computes statistics of whole tensors, `K` values each. Value k is of the tensor with
        weight `where[k]`.
        """
        parameters = space.parameters.values()
        ends = torch.tensor([p.numel() for p in parameters], device=where.device).cumsum(0)
        which = torch.bucketize(where, ends, right=True).to(space.device)
        moments = zip(*(_moments(p) for p in parameters), strict=True)
        return cls(*(torch.stack(of_each)[which] for of_each in moments))


def _moments(weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = weights.detach().to(search_dtype(weights.dtype))
    return weights.mean(), weights.std(correction=0), weights.min(), weights.max()


def search_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which weights are searched: float64 for float64 weights, float32 for all
    others.
    """
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@dataclass(frozen=True)
class RandomStreams:
    """One random generator per search. Batches of searches and padding do not change the numbers of
    a search.
    """

    generators: tuple[
        torch.Generator, ...
    ]  # one per search, on the CPU so that every device gets the same numbers
    sizes: tuple[int, ...] | None = (
        None  # number of weights of each search, without padding; None: every search has K
    )

    @classmethod
    def seeded(cls, seeds: Sequence[int], sizes: Sequence[int] | None = None) -> RandomStreams:
        own = None if sizes is None else tuple(sizes)
        return cls(tuple(torch.Generator("cpu").manual_seed(seed) for seed in seeds), own)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """Draws numbers from [0, 1) in the dtype of `like`. For S searches `shape` (2, P, K) gives
        `2 x S x P x K`.
        """
        return self._draw(torch.rand, like, shape)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Draws standard normal numbers. `like` and `shape` have the same meaning as in `uniform`."""
        return self._draw(torch.randn, like, shape)

    def seeds(self) -> list[int]:
        """Draws a seed below 2^31 for each search."""
        return [
            int(torch.randint(2**31, (1,), generator=own, device="cpu")) for own in self.generators
        ]

    def _draw(self, sample: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
        *lead, n_particles, n_weights = shape
        options: dict[str, Any] = {"dtype": like.dtype, "device": "cpu"}
        if self.sizes is None or n_weights == 1:
            own = [sample(*shape, generator=generator, **options) for generator in self.generators]
            drawn = own[0].unsqueeze(-3) if len(own) == 1 else torch.stack(own, -3)
        else:
            drawn = torch.zeros(*lead, len(self.generators), n_particles, n_weights, **options)
            for s, (generator, size) in enumerate(zip(self.generators, self.sizes, strict=True)):
                drawn[..., s, :, :size] = sample(
                    *lead, n_particles, size, generator=generator, **options
                )
        # One transfer for all searches, asynchronous from page-locked memory.
        drawn = drawn.pin_memory() if like.is_cuda else drawn
        return drawn.to(like.device, non_blocking=True)


@dataclass(frozen=True)
class SearchOrigin:
    """Starting point of S searches over K weights each, in float32 or float64."""

    original: Tensor  # S x K, the weights before the repair; padding may have any finite values
    stats: WeightStats  # statistics of the layer's weights
    elites: Tensor | None = (
        None  # S x M x K, M candidates per search that are known to be good; None: no elites
    )
    searched: Tensor | None = (
        None  # S x 1 x K bool, False at padding, which must not change; None: no padding
    )

    @property
    def first_candidates(self) -> Tensor:
        """The original weights and then the elites, `S x (1 + M) x K`. Padding has the values of
        `original`.
        """
        original = self.original[:, None]
        if self.elites is None:
            return original
        elites = (
            self.elites if self.searched is None else self.elites.where(self.searched, original)
        )
        return torch.cat([original, elites], 1)


class SearchState(Protocol):
    """State of S searches with P candidates of K weights: a named tuple or frozen dataclass that
    holds tensors.
    """

    @property
    def candidates(self) -> Tensor:
        """Candidates to score, `S x P x K`."""

    @property
    def threshold(self) -> Tensor | None:
        """Fitness, `S x P`, that each candidate must exceed to change the state.

        Scoring may stop early for a candidate that cannot exceed its threshold. A threshold is
        never above the best fitness of its search so far. None means that every fitness matters.
        """


State = TypeVar("State", bound=SearchState)


@runtime_checkable
class Searcher(Protocol[State]):
    """Search algorithm with its settings, such as `ParticleSwarm`.

    The methods have no side effects except draws from `streams`. Each search draws only from its
    own stream, so that it gives the same result alone and in a batch. An optional attribute `label`
    names the algorithm in reports.
    """

    @property
    def n_candidates(self) -> int:
        """Number P of candidates per iteration. It must be above the number of elites."""

    @property
    def iterations(self) -> int:
        """Maximum number of steps. With 0 only the first candidates are scored."""

    @property
    def patience(self) -> int:
        """Steps without improvement before the search stops, at least 1."""

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> State:
        """Returns the first state. Its candidates must begin with exactly
        `origin.first_candidates`.
        """

    def ask(self, state: State, streams: RandomStreams) -> State:
        """Returns a state with the next candidates."""

    def tell(self, state: State, fitness: Tensor) -> State:
        """Returns the state after its candidates were scored. `fitness`, `S x P`, is larger for
        better
        candidates.

        A candidate has the fitness minus infinity if its loss is not finite or if its search has
        already ended.
        """


SEARCHERS: Registry[Searcher[Any]] = Registry(
    "searcher",
    "an object such as ParticleSwarm()",
    lambda value: isinstance(value, Searcher),
    on_demand={
        "differential-evolution": "lightning_nrl.published:DifferentialEvolution",
        "cma-es": "lightning_nrl.published:CmaEs",
    },
    group="searchers",
)
"""Search algorithms by name. Each name is also a `method` of a repair."""


def check_numbers(how: Any, **least: int) -> None:
    """Raises a `ConfigurationError` unless each checked attribute of a searcher is a whole number
    >=
    its minimum.

    The minimum of `iterations` is 0, and the minimum of `patience` is 1. `least` maps other names
    to minimums.
    """
    for name, lowest in (least | {"iterations": 0, "patience": 1}).items():
        check_whole(f"{type(how).__name__}.{name}", getattr(how, name), lowest)
