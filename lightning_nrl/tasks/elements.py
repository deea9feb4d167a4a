"""`Sequence` and `Segmentation`, tasks with a class for each token or pixel."""

from __future__ import annotations

import collections.abc
from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.checks import described, is_class
from lightning_nrl._utils.device import at_least_float32, widest
from lightning_nrl.data.batch import BatchTarget
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.tasks.task import TASKS, Task, class_divergence, class_logits, masked_mean


class Elements(NamedTuple):
    """Logits and labels of `n` samples with `E` elements (tokens or pixels) and `C` classes."""

    logits: Tensor  # n x C x E, at least float32
    label: Tensor  # n x E int64, 0 where the element is ignored
    counts: Tensor  # n x E bool, False where the element is ignored

    def lead(self) -> Tensor:
        """Returns the true class's logit minus the largest other logit, `n x E`.

        NaN logits give minus infinity.
        """
        rivals = self._rivals()
        # On ties, `max` passes the gradient to one class, `amax` to all. Without gradients, `amax`
        # is much faster.
        if rivals.requires_grad:
            return self._lead_over(rivals.max(1).values)
        return self._lead_over(rivals.amax(1))

    def lead_and_rival(self) -> tuple[Tensor, Tensor]:
        """Returns `lead()` and the rivals, the classes with the largest other logit, `n x E`."""
        largest, rival = self._rivals().max(1)
        return self._lead_over(largest), rival

    def right(self, lead: Tensor, reserve: Tensor | None) -> Tensor:
        """Marks right elements, `n x E` bool; leads must reach their sample's `reserve`, `n`."""
        right = lead > 0
        tied = lead == 0
        # On a GPU, asking for ties would wait for the device.
        if lead.device.type != "cpu" or tied.any():
            right |= tied & (self.logits.argmax(1) == self.label)
        if reserve is None:
            return right
        return right & (lead >= reserve[:, None])

    def mean(self, values: Tensor) -> Tensor:
        return masked_mean(values, self.counts)

    def loss(self) -> Tensor:
        """Returns the cross entropy of each sample, `n`, a mean over its elements."""
        logits = self.logits.contiguous()
        return self.mean(F.cross_entropy(logits, self.label, reduction="none"))

    def _rivals(self) -> Tensor:
        return self.logits.scatter(1, self.label[:, None], -torch.inf)

    def _lead_over(self, rival: Tensor) -> Tensor:
        lead = self.logits.gather(1, self.label[:, None])[:, 0] - rival
        return torch.where(lead.isnan(), -torch.inf, lead)


class ElementsTask(Task):
    """Base class of tasks with a class per element.

    The loss is cross entropy, averaged over a sample's elements. Subclasses are frozen dataclasses
    with a field `ignore_index`, the label of elements that do not count.
    """

    ignore_index: int

    @abstractmethod
    def classes_first(self, output: Tensor) -> Tensor:
        """Returns the logits as `n x C x ...`, `C` at least 2.

        Raises a `ConfigurationError` if the shape is wrong.
        """

    @abstractmethod
    def elements_passed(self, elements: Elements, reserve: Tensor | None) -> Tensor:
        """Marks the right samples, `n` bool; margins must reach the samples' `reserve`, `n`."""

    @abstractmethod
    def elements_margin(self, elements: Elements) -> Tensor:
        """Returns the margin of each sample, `n`, differentiable."""

    def labels(self, target: BatchTarget, ndim: int) -> Tensor:
        """Returns the true classes, `n x ...` int64.

        `ndim` is the expected number of dimensions, including samples. Raises a
        `ConfigurationError` if the target is not a tensor with at least two dimensions.
        """
        if isinstance(target, Tensor) and target.ndim > 1:
            return target.long()
        raise ConfigurationError(
            f"`task`: {type(self).__name__} needs whole-number labels [samples, ...], found "
            f"{described(target)}.",
            "give a class number for each element, or pass an `adapter` that does.",
        )

    def check(self, output: Tensor, target: BatchTarget) -> None:
        logits = self.classes_first(output)
        label = self.labels(target, logits.ndim - 1)
        if _element_shape(logits) != label.shape:
            raise ConfigurationError(
                f"`task`: {type(self).__name__} got logits {list(output.shape)} for labels "
                f"{list(label.shape)}.",
                self._shapes_hint(output, label),
            )
        n_classes = logits.shape[1]
        counts = label != self.ignore_index
        exact = target.reshape(label.shape)  # before the conversion to int64
        wrong = counts & ((label < 0) | (label >= n_classes) | (label != exact))
        if wrong.any():
            raise ConfigurationError(
                f"`task`: there is a label {exact[wrong][0]:g}, and the model returned {n_classes} "
                "logits an element.",
                f"use labels from 0 to {n_classes - 1}; set `ignore_index` to the label of ignored "
                "elements.",
            )
        n_empty = int((~counts.flatten(1).any(1)).sum())
        if n_empty:
            raise ConfigurationError(
                f"`task`: {n_empty} samples of a batch have the label {self.ignore_index} "
                "(ignored) everywhere.",
                "leave samples without any label out of the data.",
            )

    def passed(self, output: Tensor, target: BatchTarget) -> Tensor:
        return self.elements_passed(self.elements(output, target), reserve=None)

    def margin(self, output: Tensor, target: BatchTarget) -> Tensor:
        return self.elements_margin(self.elements(output, target))

    def loss(self, output: Tensor, target: BatchTarget) -> Tensor:
        return self.elements(output, target).loss()

    def passed_and_loss(
        self,
        output: Tensor,
        target: BatchTarget,
        reserve: Tensor | None = None,
        with_loss: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        kind = type(self)
        is_plain = (
            kind.passed is ElementsTask.passed
            and kind.margin is ElementsTask.margin
            and kind.loss is ElementsTask.loss
        )
        if not is_plain:  # a subclass judges in its own way
            return super().passed_and_loss(output, target, reserve, with_loss)
        elements = self.elements(output, target)
        passed = self.elements_passed(elements, reserve)
        return passed, elements.loss() if with_loss else None

    def divergence(self, output: Tensor, teacher: Tensor, target: BatchTarget = None) -> Tensor:
        """Returns the Kullback-Leibler divergence from `teacher`, `n`.

        It is a mean over the elements that are not ignored.
        """
        new = self.classes_first(output).flatten(2)
        divergence = class_divergence(new, self.classes_first(teacher).flatten(2))
        if target is None:
            return divergence.mean(1)
        return self.elements(output, target).mean(divergence)

    def elements(self, output: Tensor, target: BatchTarget) -> Elements:
        label = self.labels(target, output.ndim - 1).flatten(1)
        counts = label != self.ignore_index
        logits = at_least_float32(self.classes_first(output).flatten(2))
        return Elements(logits, label.masked_fill(~counts, 0), counts)

    def _shapes_hint(self, output: Tensor, label: Tensor) -> str:
        return (
            "the model must return logits for each element of the labels; an `adapter` can change "
            "the labels."
        )


def _element_shape(logits: Tensor) -> tuple[int, ...]:
    return (len(logits), *logits.shape[2:])


@TASKS.register("sequence")
@dataclass(frozen=True)
class Sequence(ElementsTask):
    """Token classification: a sequence is right if all its tokens, or a share of them, are right.

    A token is right if the arg max of its logits is its class. The margin of a sequence is the
    smallest margin of its tokens, once as many of the smallest margins are left out as tokens may
    be wrong.

    Attributes:
        share: share of the counted tokens that must be right, above 0 and at most 1.
        class_dim: class dimension of the logits: -1 for `n x T x C`, 1 for `n x C x T`. Labels are
            `n x T`.
        ignore_index: label of tokens that do not count, such as padding.

    Example:
        The second token is wrong, by half a logit.

        >>> logits = torch.tensor([[[0.0, 2.0], [0.5, 1.0], [3.0, 0.0]]])
        >>> labels = torch.tensor([[1, 0, -100]])
        >>> Sequence().margin(logits, labels), Sequence().passed(logits, labels)
        (tensor([-0.5000]), tensor([False]))
        >>> Sequence(share=0.5).passed(logits, labels)
        tensor([True])
    """

    share: float = 1.0
    class_dim: int = -1
    ignore_index: int = -100

    def __post_init__(self) -> None:
        hint = "give a number above 0 and at most 1."
        check_real("Sequence.share", self.share, "share", hint, above=0, most=1)
        if self.class_dim not in (-1, 1):
            raise ConfigurationError(
                f"`Sequence.class_dim={self.class_dim!r}` is neither -1 nor 1.",
                "write -1 for logits [samples, tokens, classes], 1 for [samples, classes, tokens].",
            )

    def __str__(self) -> str:
        if self.share == 1:
            return "Sequence: every token right"
        return f"Sequence: at least {self.share:.4g} of the tokens right"

    def elements_passed(self, elements: Elements, reserve: Tensor | None) -> Tensor:
        right = elements.right(elements.lead(), reserve)
        # Sorted by lead, token number `allowed_wrong` (from 0) has the margin, so at most that many
        # have less.
        return (elements.counts & ~right).sum(1) <= self.allowed_wrong(elements)

    def elements_margin(self, elements: Elements) -> Tensor:
        lead = torch.where(elements.counts, elements.lead(), torch.inf)
        return lead.sort(1).values.gather(1, self.allowed_wrong(elements)[:, None])[:, 0]

    def allowed_wrong(self, elements: Elements) -> Tensor:
        # In integers, so that 0.7 of 10 is 7.
        share = Fraction(self.share).limit_denominator(10_000)
        n = elements.counts.sum(1)
        n_required = (n * share.numerator + share.denominator - 1) // share.denominator
        return n - n_required

    def classes_first(self, output: Tensor) -> Tensor:
        if output.ndim < 3 or output.shape[self.class_dim] < 2:
            shape = "[samples, classes, tokens]"
            if self.class_dim == -1:
                shape = "[samples, tokens, classes]"
            raise ConfigurationError(
                f"`task`: Sequence needs logits {shape}, the model returned {list(output.shape)}.",
                "return one logit for each token and each of two or more classes, or set "
                "`class_dim`.",
            )
        return output.movedim(self.class_dim, 1)

    def _shapes_hint(self, output: Tensor, label: Tensor) -> str:
        class_dim = -self.class_dim  # 1 or -1
        if _element_shape(output.movedim(class_dim, 1)) == label.shape:
            return (
                f"write `Sequence(class_dim={class_dim})`: the classes seem to be in that "
                "dimension."
            )
        return super()._shapes_hint(output, label)


IOU_ROUNDING = 1e-6  # tolerance of the threshold, so that 3 of 5 reach 0.6
WINDOW = 0.02
"""Share of an image's pixels whose leads share the gradient of the margin.

These are the pixels nearest in lead to the deciding one: a single pixel would give a noisy
gradient.
"""


@TASKS.register("segmentation")
@dataclass(frozen=True)
class Segmentation(ElementsTask):
    """Semantic segmentation: an image is right if its mean IoU reaches a threshold.

    The mean of the intersection over union (IoU) is over the classes present in the image's target.
    Outputs are `n x C x ...`, such as `n x C x H x W`, or `n x 1 x ...` for two classes: a logit
    above 0 then predicts class 1. Targets are `n x ...` or `n x 1 x ...`, whole numbers of any
    dtype or bools.

    The lead of a pixel is its true logit minus the largest other logit. The margin of a right image
    is the amount by which the leads of all pixels can shrink before the IoU falls below the
    threshold. The margin of a wrong image is minus the amount by which all leads must grow for the
    IoU to reach the threshold. A margin equals the lead of one pixel, but its gradient is the mean
    gradient of this lead and of leads of similar size.

    Attributes:
        iou: threshold, above 0 and at most 1.
        classes: classes that count, such as `(1,)` for the foreground alone; None means all
            classes. If no class that counts occurs in the target of an image, all classes count for
            this image.
        ignore_index: label of pixels that do not count; 255 in many data sets.

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
    classes: collections.abc.Sequence[int] | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        hint = "give a number above 0 and at most 1."
        check_real("Segmentation.iou", self.iou, "threshold", hint, above=0, most=1)
        classes = self.classes
        if classes is None:
            return
        is_list = isinstance(classes, (list, tuple)) and len(classes) > 0
        if not is_list or not all(map(is_class, classes)):
            raise ConfigurationError(
                f"`Segmentation.classes={classes!r}` are not class numbers.",
                "give class numbers, such as (1,).",
            )
        object.__setattr__(self, "classes", tuple(classes))

    def __str__(self) -> str:
        mean = "mean IoU"
        if self.classes is not None:
            mean += f" of classes {', '.join(map(str, self.classes))}"
        return f"Segmentation: {mean} at least {self.iou:.4g}"

    def check(self, output: Tensor, target: BatchTarget) -> None:
        super().check(output, target)
        n_classes = self.classes_first(output).shape[1]
        if self.classes is not None and max(self.classes) >= n_classes:
            raise ConfigurationError(
                f"`Segmentation.classes={self.classes!r}`, and the model returned {n_classes} "
                "logits a pixel.",
                f"give classes from 0 to {n_classes - 1}.",
            )

    def elements_passed(self, elements: Elements, reserve: Tensor | None) -> Tensor:
        lead, rival = elements.lead_and_rival()
        return self._reaches(elements, rival, elements.right(lead, reserve))

    def elements_margin(self, elements: Elements) -> Tensor:
        """Returns the lead of the deciding pixel of each image, `n`.

        If pixels turn right one by one, the largest lead first, the IoU reaches the threshold at
        the deciding pixel.
        """
        lead, rival = elements.lead_and_rival()
        order = _order_by_lead(lead.detach(), elements.counts)
        rank = order.argsort(1)
        n = elements.counts.sum(1)
        # Bisection for the number of pixels that must be right: with none of them the IoU is 0,
        # with all of them 1.
        too_few = torch.zeros_like(n)
        enough = n.clamp_min(1)
        for _ in range(lead.shape[1].bit_length()):
            middle = (too_few + enough) // 2
            reached = self._reaches(elements, rival, rank < middle[:, None])
            too_few = torch.where(reached, too_few, middle)
            enough = torch.where(reached, middle, enough)
        last = enough[:, None] - 1
        deciding = lead.gather(1, order.gather(1, last))[:, 0]
        if not deciding.requires_grad:
            return deciding
        is_near = (rank - last).abs() <= WINDOW / 2 * n[:, None]
        is_near &= elements.counts & lead.detach().isfinite()
        mean = masked_mean(lead, is_near)
        return deciding.detach() + (mean - mean.detach())

    def classes_first(self, output: Tensor) -> Tensor:
        if output.ndim < 3 or output.shape[1] < 1:
            raise ConfigurationError(
                "`task`: Segmentation needs logits [samples, classes, ...], the model returned "
                f"{list(output.shape)}.",
                "return one logit for each class and pixel; one logit per pixel is enough for two "
                "classes.",
            )
        return class_logits(output)

    def labels(self, target: BatchTarget, ndim: int) -> Tensor:
        if isinstance(target, Tensor) and target.ndim == ndim + 1 and target.shape[1] == 1:
            target = target[:, 0]
        return super().labels(target, ndim)

    def _reaches(self, elements: Elements, rival: Tensor, right: Tensor) -> Tensor:
        """Marks the images, `n` bool, whose IoU is enough.

        The pixels in `right` get their class, and all others their rival class.
        """
        logits, label, counts = elements
        dtype = widest(label.device)
        zeros = logits.new_zeros(logits.shape[:2], dtype=dtype)
        truth = zeros.scatter_add(1, label, counts.to(dtype))
        hits = zeros.scatter_add(1, label, (right & counts).to(dtype))
        union = truth.scatter_add(1, rival, (~right & counts).to(dtype))
        present = truth > 0
        if self.classes is not None:
            chosen = torch.zeros_like(present)
            chosen[:, list(self.classes)] = True
            chosen &= present
            present = torch.where(chosen.any(1, keepdim=True), chosen, present)
        return masked_mean(hits / union.clamp_min(1), present) >= self.iou - IOU_ROUNDING


def _order_by_lead(lead: Tensor, counts: Tensor) -> Tensor:
    """Sorts pixels by falling lead, `n x E` int64; ignored pixels come last."""
    lead = torch.where(counts, lead, -torch.inf)
    order = lead.argsort(dim=1, descending=True, stable=True)
    # A pixel that counts may have a lead of minus infinity, too.
    is_ignored = (~counts).gather(1, order).byte()
    return order.gather(1, is_ignored.argsort(dim=1, stable=True))
