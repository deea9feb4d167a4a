"""How the weights of a layer are distributed: what a search takes its first guesses and its speed limits from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._model.layers import ParameterSpace

__all__ = ["WeightStats", "search_dtype"]


@dataclass(frozen=True)
class WeightStats:
    """How the weights of a layer are distributed. Numbers, or tensors that broadcast to `S x K`.

    Attributes:
        mean: their mean.
        std: their standard deviation.
        lowest: the least weight.
        highest: the greatest weight.
    """

    mean: float | Tensor
    std: float | Tensor
    lowest: float | Tensor
    highest: float | Tensor

    @classmethod
    def of(cls, weights: Tensor) -> WeightStats:
        """The spread of one layer's weights, of any shape, in at least float32 and on their device."""
        weights = weights.detach().to(search_dtype(weights.dtype))
        return cls(weights.mean(), weights.std(correction=0), weights.min(), weights.max())

    @classmethod
    def around(cls, space: ParameterSpace, where: Tensor) -> WeightStats:
        """For each weight at the flat positions `where` (`K` int64), the spread of the parameter that it is part of."""
        parameters = [p for site in space.sites for p in site.parameters.values()]
        ends = torch.tensor([p.numel() for p in parameters], device=where.device).cumsum(0)
        which = torch.bucketize(where, ends, right=True).to(space.device)
        spreads = [cls.of(p) for p in parameters]
        mean, std, lowest, highest = (
            torch.stack([torch.as_tensor(getattr(spread, name)) for spread in spreads])[which]
            for name in ("mean", "std", "lowest", "highest")
        )
        return cls(mean, std, lowest, highest)


def search_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of a dtype are searched: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
