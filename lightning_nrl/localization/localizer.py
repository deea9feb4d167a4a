"""The interface of a localizer, its result, the registry, and two baselines: all weights and random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import EmptyLocalizationError, check_whole
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import LayerRef, ParameterSpace


@dataclass(frozen=True)
class Localization:
    """Weights to search (paper, section II.1, step ii).

    `sizes` has the sizes of the sets: `failed` is |B_failed & F_failed|, `passed` is |B_passed & F_passed|, `both` is
    the size of their intersection, `localized` is K and `total` is W.
    """

    weights: Tensor  # K int64, flat positions in the weight space, ascending
    n_g: int  # number of top weights in each of the four sets
    requested: int | None  # requested number of weights (#lw); None if N_g was given
    sizes: dict[str, int]


class Replay(Protocol):
    """Recording of the model on known data, which can be replayed with edited layer outputs."""

    @property
    def space(self) -> ParameterSpace:
        """The layers to repair."""

    def chunks(self, size: int | None = None, keep: Tensor | None = None) -> Iterable[Any]:
        """Yields chunks of at most `size` samples, those marked in `keep`, `N` bool by row of the results."""

    def replay(self, chunk: Any, edit: Callable[[LayerRef, Tensor, Tensor], Tensor], copies: int = 1) -> Tensor:
        """Returns the logits of a chunk with each layer's output replaced by `edit(site, input, output)`."""


@runtime_checkable
class Localizer(Protocol):
    """Chooses the weights to search. Write your own as a frozen dataclass with this call."""

    @property
    def include_bias(self) -> bool:
        """True if biases may be chosen too; the weight space then contains them."""

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Chooses weights from a recording of this rank's data.

        Args:
            recording: the model on the known data of this rank.
            evaluator: supplies the task and the ranks.
            failed: `N` bool by row of the results, the samples to repair (I_neg).
            passed: `N` bool, the samples to keep (I_pos).

        Raises:
            EmptyLocalizationError: no weight qualifies.
        """


LOCALIZERS: Registry[Localizer] = Registry(
    "Localizer", "NeuRecoverLite()", lambda value: isinstance(value, Localizer), group="localizers"
)
"""Localizers by name."""


def make_localization(weights: Tensor, n_g: int, requested: int | None, total: int) -> Localization:
    """Builds a `Localization`; raises an `EmptyLocalizationError` if `weights` is empty."""
    if not len(weights):
        raise EmptyLocalizationError(
            "`localizer` leaves no weight: none has an impact on the failed data.",
            "choose another layer: this one does not affect the predictions of these samples.",
        )
    return Localization(weights.to(torch.int64), n_g, requested, {"localized": len(weights), "total": total})


def check_numbers(**numbers: int | None) -> None:
    """Raises a `ConfigurationError` unless each number is None or a whole number from 1."""
    for name, number in numbers.items():
        if number is not None:
            check_whole(name, number, 1)


def default_n_weights(total: int) -> int:
    """Returns the default number of weights to localise: a tenth of the layer, at least 32, at most 309.

    The limits are from Table II of the paper (32 in EXP-C1, 309 in EXP-A1).

    Example:
        >>> [default_n_weights(total) for total in (224, 640, 589_824)]
        [32, 64, 309]
    """
    return min(max(total // 10, 32), 309)


@LOCALIZERS.register("all")
@dataclass(frozen=True)
class AllWeights:
    """Chooses every weight of the layer, and every bias if `include_bias` is True."""

    include_bias: bool = False

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        total = recording.space.size
        weights = torch.arange(total, device=recording.space.device)
        sizes = {"failed": total, "passed": 0, "both": 0, "localized": total, "total": total}
        return Localization(weights, total, None, sizes)


@LOCALIZERS.register("random")
@dataclass(frozen=True)
class RandomWeights:
    """Draws weights uniformly at random, independently of the data.

    Attributes:
        n_weights: number of weights, at most the layer's; None: `default_n_weights`.
        seed: seed of the draw, from 0 to 2^32 - 1. The repair's seed has no effect.
        include_bias: True to draw biases too.
    """

    n_weights: int | None = None
    seed: int = 0
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)
        check_whole("seed", self.seed, 0, 2**32 - 1)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        # On the CPU, so that every device and every rank draws the same weights.
        total = recording.space.size
        wanted = self.n_weights or default_n_weights(total)
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[:wanted]
        return make_localization(drawn.sort().values.to(recording.space.device), len(drawn), wanted, total)
