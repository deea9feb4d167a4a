"""Which weights are to be searched: the arrow from localisation to search."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Impact", "Localization"]


@dataclass(frozen=True)
class Impact:
    """How much each weight matters for some data (paper, section II.1, step i).

    Attributes:
        backward: `W`, the loss gradient's size for each weight, never negative.
        forward: `W`, the size of what each weight passes on, never negative.
        n_samples: how many samples it was measured on.
    """

    backward: Tensor
    forward: Tensor
    n_samples: int


@dataclass(frozen=True)
class Localization:
    """The weights to be searched (paper, section II.1, step ii).

    Attributes:
        weights: `K` int64, flat positions in the weight space, ascending.
        n_g: how many top weights each of the four sets had.
        requested: the #lw that was asked for; None if N_g was given.
        sizes: sizes of the sets on the way: `failed` = |B_failed & F_failed|, `passed` = |B_passed & F_passed|,
            `both` = size of their intersection, `localized` = K, `total` = W.
    """

    weights: Tensor
    n_g: int
    requested: int | None
    sizes: dict[str, int]
