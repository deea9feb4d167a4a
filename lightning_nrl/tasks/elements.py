"""`Sequence` and `Segmentation`, tasks with a class for each token or pixel."""

from __future__ import annotations

import collections.abc
from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.checks import described, is_class
from lightning_nrl._utils.device import at_least_float32, widest
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.tasks.task import TASKS, Task, class_divergence, class_logits, masked_mean


class Elements(NamedTuple):
    """Logits and labels of `n` samples with `E` elements (such as tokens or pixels) and `C`
    classes.
    """

    logits: Tensor  # n x C x E, at least float32
    label: Tensor  # n x E int64, 0 where the element is ignored
    counts: Tensor  # n x E bool, False where the element is ignored

    def lead(self) -> Tensor:
        """Returns the true class's logit minus the largest other logit, `n x E`. NaN logits give
        minus infinity.
        """
        others = self._others()
        # On ties, `max` passes the gradient to one class, `amax` to all. Without gradients, `amax`
        # is much faster.
        return self._above(others.max(1).values if others.requires_grad else others.amax(1))

    def lead_and_rival(self) -> tuple[Tensor, Tensor]:
        """Returns `lead()` and the rivals, `n x E` int64. The rival is the class with the largest
        other logit.
        """
        best, rival = self._others().max(1)
        return self._above(best), rival

    def right(self, lead: Tensor, reserve: Tensor | None) -> Tensor:
        """Marks right elements, `n x E` bool. If `reserve`, `n`, is given, a lead must reach its
        sample's entry.
        """
        right, tied = lead > 0, lead == 0
        if lead.device.type != "cpu" or bool(tied.any()):
            right |= tied & (self.logits.argmax(1) == self.label)
        return right if reserve is None else right & (lead >= reserve[:, None])

    def _others(self) -> Tensor:
        return self.logits.clone().scatter_(1, self.label[:, None], -torch.inf)

    def _above(self, best: Tensor) -> Tensor:
        lead = self.logits.gather(1, self.label[:, None])[:, 0] - best
        return torch.where(lead.isnan(), -torch.inf, lead)

    def mean(self, values: Tensor) -> Tensor:
        return masked_mean(values, self.counts)


class ElementsTask(Task):
    """Base class of tasks with a class per element. The loss is cross entropy, averaged over a
    sample's elements.

    Subclasses are frozen dataclasses with a field `ignore_index`, the label of elements that do not
    count.
    """

    ignore_index: int

    @abstractmethod
    def classes_first(self, output: Tensor) -> Tensor:
        """Returns the logits as `n x C x ...`, `C` at least 2. Raises a `ConfigurationError` if the
        shape is wrong.
        """

    @abstractmethod
    def elements_passed(self, elements: Elements, reserve: Tensor | None = None) -> Tensor:
        """Marks the right samples, `n` bool. If `reserve`, `n`, is given, a sample's margin must
        reach its entry.
        """

    @abstractmethod
    def elements_margin(self, elements: Elements) -> Tensor:
        """Returns the margin of each sample, `n`, differentiable."""

    def labels(self, target: Any, ndim: int) -> Tensor:
        """Returns the true classes, `n x ...` int64. `ndim` is the expected number of dimensions,
        including samples.

        Raises a `ConfigurationError` if the target is not a tensor of real numbers with at least
        two dimensions.
        """
        if isinstance(target, Tensor) and not target.is_complex() and target.ndim > 1:
            return target.long()
        raise ConfigurationError(
            f"`task`: {type(self).__name__} needs whole-number labels [samples, ...], found {described(target)}.",
            "give a class number for each element, or pass an `adapter` that does.",
        )

    def check(self, output: Tensor, target: Any) -> None:
        logits = self.classes_first(output)
        label = self.labels(target, logits.ndim - 1)
        name = type(self).__name__
        if (len(logits), *logits.shape[2:]) != label.shape:
            raise ConfigurationError(
                f"`task`: {name} got logits {list(output.shape)} for labels {list(label.shape)}.",
                self._shapes_hint(output, label),
            )
        given, n_classes, counts = (
            target.reshape(label.shape),
            logits.shape[1],
            label != self.ignore_index,
        )
        wrong = counts & ((label < 0) | (label >= n_classes) | (label != given))
        if wrong.any():
            raise ConfigurationError(
                f"`task`: there is a label {given[wrong][0]:g}, and the model returned {n_classes} logits an element.",
                f"use labels from 0 to {n_classes - 1}; set `ignore_index` to the label of ignored elements.",
            )
        empty = int((~counts.flatten(1).any(1)).sum())
        if empty:
            raise ConfigurationError(
                f"`task`: {empty} samples of a batch have the label {self.ignore_index} (ignored) everywhere.",
                "leave samples without any label out of the data.",
            )

    def passed(self, output: Tensor, target: Any) -> Tensor:
        return self.elements_passed(self.elements(output, target))

    def margin(self, output: Tensor, target: Any) -> Tensor:
        return self.elements_margin(self.elements(output, target))

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return _cross_entropy(self.elements(output, target))

    def passed_and_loss(
        self, output: Tensor, target: Any, reserve: Tensor | None = None, with_loss: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        own, plain = type(self), ElementsTask
        if (own.passed, own.margin, own.loss) != (plain.passed, plain.margin, plain.loss):
            return super().passed_and_loss(output, target, reserve, with_loss)
        elements = self.elements(output, target)
        return self.elements_passed(elements, reserve), _cross_entropy(
            elements
        ) if with_loss else None

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        """Returns the Kullback-Leibler divergence from `teacher`, `n`, a mean over elements that
        are not ignored.
        """
        each = class_divergence(*(self.classes_first(x).flatten(2) for x in (output, teacher)))
        return each.mean(1) if target is None else self.elements(output, target).mean(each)

    def elements(self, output: Tensor, target: Any) -> Elements:
        label = self.labels(target, output.ndim - 1).flatten(1)
        counts = label != self.ignore_index
        logits = at_least_float32(self.classes_first(output).flatten(2))
        return Elements(logits, label.masked_fill(~counts, 0), counts)

    def _shapes_hint(self, output: Tensor, label: Tensor) -> str:
        return "the model must return logits for each element of the labels; an `adapter` can change the labels."


def _cross_entropy(elements: Elements) -> Tensor:
    return elements.mean(
        F.cross_entropy(elements.logits.contiguous(), elements.label, reduction="none")
    )


@TASKS.register("sequence")
@dataclass(frozen=True)
class Sequence(ElementsTask):
    """Token classification: a sequence is right if all its tokens, or a given share of them, are
    right.

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
        check_real(
            "Sequence.share",
            self.share,
            "share",
            "give a number above 0 and at most 1.",
            above=0,
            most=1,
        )
        if self.class_dim not in (-1, 1):
            raise ConfigurationError(
                f"`Sequence.class_dim={self.class_dim!r}` is neither -1 nor 1.",
                "write -1 for logits [samples, tokens, classes], 1 for [samples, classes, tokens].",
            )

    def __str__(self) -> str:
        return f"Sequence: {'every token' if self.share == 1 else f'at least {self.share:.4g} of the tokens'} right"

    def elements_passed(self, elements: Elements, reserve: Tensor | None = None) -> Tensor:
        right = elements.right(elements.lead(), reserve)
        # Sorted by lead, token number `allowed_wrong` (from 0) has the margin, so at most that many
        # have less.
        return (elements.counts & ~right).sum(1) <= self.allowed_wrong(elements)

    def elements_margin(self, elements: Elements) -> Tensor:
        lead = torch.where(elements.counts, elements.lead(), torch.inf)
        return lead.sort(1).values.gather(1, self.allowed_wrong(elements)[:, None])[:, 0]

    def allowed_wrong(self, elements: Elements) -> Tensor:
        # In integers, so that 0.7 of 10 is 7.
        n, share = elements.counts.sum(1), Fraction(self.share).limit_denominator(10_000)
        return n - (n * share.numerator + share.denominator - 1) // share.denominator

    def classes_first(self, output: Tensor) -> Tensor:
        if output.ndim < 3 or output.shape[self.class_dim] < 2:
            shape = (
                "[samples, tokens, classes]"
                if self.class_dim == -1
                else "[samples, classes, tokens]"
            )
            raise ConfigurationError(
                f"`task`: Sequence needs logits {shape}, the model returned {list(output.shape)}.",
                "return one logit for each token and each of two or more classes, or set `class_dim`.",
            )
        return output.movedim(self.class_dim, 1)

    def _shapes_hint(self, output: Tensor, label: Tensor) -> str:
        other = -1 if self.class_dim == 1 else 1
        turned = output.movedim(other, 1)
        if (len(turned), *turned.shape[2:]) == label.shape:
            return f"write `Sequence(class_dim={other})`: the classes seem to be in that dimension."
        return super()._shapes_hint(output, label)


IOU_ROUNDING = 1e-6  # tolerance of the threshold, so that 3 of 5 reach 0.6
WINDOW = 0.02  # share of the pixels, nearest in lead to the deciding one, over which the gradient is averaged


@TASKS.register("segmentation")
@dataclass(frozen=True)
class Segmentation(ElementsTask):
    """Semantic segmentation: an image is right if its mean intersection over union (IoU) reaches a
    threshold.

    The mean is over the classes present in the image's target. Outputs are `n x C x ...`, such as
    `n x C x H x W`, or `n x 1 x ...` for two classes: a logit above 0 then predicts class 1.
    Targets are `n x ...` or `n x 1 x ...`, whole numbers of any dtype or bools.

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
        if self.classes is None:
            return
        if (
            not isinstance(self.classes, (list, tuple))
            or not self.classes
            or not all(map(is_class, self.classes))
        ):
            raise ConfigurationError(
                f"`Segmentation.classes={self.classes!r}` are not class numbers.",
                "give class numbers, such as (1,).",
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
        return self._reaches(
            elements, elements.label, rival, elements.counts, elements.right(lead, reserve)
        )

    def elements_margin(self, elements: Elements) -> Tensor:
        """Returns the lead of the deciding pixel of each image, `n`.

        If pixels turn right one by one, the largest lead first, the IoU reaches the threshold at
        the deciding pixel.
        """
        lead, rival = elements.lead_and_rival()
        order = torch.where(elements.counts, lead.detach(), -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        # Ignored pixels come last, even after pixels that count and have a lead of minus infinity.
        order = order.gather(
            1, (~elements.counts).gather(1, order).byte().argsort(dim=1, stable=True)
        )
        lead, label, rival, counts = (
            x.gather(1, order) for x in (lead, elements.label, rival, elements.counts)
        )
        rank, n = torch.arange(lead.shape[1], device=lead.device), counts.sum(1)
        # Bisection for the number of pixels that must be right: with none of them the IoU is 0,
        # with all of them 1.
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
                "return one logit for each class and pixel; one logit per pixel is enough for two classes.",
            )
        return class_logits(output)

    def labels(self, target: Any, ndim: int) -> Tensor:
        if isinstance(target, Tensor) and target.ndim == ndim + 1 and target.shape[1] == 1:
            target = target[:, 0]
        return super().labels(target, ndim)

    def _reaches(
        self, elements: Elements, label: Tensor, rival: Tensor, counts: Tensor, right: Tensor
    ) -> Tensor:
        """Marks the images, `n` bool, whose IoU is enough if all pixels outside of `right` get
        their rival class.
        """
        zeros = torch.zeros(
            elements.logits.shape[:2], dtype=widest(label.device), device=label.device
        )

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
