"""A bound for each slice of the calibration data: it holds within the slice, however often the slice comes up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.stats.binomial import Bound, check_confidence, show_confidence

__all__ = ["Column", "Name", "SliceBounds", "read_column", "slice_bounds"]

Name = int | str
Column = Tensor | np.ndarray | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class SliceBounds:
    """One bound a slice.

    Attributes:
        bounds: by the slice's name or number, in ascending order.
        confidence: with which all of them hold together if `simultaneous`, else each of them.
        simultaneous: whether they hold together.
    """

    bounds: Mapping[Name, Bound]
    confidence: float
    simultaneous: bool

    @classmethod
    def of(
        cls,
        broken: Mapping[Name, int],
        n: Mapping[Name, int],
        confidence: float = 0.95,
        simultaneous: bool = True,
    ) -> SliceBounds:
        """The bounds for given counts, by slice; see :func:`slice_bounds`.

        Raises:
            ConfigurationError: the two are not about the same slices, or an argument is out of its range.
        """
        if broken.keys() != n.keys():
            raise ConfigurationError(
                f"`broken` has the slices {list(broken)} and `n` has {list(n)}.", "count both of the same slices."
            )
        level = 1 - check_confidence(confidence)
        if simultaneous:
            level /= max(1, sum(size > 0 for size in n.values()))
        return cls({name: Bound.at_level(broken[name], n[name], level) for name in n}, confidence, simultaneous)

    def __getitem__(self, name: Name) -> Bound:
        return self.bounds[name]

    def __str__(self) -> str:
        lines = [f"{name}: {bound}" for name, bound in self.bounds.items()]
        if self.simultaneous:
            lines.append(f"with {show_confidence(self.confidence)} confidence all of this holds together")
        return "\n".join(lines)


def slice_bounds(
    broken: Tensor, passed: Tensor, slices: Column, confidence: float = 0.95, simultaneous: bool = True
) -> SliceBounds:
    """One Clopper-Pearson bound a slice.

    Given which samples were right before and which slice each is of, slices break independently of each other. So a
    bound holds within its slice whatever the mix of slices. To hold together, each of m slices is given the m-th part
    of the level (Bonferroni); slices in which nothing was right before have the limit 1 and need no part.

    Args:
        broken: `N` bool, right before and wrong now.
        passed: `N` bool, right before.
        slices: `N` names or whole numbers, one a sample; must not be made by looking at what broke.
        confidence: in (0, 1).
        simultaneous: whether all bounds are to hold together with this confidence, or each on its own.

    Raises:
        ConfigurationError: the columns do not fit together, a sample is broken that was not right before, or an
            argument is out of its range.

    Example:
        >>> broken, passed = torch.tensor([True, False, False, False]), torch.tensor([True, True, True, False])
        >>> print(slice_bounds(broken, passed, ["dark", "light", "light", "light"])["light"])
        broken 0 of 2 (0.00 %); with 97.5 % confidence at most 84.19 % of such samples
    """
    column = read_column("slices", slices)
    for argument, mask in (("broken", broken), ("passed", passed)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (len(column),):
            found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigurationError(
                f"`{argument}`: {found} for {len(column)} slices.", "give a bool tensor, one value a sample."
            )
    if (wrong := int((broken & ~passed).sum())) > 0:
        raise ConfigurationError(
            f"`broken`: {wrong:,} of its samples are not in `passed`.", "only what was right before can be broken."
        )
    names, which = np.unique(column, return_inverse=True)
    bad, right = (
        dict(zip(names.tolist(), np.bincount(which[mask.cpu().numpy()], minlength=len(names)).tolist(), strict=True))
        for mask in (broken, passed)
    )
    return SliceBounds.of(bad, right, confidence, simultaneous)


def read_column(argument: str, column: Column) -> np.ndarray:
    """A column of names or whole numbers as an array `N`; else a `ConfigurationError`."""
    found = column.detach().cpu().numpy() if isinstance(column, Tensor) else np.asarray(column)
    if found.dtype == object and all(isinstance(name, str) for name in found.flat):
        found = found.astype(str)
    if found.ndim == 1 and (found.dtype.kind in "biuU" or len(found) == 0):
        return found
    raise ConfigurationError(
        f"`{argument}`: {found.dtype} {list(found.shape)} is no column of slices.",
        "give one name or number a sample.",
    )
