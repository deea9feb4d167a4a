"""How the weights of a layer are distributed: what a search takes its first guesses and its speed limits from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._model.layers import ParameterSpace

__all__ = ["WeightStats", "search_dtype"]


@dataclass(frozen=True)
class WeightStats:
    """How the weights of a layer are distributed: numbers, or tensors that broadcast to `S x K`."""

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
        """For each weight at the flat positions `where` (int64), those of the parameter that it is part of."""
        parameters = space.parameters.values()
        ends = torch.tensor([p.numel() for p in parameters], device=where.device).cumsum(0)
        which = torch.bucketize(where, ends, right=True).to(space.device)
        moments = zip(*(_moments(p) for p in parameters), strict=True)
        return cls(*(torch.stack(of_each)[which] for of_each in moments))


def _moments(weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, standard deviation, least and greatest."""
    weights = weights.detach().to(search_dtype(weights.dtype))
    return weights.mean(), weights.std(correction=0), weights.min(), weights.max()


def search_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of a dtype are searched: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
