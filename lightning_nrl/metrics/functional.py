"""How two versions of a model differ, sample by sample: the rates of an update as functions of predictions.

Each counts kept, broken, repaired and failing samples and looks up its formula in the table of rates
(:data:`lightning_nrl.metrics.rates.RATES`). Formulas, sources and what is undefined: the metrics of the same names.

Example:
    Five samples are kept, two broken, three repaired, and one goes on failing.

    >>> old = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0, 1, 2])
    >>> new = torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 2, 0, 0])
    >>> target = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    >>> negative_flip_rate(old, new, target), positive_flip_rate(old, new, target)
    (tensor(0.1818), tensor(0.2727))
    >>> negative_flip_impact(old, new, target), relative_negative_flip_rate(old, new, target)
    (tensor(0.6667), tensor(1.0476))
    >>> backward_trust_compatibility(old, new, target), backward_error_compatibility(old, new, target)
    (tensor(0.7143), tensor(0.3333))
    >>> repair_rate(old, new, target), break_rate(old, new, target)
    (tensor(0.7500), tensor(0.2857))
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import flip_masks
from lightning_nrl.metrics.rates import RATES, flip_rates

__all__ = [
    "backward_error_compatibility",
    "backward_trust_compatibility",
    "break_rate",
    "flip_rates",
    "negative_flip_impact",
    "negative_flip_rate",
    "positive_flip_rate",
    "relative_negative_flip_rate",
    "repair_rate",
]


def _is_right(argument: str, preds: Tensor, target: Tensor) -> Tensor:
    """Which predictions are right, `N x ...` bool; logits with a NaN are not."""
    if preds.is_floating_point() and preds.ndim == target.ndim + 1 and preds[:, 0].shape == target.shape:
        return (preds.argmax(1) == target) & ~preds.isnan().any(1)
    if preds.shape == target.shape and not preds.is_floating_point():
        return preds == target
    raise ConfigurationError(
        f"`{argument}`: {preds.dtype} {list(preds.shape)} does not fit a `target` of {list(target.shape)}.",
        "give classes as integers in the shape of the target, or logits [samples, classes, ...] as floats.",
    )


def _flips_update(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """Counts the flips of one batch on the target's device, `4` int64: kept, broken, repaired, failing."""
    masks = flip_masks(_is_right("old_preds", old_preds, target), _is_right("new_preds", new_preds, target))
    return torch.stack([mask.sum() for mask in masks])


def _rate(name: str, old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    return RATES[name](_flips_update(old_preds, new_preds, target))


def negative_flip_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """The share of all samples that the update breaks, in [0, 1]; NaN without samples.

    Args:
        old_preds: the old model's classes `N x ...` (integers), or its logits `N x C x ...` (floats).
        new_preds: the new model's, likewise; it may know another number of classes.
        target: the true classes, `N x ...` integers.

    Raises:
        ConfigurationError: the shapes do not fit together.
    """
    return _rate("negative_flip_rate", old_preds, new_preds, target)


def positive_flip_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """The share of all samples that the update repairs; arguments as for :func:`negative_flip_rate`."""
    return _rate("positive_flip_rate", old_preds, new_preds, target)


def negative_flip_impact(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """The share of the new model's errors that are regressions; arguments as for :func:`negative_flip_rate`."""
    return _rate("negative_flip_impact", old_preds, new_preds, target)


def relative_negative_flip_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """NFR against that of two models that err independently; arguments as for :func:`negative_flip_rate`."""
    return _rate("relative_negative_flip_rate", old_preds, new_preds, target)


def backward_trust_compatibility(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """The share of what was right that stays right; arguments as for :func:`negative_flip_rate`."""
    return _rate("backward_trust_compatibility", old_preds, new_preds, target)


def backward_error_compatibility(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """The share of the new model's errors that are old ones; arguments as for :func:`negative_flip_rate`."""
    return _rate("backward_error_compatibility", old_preds, new_preds, target)


def repair_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """The share of what was wrong that is now right; arguments as for :func:`negative_flip_rate`."""
    return _rate("repair_rate", old_preds, new_preds, target)


def break_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """The share of what was right that is now wrong; arguments as for :func:`negative_flip_rate`."""
    return _rate("break_rate", old_preds, new_preds, target)
