"""How two versions of a model differ, sample by sample: the numbers behind the metrics, as pure functions.

Every number comes from four counts, kept, broken, repaired and failing, that add up over batches and over machines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, explain

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


def _flips_update(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    """Counts the flips of one batch.

    Args:
        old_preds: the old model's classes `N x ...` (integers), or its logits `N x C x ...` (floats).
        new_preds: the new model's, likewise; it may know another number of classes.
        target: the true classes, `N x ...` integers.

    Returns:
        `4` int64: kept, broken, repaired, failing. On the device of the target; nothing waits for it.

    Raises:
        ConfigurationError: the shapes do not fit together.
    """
    old = _right("old_preds", old_preds, target)
    new = _right("new_preds", new_preds, target)
    return torch.stack([mask.sum() for mask in (old & new, old & ~new, ~old & new, ~old & ~new)])


def _right(argument: str, preds: Tensor, target: Tensor) -> Tensor:
    if preds.shape == target.shape and not preds.is_floating_point():
        return preds == target
    if preds.is_floating_point() and preds.ndim == target.ndim + 1 and preds[:, 0].shape == target.shape:
        return (preds.argmax(1) == target) & ~preds.isnan().any(1)
    raise ConfigurationError(
        explain(
            f"`{argument}`: {preds.dtype} {list(preds.shape)} does not fit a `target` of {list(target.shape)}.",
            "give classes as integers in the shape of the target, or logits [samples, classes, ...] as floats.",
        )
    )


def _negative_flip_rate(flips: Tensor) -> Tensor:
    _, broken, _, _ = flips.unbind(-1)
    return broken / flips.sum(-1)


def _positive_flip_rate(flips: Tensor) -> Tensor:
    _, _, repaired, _ = flips.unbind(-1)
    return repaired / flips.sum(-1)


def _negative_flip_impact(flips: Tensor) -> Tensor:
    _, broken, _, failing = flips.unbind(-1)
    return broken / (broken + failing)


def _relative_negative_flip_rate(flips: Tensor) -> Tensor:
    kept, broken, _, _ = flips.unbind(-1)
    return _negative_flip_impact(flips) / ((kept + broken) / flips.sum(-1))


def _backward_trust_compatibility(flips: Tensor) -> Tensor:
    kept, broken, _, _ = flips.unbind(-1)
    passed = kept + broken
    return torch.where(passed == 0, 1.0, kept / passed)


def _backward_error_compatibility(flips: Tensor) -> Tensor:
    _, broken, _, failing = flips.unbind(-1)
    return failing / (broken + failing)


def _repair_rate(flips: Tensor) -> Tensor:
    _, _, repaired, failing = flips.unbind(-1)
    return repaired / (repaired + failing)


def _break_rate(flips: Tensor) -> Tensor:
    kept, broken, _, _ = flips.unbind(-1)
    return broken / (kept + broken)


def flip_rates(flips: Tensor) -> dict[str, Tensor]:
    """All rates of this module, by the names of its functions.

    Args:
        flips: `... x 4`, kept, broken, repaired, failing; floats keep their precision, integers give float32.

    Returns:
        One tensor `...` a rate. Undefined ones are NaN.
    """
    return {
        "negative_flip_rate": _negative_flip_rate(flips),
        "positive_flip_rate": _positive_flip_rate(flips),
        "negative_flip_impact": _negative_flip_impact(flips),
        "relative_negative_flip_rate": _relative_negative_flip_rate(flips),
        "backward_trust_compatibility": _backward_trust_compatibility(flips),
        "backward_error_compatibility": _backward_error_compatibility(flips),
        "repair_rate": _repair_rate(flips),
        "break_rate": _break_rate(flips),
    }


def negative_flip_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    r"""Compute the `negative flip rate`: the share of all samples that the update breaks (Yan et al., CVPR 2021).

    .. math::
        \text{NFR} = \frac{\text{broken}}{N}

    Args:
        old_preds: the old model's classes `N x ...` (integers), or its logits `N x C x ...` (floats).
        new_preds: the new model's, likewise; it may know another number of classes.
        target: the true classes, `N x ...` integers.

    Returns:
        A number in [0, 1]; NaN without samples.

    Raises:
        ConfigurationError: the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> negative_flip_rate(tensor([0, 1, 1, 2]), tensor([0, 1, 2, 1]), tensor([0, 1, 1, 1]))
        tensor(0.2500)
    """
    return _negative_flip_rate(_flips_update(old_preds, new_preds, target))


def positive_flip_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    r"""Compute the `positive flip rate`: the share of all samples that the update repairs.

    .. math::
        \text{PFR} = \frac{\text{repaired}}{N}

    Arguments, result and errors are those of :func:`negative_flip_rate`.

    Example:
        >>> from torch import tensor
        >>> positive_flip_rate(tensor([0, 0, 2, 2]), tensor([0, 1, 2, 1]), tensor([0, 1, 1, 1]))
        tensor(0.5000)
    """
    return _positive_flip_rate(_flips_update(old_preds, new_preds, target))


def negative_flip_impact(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    r"""Compute the `negative flip impact`: the share of the new model's errors that are regressions.

    .. math::
        \text{NFI} = \frac{\text{broken}}{\text{broken} + \text{failing}}

    Arguments and errors are those of :func:`negative_flip_rate`. NaN where the new model makes no error.

    Example:
        >>> from torch import tensor
        >>> negative_flip_impact(tensor([0, 1, 2, 2]), tensor([0, 2, 2, 1]), tensor([0, 1, 1, 1]))
        tensor(0.5000)
    """
    return _negative_flip_impact(_flips_update(old_preds, new_preds, target))


def relative_negative_flip_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    r"""Compute the `relative negative flip rate`: NFR against that of two models that err independently.

    .. math::
        \text{NFR}_\text{rel} = \frac{\text{NFR}}{(1 - \text{ER}_\text{old}) \cdot \text{ER}_\text{new}}

    with the error rates :math:`\text{ER}` of the two models (Yan et al., CVPR 2021). 1 is what independent
    errors give, 0 no regression.

    Arguments and errors are those of :func:`negative_flip_rate`. NaN where the old model gets nothing right or the new
    one everything.

    Example:
        >>> from torch import tensor
        >>> relative_negative_flip_rate(tensor([0, 1, 2, 2]), tensor([0, 2, 2, 1]), tensor([0, 1, 1, 1]))
        tensor(1.)
    """
    return _relative_negative_flip_rate(_flips_update(old_preds, new_preds, target))


def backward_trust_compatibility(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    r"""Compute the `backward trust compatibility`: the share of what was right that stays right.

    .. math::
        \text{BTC} = \frac{\text{kept}}{\text{kept} + \text{broken}}

    (Srivastava et al., KDD 2020.) Arguments and errors are those of :func:`negative_flip_rate`. 1 where the old model
    got nothing right, since then nothing could break.

    Example:
        >>> from torch import tensor
        >>> backward_trust_compatibility(tensor([0, 1, 1, 2]), tensor([0, 1, 2, 1]), tensor([0, 1, 1, 1]))
        tensor(0.6667)
    """
    return _backward_trust_compatibility(_flips_update(old_preds, new_preds, target))


def backward_error_compatibility(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    r"""Compute the `backward error compatibility`: the share of the new model's errors that the old one made too.

    .. math::
        \text{BEC} = \frac{\text{failing}}{\text{broken} + \text{failing}}

    (Srivastava et al., KDD 2020.) Arguments and errors are those of :func:`negative_flip_rate`. NaN where the new model
    makes no error.

    Example:
        >>> from torch import tensor
        >>> backward_error_compatibility(tensor([0, 2, 2, 1]), tensor([0, 2, 2, 2]), tensor([0, 1, 1, 1]))
        tensor(0.6667)
    """
    return _backward_error_compatibility(_flips_update(old_preds, new_preds, target))


def repair_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    r"""Compute the `repair rate` RR: the share of what was wrong that is now right (Sohn et al., Arachne).

    .. math::
        \text{RR} = \frac{\text{repaired}}{\text{repaired} + \text{failing}}

    Arguments and errors are those of :func:`negative_flip_rate`. Give the targeted samples alone for the rate
    within I_neg. NaN where the old model got nothing wrong.

    Example:
        >>> from torch import tensor
        >>> repair_rate(tensor([0, 0, 2, 2]), tensor([0, 1, 2, 1]), tensor([0, 1, 1, 1]))
        tensor(0.6667)
    """
    return _repair_rate(_flips_update(old_preds, new_preds, target))


def break_rate(old_preds: Tensor, new_preds: Tensor, target: Tensor) -> Tensor:
    r"""Compute the `break rate` BR: the share of what was right that is now wrong (Sohn et al., Arachne).

    .. math::
        \text{BR} = \frac{\text{broken}}{\text{kept} + \text{broken}}

    Arguments and errors are those of :func:`negative_flip_rate`. NaN where the old model got nothing right.

    Example:
        >>> from torch import tensor
        >>> break_rate(tensor([0, 1, 1, 2]), tensor([0, 1, 2, 1]), tensor([0, 1, 1, 1]))
        tensor(0.3333)
    """
    return _break_rate(_flips_update(old_preds, new_preds, target))
