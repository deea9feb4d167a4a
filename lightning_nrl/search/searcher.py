"""The interface of a search algorithm, and the objects that are passed to it.

A candidate is one set of values for the K weights of a search. A searcher holds only settings: its
methods take a state and return the next state. `lightning_nrl.search.loop` records the best
candidate and stops the search.
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import check_whole
from lightning_nrl.evaluation.layers import ParameterSpace


@dataclass(frozen=True)
class WeightStats:
    """Statistics of a layer's weights: floats, or tensors `K` with a value per searched weight."""

    mean: float | Tensor
    std: float | Tensor
    lowest: float | Tensor
    highest: float | Tensor

    @classmethod
    def around(cls, space: ParameterSpace, where: Tensor) -> WeightStats:
        """Computes statistics `K`; value k is of the whole tensor with the weight `where[k]`."""
        parameters = space.parameters.values()
        ends = torch.tensor([p.numel() for p in parameters], device=where.device).cumsum(0)
        number = torch.bucketize(where, ends, right=True).to(space.device)
        moments = zip(*(_moments(p) for p in parameters), strict=True)
        return cls(*(torch.stack(moment)[number] for moment in moments))


def _moments(weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = weights.detach().to(search_dtype(weights.dtype))
    return weights.mean(), weights.std(correction=0), weights.min(), weights.max()


def search_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a search: float64 for float64 weights, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RandomStream:
    """The random numbers of a search, drawn on the CPU so that every device gets the same ones."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """Draws numbers from [0, 1), in the dtype and on the device of `like`."""
        return self._draw(torch.rand, like, shape)

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Draws standard normal numbers, in the dtype and on the device of `like`."""
        return self._draw(torch.randn, like, shape)

    def _draw(self, draw: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
        drawn = draw(shape, generator=self.generator, dtype=like.dtype, device="cpu")
        if like.is_cuda:
            drawn = drawn.pin_memory()  # otherwise the transfer would wait for the device
        return drawn.to(like.device, non_blocking=True)


@dataclass(frozen=True)
class SearchOrigin:
    """Starting point of a search over K weights, in float32 or float64."""

    original: Tensor  # K, the weights before the repair
    stats: WeightStats  # statistics of the layers' weights
    elites: Tensor  # M x K, candidates that are known to be good; M may be 0

    @property
    def first_candidates(self) -> Tensor:
        """The original weights and then the elites, `(1 + M) x K`."""
        return torch.cat([self.original[None], self.elites])

    def tensor(self, statistic: float | Tensor) -> Tensor:
        """Returns one of `stats` as a tensor that broadcasts to candidates `P x K`."""
        return torch.as_tensor(statistic, dtype=self.original.dtype, device=self.original.device)


class SearchState(Protocol):
    """State of a search: a named tuple or frozen dataclass that holds tensors."""

    @property
    def candidates(self) -> Tensor:
        """Candidates to score, `P x K`."""

    @property
    def threshold(self) -> Tensor | None:
        """Fitness, `P`, that each candidate must exceed to change the state.

        Scoring may stop early for a candidate that cannot exceed its threshold. A threshold is
        never above the best fitness so far. None means that every fitness matters.
        """


# LightningCLI builds searchers from YAML. It merges their arguments with those of a default
# searcher unless all base classes are dataclasses, and it does not build subclasses of a generic
# class: hence a dataclass without fields, and `Any` for the `SearchState` of a subclass.
@dataclass(frozen=True)
class Searcher(metaclass=ABCMeta):
    """Base class of search algorithms. A subclass is a frozen dataclass with its settings.

    The methods have no side effects except draws from `random`.

    Attributes:
        label: name of the algorithm in reports.
    """

    label: ClassVar[str] = "swarm"

    @property
    @abstractmethod
    def iterations(self) -> int:
        """Maximum number of steps. With 0 only the first candidates are scored."""

    @property
    @abstractmethod
    def patience(self) -> int:
        """Steps without improvement before the search stops, at least 1."""

    @property
    @abstractmethod
    def n_candidates(self) -> int:
        """Number P of candidates per iteration. It must be above the number of elites."""

    @abstractmethod
    def init(self, origin: SearchOrigin, random: RandomStream) -> Any:
        """Returns the first state. Its candidates begin with exactly `origin.first_candidates`."""

    @abstractmethod
    def ask(self, state: Any, random: RandomStream) -> Any:
        """Returns a state with the next candidates."""

    @abstractmethod
    def tell(self, state: Any, fitness: Tensor) -> Any:
        """Returns the state after its candidates were scored.

        `fitness`, `P`, is larger for better candidates. It is minus infinity for a candidate whose
        loss is not finite, and for all candidates after the search has ended.
        """


SEARCHERS: Registry[Searcher] = Registry(
    "searcher",
    "an object such as ParticleSwarm()",
    lambda value: isinstance(value, Searcher),
    on_demand={
        "differential-evolution": "lightning_nrl.published:DifferentialEvolution",
    },
    group="searchers",
)
"""Search algorithms by name. Each name is also a `method` of a repair."""


def check_counts(searcher: Searcher, size: str, least: int) -> None:
    """Checks `iterations`, `patience` and the population size, an attribute named `size`.

    Raises:
        ConfigurationError: one is no whole number, or below its minimum; `least` is that of `size`.
    """
    name = type(searcher).__name__
    check_whole(f"{name}.{size}", searcher.n_candidates, least)
    check_whole(f"{name}.iterations", searcher.iterations, 0)
    check_whole(f"{name}.patience", searcher.patience, 1)
