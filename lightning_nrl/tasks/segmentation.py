"""A class for each pixel of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.checks import is_class
from lightning_nrl._utils.precision import widest
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.tasks._elements import Elements, ElementsTask

__all__ = ["Segmentation"]

IOU_ROUNDING = 1e-6
"""An IoU this much below the threshold reaches it, so that 3 of 5 are 0.6."""

WINDOW = 0.02
"""The part of an image's pixels, by rank around the deciding one, whose mean gives the margin's gradient."""


@dataclass(frozen=True)
class Segmentation(ElementsTask):
    """Semantic segmentation: an image is right if its mean intersection over union (IoU) reaches a threshold.

    The mean is over the classes that are present in the image's truth. A pixel is right if the logit of its class is
    above all others, else it goes to the best other class. Outputs are `n x C x H x W` (or any number of dimensions of
    pixels), or `n x 1 x H x W` for two classes, one logit that is above 0 for class 1; targets are `n x H x W`, for two
    classes also `n x 1 x H x W`, whole or bool.

    The margin is how many logits the image has to spare: the largest number by which the lead of every pixel's true
    class could shrink before the IoU falls below the threshold. So it is above 0 exactly where the image is right, it
    is the lead of one pixel, the deciding one, and it is found by ranking pixels. The gradient is the mean over the
    pixels next to that one in rank, since a single one says little of a whole image (the derivative of a quantile is
    the mean change of what lies at it).

    Attributes:
        iou: the threshold, above 0 to 1.
        classes: the classes that count, such as `(1,)` for the foreground alone; None: all. In an image without any of
            them all classes count.
        ignore_index: the label of pixels that do not count; 255 in many data sets.

    Raises:
        ConfigurationError: on construction, for values out of range.

    Example:
        Three of four pixels are right: the IoU is 2/3 for class 0 and 1/2 for class 1.

        >>> logits = torch.tensor([[[[-1.0, 2.0], [-3.0, 0.5]]]])
        >>> truth = torch.tensor([[[0, 1], [0, 0]]])
        >>> Segmentation(iou=0.5).passed(logits, truth), Segmentation(iou=0.6).passed(logits, truth)
        (tensor([True]), tensor([False]))
        >>> Segmentation(iou=0.5).margin(logits, truth)
        tensor([1.])
    """

    iou: float = 0.5
    classes: Sequence[int] | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        hint = "give a number above 0 and at most 1."
        check_real("Segmentation.iou", self.iou, "threshold", hint, above=0, most=1)
        if self.classes is None:
            return
        if not isinstance(self.classes, (list, tuple)) or not self.classes or not all(map(is_class, self.classes)):
            raise ConfigurationError(
                f"`Segmentation.classes={self.classes!r}` are no classes.", "give class numbers, such as (1,)."
            )
        object.__setattr__(self, "classes", tuple(self.classes))

    def __str__(self) -> str:
        of = "" if self.classes is None else f" of classes {', '.join(map(str, self.classes))}"
        return f"Segmentation: mean IoU{of} at least {self.iou:.4g}"

    def check(self, output: Tensor, target: Any) -> None:
        super().check(output, target)
        n_classes = self.classes_first(output).shape[1]
        if self.classes is not None and max(self.classes) >= n_classes:
            raise ConfigurationError(
                f"`Segmentation.classes={self.classes!r}`, and the model returned {n_classes} logits a pixel.",
                f"give classes from 0 to {n_classes - 1}.",
            )

    def elements_passed(self, elements: Elements, reserve: Tensor | None = None) -> Tensor:
        lead, rival = elements.lead_and_rival()
        right = lead > 0 if reserve is None else (lead > 0) & (lead >= reserve[:, None])
        return self._reaches(elements, elements.label, rival, elements.counts, right)

    def elements_margin(self, elements: Elements) -> Tensor:
        """The lead of the deciding pixel, `n`: with all more certain ones right, it is the one that is needed too."""
        lead, rival = elements.lead_and_rival()
        order = torch.where(elements.counts, lead.detach(), -torch.inf).argsort(dim=1, descending=True, stable=True)
        # Ignored pixels come last, also after those that are infinitely wrong.
        order = order.gather(1, (~elements.counts).gather(1, order).byte().argsort(dim=1, stable=True))
        lead, label, rival, counts = (x.gather(1, order) for x in (lead, elements.label, rival, elements.counts))
        rank, n = torch.arange(lead.shape[1], device=lead.device), counts.sum(1)
        # How many pixels must be right, by halving: with none the IoU is 0, with all it is 1.
        none, enough = torch.zeros_like(n), n.clamp_min(1)
        for _ in range(lead.shape[1].bit_length()):
            middle = (none + enough) // 2
            reached = self._reaches(elements, label, rival, counts, rank < middle[:, None])
            none, enough = torch.where(reached, none, middle), torch.where(reached, middle, enough)
        deciding = lead.gather(1, enough[:, None] - 1)[:, 0]
        if not deciding.requires_grad:
            return deciding
        near = (rank - (enough - 1)[:, None]).abs() <= (WINDOW / 2 * n)[:, None]
        near &= counts & lead.detach().isfinite()
        mean = torch.where(near, lead, 0.0).sum(1) / near.sum(1).clamp_min(1)
        return deciding.detach() + (mean - mean.detach())

    def classes_first(self, output: Tensor) -> Tensor:
        if output.ndim < 3 or output.shape[1] < 1:
            raise ConfigurationError(
                f"`task`: Segmentation needs logits [samples, classes, ...], the model returned {list(output.shape)}.",
                "return one logit for each class and pixel; for two classes one logit a pixel will do.",
            )
        # The sigmoid of a logit is the softmax of 0 and that logit.
        return F.pad(output, (0, 0) * (output.ndim - 2) + (1, 0)) if output.shape[1] == 1 else output

    def labels(self, target: Any, ndim: int) -> Tensor:
        if isinstance(target, Tensor) and target.ndim == ndim + 1 and target.shape[1] == 1:
            target = target[:, 0]
        return super().labels(target, ndim)

    def _reaches(self, elements: Elements, label: Tensor, rival: Tensor, counts: Tensor, right: Tensor) -> Tensor:
        """`n` bool, whether the IoU does if some pixels are right and the others are taken for their rivals."""
        zeros = torch.zeros(elements.logits.shape[:2], dtype=widest(label.device), device=label.device)

        def of_class(where: Tensor, chosen: Tensor) -> Tensor:
            return zeros.scatter_add(1, where, (chosen & counts).to(zeros))

        truth, hit = of_class(label, torch.ones_like(counts)), of_class(label, right)
        union = truth + of_class(rival, ~right)
        present = truth > 0
        if self.classes is not None:
            chosen = torch.zeros_like(present)
            chosen[:, list(self.classes)] = True
            chosen &= present
            present = torch.where(chosen.any(1, keepdim=True), chosen, present)
        shares = torch.where(present, hit / union.clamp_min(1), 0.0)
        return shares.sum(1) / present.sum(1).clamp_min(1) >= self.iou - IOU_ROUNDING
