"""NeuRecoverLite's localisation (paper, section II.1).

It chooses weights with a high impact on failed but not on passed data. With increasing N_g (see
`localize`) a weight enters `B_failed & F_failed` once N_g reaches the worse of its ranks by
backward and by forward impact. From then on the weight is localised, until it enters `B_passed &
F_passed` likewise. So the number of localised weights may rise and fall with N_g, and is computed
for all N_g at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, check_choice
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization.impact import Aggregation, Impact, measure
from lightning_nrl.localization.localizer import (
    LOCALIZERS,
    Localization,
    Localizer,
    Replay,
    check_numbers,
    default_n_weights,
)


@LOCALIZERS.register("neurecover-lite")
@dataclass(frozen=True)
class NeuRecoverLite(Localizer):
    """Localises weights with a high impact on the failed, but not on the passed samples.

    `localize` defines the weights.

    Attributes:
        n_weights: number of weights to localise (#lw), or the nearest reachable number; by default
            `default_n_weights`.
        n_g: number of weights (N_g) in each of the four sets of `localize`; replaces `n_weights`.
        aggregation: definition of the backward impact. `mean_gradient` is the absolute value of the
            samples' mean gradient, `per_sample` is the mean of the absolute values of their
            gradients.
        include_bias: True to localise biases too.
    """

    n_weights: int | None = None
    n_g: int | None = None
    aggregation: Aggregation = "mean_gradient"
    include_bias: bool = False

    def __post_init__(self) -> None:
        _check(self.n_weights, self.n_g)
        check_choice("aggregation", self.aggregation, get_args(Aggregation))

    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        return localize(
            measure(recording, evaluator, failed, aggregation=self.aggregation),
            measure(recording, evaluator, passed, aggregation=self.aggregation),
            n_weights=self.n_weights,
            n_g=self.n_g,
        )


def localize(
    failed: Impact, passed: Impact, *, n_weights: int | None = None, n_g: int | None = None
) -> Localization:
    """Computes `(B_failed & F_failed) - (B_passed & F_passed)` (paper, section II.1, step ii).

    B_failed has the N_g weights with the largest backward impact on the failed samples, F_failed
    has the N_g weights with the largest forward impact. B_passed and F_passed are the same sets for
    the passed samples. Of weights with equal impacts, the first are taken. If `n_g` is None, the
    N_g is used for which the number of localised weights is nearest to `n_weights`. On a tie the
    smallest N_g is used.

    Args:
        failed: impacts on the samples to repair (I_neg).
        passed: impacts on the samples to keep (I_pos).
        n_weights: as in `NeuRecoverLite`.
        n_g: as in `NeuRecoverLite`.

    Raises:
        ConfigurationError: a number is below 1, both numbers are given, or N_g exceeds the number
            of weights.
        EmptyLocalizationError: no weight is left.
    """
    _check(n_weights, n_g)
    total = len(failed.backward)
    if n_g is not None and n_g > total:
        raise ConfigurationError(
            f"`n_g={n_g}` is more than the {total} weights of the layer.",
            f"choose 1 to {total}, or give `n_weights`.",
        )
    enter = _first_n_g(failed)
    leave = _first_n_g(passed)
    sizes = sizes_at(enter, leave, torch.arange(total + 1, device=enter.device))
    if n_g is None:
        n_weights = n_weights or default_n_weights(total)
        # If no N_g leaves a weight, the error is about a set of that size.
        candidates = sizes["localized"] if sizes["localized"].any() else sizes["failed"]
        n_g = nearest(candidates[1:], n_weights) + 1
    at = {name: int(size[n_g]) for name, size in sizes.items()} | {"total": total}
    if not at["localized"]:
        raise _empty_error(sizes["localized"], n_g, at)
    weights = ((enter <= n_g) & (leave > n_g)).nonzero().squeeze(1)
    return Localization(weights, n_g, n_weights, at)


def sizes_at(enter: Tensor, leave: Tensor, at: Tensor) -> dict[str, Tensor]:
    """Returns `Localization.sizes` for each t in `at`.

    `failed` counts `enter <= t`, `passed` counts `leave <= t`.
    """
    failed = _count_up_to(enter, at)
    passed = _count_up_to(leave, at)
    shared = _count_up_to(torch.maximum(enter, leave), at)
    return {"failed": failed, "passed": passed, "both": shared, "localized": failed - shared}


def _count_up_to(values: Tensor, limits: Tensor) -> Tensor:
    return torch.searchsorted(values.sort().values, limits, right=True)


def _first_n_g(impact: Impact) -> Tensor:
    return torch.maximum(rank_impacts(impact.backward), rank_impacts(impact.forward))


def rank_impacts(impact: Tensor) -> Tensor:
    """Returns the rank of each impact, 1 for the largest. Equal impacts keep their order."""
    return impact.argsort(descending=True, stable=True).argsort() + 1


def nearest(sizes: Tensor, size: int) -> int:
    """Returns the first index of the nonzero entry of `sizes` that is nearest to `size`."""
    return int((sizes - size).abs().masked_fill(sizes == 0, 2**62).argmin())


def _empty_error(localized: Tensor, n_g: int, at: dict[str, int]) -> EmptyLocalizationError:
    candidates = localized.nonzero().squeeze(1)
    if len(candidates):
        best = int(candidates[(candidates - n_g).abs().argmin()])
        n_left = int(localized[best])
        hint = f"N_g = {best} is the nearest that leaves weights ({n_left}); or give `n_weights`."
    else:
        hint = (
            "no N_g leaves a weight: failed and passed data rank the weights alike; "
            "choose another layer or target."
        )
    return EmptyLocalizationError(
        f"`localizer` leaves no weight at N_g = {n_g} of {at['total']}: "
        f"|B_failed & F_failed| = {at['failed']}, |B_passed & F_passed| = {at['passed']}, "
        f"|intersection of the two| = {at['both']}, |W_localized| = 0.",
        hint,
    )


def _check(n_weights: int | None, n_g: int | None) -> None:
    check_numbers(n_weights=n_weights, n_g=n_g)
    if n_weights is not None and n_g is not None:
        raise ConfigurationError(
            f"`n_weights={n_weights}` and `n_g={n_g}` are both given, and each decides the other.",
            "give one of them.",
        )
