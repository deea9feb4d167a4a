"""NeuRecoverLite's localisation: weights with a high impact on failed but not on passed data (paper, section II.1).

The number of localised weights is not monotonic in N_g, so sizes are computed for all N_g at once. A weight enters
`B_failed & F_failed` at the N_g equal to the worse of its two ranks, likewise for the passed data, and is localised for
every N_g between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, check_choice
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.localization.impact import Aggregation, Impact, measure
from lightning_nrl.localization.localizer import LOCALIZERS, Localization, Replay, check_numbers, default_n_weights


@LOCALIZERS.register("neurecover-lite")
@dataclass(frozen=True)
class NeuRecoverLite:
    """Localises weights with a high impact on the failed samples but not on the passed.

    Attributes:
        n_weights: number of weights to localise (#lw); the nearest reachable number is used. None, with `n_g` None too:
            `default_n_weights`.
        n_g: number of top weights in each of the four sets (N_g); replaces `n_weights`.
        aggregation: aggregation of gradients over samples: `mean_gradient`, the absolute value of their mean, or
            `per_sample`, the mean of their absolute values.
        include_bias: True to localise biases too.

    Example:
        >>> NeuRecoverLite(n_weights=32)
        NeuRecoverLite(n_weights=32, n_g=None, aggregation='mean_gradient', include_bias=False)
    """

    n_weights: int | None = None
    n_g: int | None = None
    aggregation: Aggregation = "mean_gradient"
    include_bias: bool = False

    def __post_init__(self) -> None:
        _check(self.n_weights, self.n_g)
        check_choice("aggregation", self.aggregation, get_args(Aggregation))

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        of_failed, of_passed = (
            measure(recording, evaluator, rows, aggregation=self.aggregation) for rows in (failed, passed)
        )
        return localize(of_failed, of_passed, n_weights=self.n_weights, n_g=self.n_g)


def localize(failed: Impact, passed: Impact, *, n_weights: int | None = None, n_g: int | None = None) -> Localization:
    """Computes `(B_failed & F_failed) - (B_passed & F_passed)` (paper, section II.1, step ii).

    Each set has the top N_g weights by one impact; on ties, the first in the weight space. Given `n_weights`, the N_g
    whose result is nearest in size is used, the smallest on a tie, since its weights have the greatest impact.

    Args:
        failed: impacts on the samples to repair (I_neg).
        passed: impacts on the samples to keep (I_pos).
        n_weights: as in `NeuRecoverLite`.
        n_g: as in `NeuRecoverLite`.

    Raises:
        ConfigurationError: a number is below 1, both numbers are given, or N_g exceeds the number of weights.
        EmptyLocalizationError: no weight is left.
    """
    _check(n_weights, n_g)
    total = len(failed.backward)
    if n_g is not None and n_g > total:
        raise ConfigurationError(
            f"`n_g={n_g}` is more than the {total} weights of the layer.", f"choose 1 to {total}, or give `n_weights`."
        )
    enter, leave = _first_n_g(failed), _first_n_g(passed)
    sizes = sizes_at(enter, leave, torch.arange(total + 1, device=enter.device))
    if n_g is None:
        candidates = sizes["localized"] if sizes["localized"].any() else sizes["failed"]
        n_weights = n_weights or default_n_weights(total)
        chosen = nearest(candidates[1:], n_weights) + 1
    else:
        chosen = n_g
    at = {name: int(size[chosen]) for name, size in sizes.items()} | {"total": total}
    if not at["localized"]:
        raise _empty_error(sizes["localized"], chosen, at)
    weights = ((enter <= chosen) & (leave > chosen)).nonzero().squeeze(1)
    return Localization(weights, chosen, n_weights, at)


def set_sizes(failed: Impact, passed: Impact) -> dict[str, Tensor]:
    """Returns the sizes in `Localization.sizes` for every N_g: each a `W + 1` int64 tensor, indexed by N_g."""
    enter, leave = _first_n_g(failed), _first_n_g(passed)
    return sizes_at(enter, leave, torch.arange(len(enter) + 1, device=enter.device))


def sizes_at(enter: Tensor, leave: Tensor, at: Tensor) -> dict[str, Tensor]:
    """Computes `Localization.sizes` at the thresholds `at`, given the thresholds where weights enter and leave."""
    failed, passed, both = (
        torch.searchsorted(x.sort().values, at, right=True) for x in (enter, leave, torch.maximum(enter, leave))
    )
    return {"failed": failed, "passed": passed, "both": both, "localized": failed - both}


def _first_n_g(impact: Impact) -> Tensor:
    return torch.maximum(rank_impacts(impact.backward), rank_impacts(impact.forward))


def rank_impacts(impact: Tensor) -> Tensor:
    """Ranks impacts from 1, the largest first, ties in the order of the weight space."""
    order = impact.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1, device=order.device))


def nearest(sizes: Tensor, size: int) -> int:
    """Returns the first index of the nonzero size nearest to `size`."""
    return int((sizes - size).abs().masked_fill(sizes == 0, 2**62).argmin())


def _empty_error(localized: Tensor, n_g: int, at: dict[str, int]) -> EmptyLocalizationError:
    candidates = localized.nonzero().squeeze(1)
    if len(candidates):
        nearest = int(candidates[(candidates - n_g).abs().argmin()])
        hint = f"the nearest N_g that leaves any is {nearest} (size {int(localized[nearest])}); or give `n_weights`."
    else:
        hint = "no N_g leaves a weight: failed and passed data rank the weights alike; choose another layer or target."
    return EmptyLocalizationError(
        f"`localizer` leaves no weight at N_g = {n_g} of {at['total']}: |B_failed & F_failed| = {at['failed']}, "
        f"|B_passed & F_passed| = {at['passed']}, |intersection of the two| = {at['both']}, |W_localized| = 0.",
        hint,
    )


def _check(n_weights: int | None, n_g: int | None) -> None:
    check_numbers(n_weights=n_weights, n_g=n_g)
    if n_weights is not None and n_g is not None:
        raise ConfigurationError(
            f"`n_weights={n_weights}` and `n_g={n_g}` are both given, and each decides the other.", "give one of them."
        )
