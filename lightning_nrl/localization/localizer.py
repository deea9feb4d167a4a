"""The protocol of a localizer, its result, the registry, and the two simplest: all weights, random weights."""

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
    """The weights to be searched (paper, section II.1, step ii).

    `sizes` are those of the sets on the way: `failed` = |B_failed & F_failed|, `passed` = |B_passed & F_passed|, `both`
    = size of their intersection, `localized` = K, `total` = W.
    """

    weights: Tensor  # K int64, flat positions in the weight space, ascending
    n_g: int  # how many top weights each of the four sets had
    requested: int | None  # the #lw that was asked for; None if N_g was given
    sizes: dict[str, int]


class Replay(Protocol):
    """A recording: known data in chunks, and the model run on them with layers' outputs replaced."""

    @property
    def space(self) -> ParameterSpace:
        """The layers to be repaired."""

    def chunks(self, size: int | None = None, keep: Tensor | None = None) -> Iterable[Any]:
        """Yields samples that `keep` marks by row of the results, at most `size` at once: `rows` and `target`."""

    def replay(self, chunk: Any, edit: Callable[[LayerRef, Tensor, Tensor], Tensor], copies: int = 1) -> Tensor:
        """Returns the logits of a chunk when `edit(site, input, output)` replaces the output of each layer."""


@runtime_checkable
class Localizer(Protocol):
    """Chooses the weights to be searched. One of your own is a frozen dataclass with this call."""

    @property
    def include_bias(self) -> bool:
        """True if biases may be chosen too: the weight space is made accordingly."""

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Localises from a recording of this rank's data, or raises an `EmptyLocalizationError`.

        `evaluator` has the task and the ranks; `failed` and `passed` are `N` bool by row of the results, the samples to
        be repaired (I_neg) and to be kept (I_pos).
        """


LOCALIZERS: Registry[Localizer] = Registry(
    "Localizer", "NeuRecoverLite()", lambda value: isinstance(value, Localizer), group="localizers"
)
"""The ways of localising that can be named."""


def localized(weights: Tensor, n_g: int, requested: int | None, total: int) -> Localization:
    """Makes a localisation by some order of the weights; an `EmptyLocalizationError` if there are none."""
    if not len(weights):
        raise EmptyLocalizationError(
            "`localizer` leaves no weight: none has an impact on the failed data.",
            "choose another layer: this one has no influence on what these samples are taken for.",
        )
    return Localization(weights.to(torch.int64), n_g, requested, {"localized": len(weights), "total": total})


def check_numbers(**numbers: int | None) -> None:
    """Refuses numbers that are given and are not whole or below 1."""
    for name, number in numbers.items():
        if number is not None:
            check_whole(name, number, 1)


def default_n_weights(total: int) -> int:
    """Returns how many weights to localise when nobody says: a tenth of the layer, at least 32, at most 309.

    The limits are those of the three runs that the paper puts forward (Table II: 32 in EXP-C1, 309 in EXP-A1).

    Example:
        >>> [default_n_weights(total) for total in (224, 640, 589_824)]
        [32, 64, 309]
    """
    return min(max(total // 10, 32), 309)


@LOCALIZERS.register("all")
@dataclass(frozen=True)
class AllWeights:
    """Takes every weight of the layer, whatever the data; biases too if `include_bias` says so."""

    include_bias: bool = False

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        total = recording.space.size
        weights = torch.arange(total, device=recording.space.device)
        sizes = {"failed": total, "passed": 0, "both": 0, "localized": total, "total": total}
        return Localization(weights, total, None, sizes)


@LOCALIZERS.register("random")
@dataclass(frozen=True)
class RandomWeights:
    """Draws weights without looking at the data, each with the same probability.

    Attributes:
        n_weights: how many; None: as many as `default_n_weights` says. All, if the layer has no more.
        seed: of the draw, from 0 to 2^32 - 1. That of the repair does not matter: several repairs search the same
            weights.
        include_bias: whether biases may be drawn too.
    """

    n_weights: int | None = None
    seed: int = 0
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)
        check_whole("seed", self.seed, 0, 2**32 - 1)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Draws on the CPU, so that every device and every rank has the same weights."""
        total = recording.space.size
        wanted = self.n_weights or default_n_weights(total)
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[:wanted]
        return localized(drawn.sort().values.to(recording.space.device), len(drawn), wanted, total)
