"""NeuRecoverLite's localisation: weights that matter for the failed data and not for the passed (paper, section II.1).

One number, N_g, decides how many weights remain, and not in one direction: none at 0, none again when each of the
four sets holds every weight. So sizes are tabled for all N_g at once. A weight is in `B_failed & F_failed` from the N_g
on that equals the worse of its two ranks; likewise for the passed data. It is localised for every N_g between the two.
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
    """Localises the weights that matter for the failed samples and not for the passed.

    Attributes:
        n_weights: how many weights to localise (#lw); the nearest number that can be reached is taken. None, with `n_g`
            None too, leaves the choice to `default_n_weights`.
        n_g: how many top weights each of the four sets has (N_g), instead of `n_weights`.
        aggregation: how the gradients of many samples become one backward impact: `mean_gradient`, the absolute value
            of their mean, or `per_sample`, the mean of their absolute values.
        include_bias: whether biases may be localised too.

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
    """Localises the weights that matter for the failed data and not for the passed (paper, section II.1, step ii).

    `(B_failed & F_failed) - (B_passed & F_passed)`, each the top N_g weights of one impact; of equal impacts the one
    that comes first in the weight space ranks first. Of all N_g that leave any weight the one is taken whose number of
    weights is nearest to the request; the smallest, if several are equally near, since its weights have the greatest
    impact on the failed data. The result says what was requested and what was reached.

    Of the impacts on failed (I_neg) and passed samples (I_pos); the numbers are those of `NeuRecoverLite`.

    Raises:
        ConfigurationError: a number below 1, both numbers at once, an N_g above the number of weights.
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
        raise _empty(sizes["localized"], chosen, at)
    weights = ((enter <= chosen) & (leave > chosen)).nonzero().squeeze(1)
    return Localization(weights, chosen, n_weights, at)


def set_sizes(failed: Impact, passed: Impact) -> dict[str, Tensor]:
    """Returns the sizes in `Localization.sizes` for every N_g: each a `W + 1` int64 tensor, indexed by N_g."""
    enter, leave = _first_n_g(failed), _first_n_g(passed)
    return sizes_at(enter, leave, torch.arange(len(enter) + 1, device=enter.device))


def sizes_at(enter: Tensor, leave: Tensor, at: Tensor) -> dict[str, Tensor]:
    """Returns the sizes in `Localization.sizes` at some thresholds, from where weights enter and leave the set."""
    failed, passed, both = (
        torch.searchsorted(x.sort().values, at, right=True) for x in (enter, leave, torch.maximum(enter, leave))
    )
    return {"failed": failed, "passed": passed, "both": both, "localized": failed - both}


def _first_n_g(impact: Impact) -> Tensor:
    """Returns the N_g from which on each weight is among the top N_g by both impacts, `W` int64 from 1 to W."""
    return torch.maximum(places(impact.backward), places(impact.forward))


def places(impact: Tensor) -> Tensor:
    """Returns places from 1, the greatest impact first, equal ones in the order of the weight space."""
    order = impact.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1, device=order.device))


def nearest(sizes: Tensor, size: int) -> int:
    """Returns the first place of the size that is nearest to the one wanted, empty sets left out."""
    return int((sizes - size).abs().masked_fill(sizes == 0, 2**62).argmin())


def _empty(localized: Tensor, n_g: int, at: dict[str, int]) -> EmptyLocalizationError:
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
