"""What sequences and segmentations have in common: a class for each of a sample's elements, tokens or pixels."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.tasks.task import Task, class_divergence, described, masked_mean

__all__ = ["Elements", "ElementsTask"]


class Elements(NamedTuple):
    """Samples taken apart: `n` of them with `E` elements of `C` classes each."""

    logits: Tensor  # n x C x E, at least float32
    label: Tensor  # n x E int64, 0 where the element is ignored
    counts: Tensor  # n x E bool, whether the element is not ignored

    def lead(self) -> Tensor:
        """The logit of the true class less the largest other one, `n x E`.

        Above 0 where an element is right; minus infinity where logits are not numbers.
        """
        others = self._others()
        # Of equals `max` gives one the gradient, `amax` each a part; without gradients `amax` is much faster.
        return self._above(others.max(1).values if others.requires_grad else others.amax(1))

    def lead_and_rival(self) -> tuple[Tensor, Tensor]:
        """The same, and the class of that largest other logit, `n x E` int64."""
        best, rival = self._others().max(1)
        return self._above(best), rival

    def _others(self) -> Tensor:
        return self.logits.clone().scatter_(1, self.label[:, None], -torch.inf)

    def _above(self, best: Tensor) -> Tensor:
        lead = self.logits.gather(1, self.label[:, None])[:, 0] - best
        return torch.where(lead.isnan(), -torch.inf, lead)

    def mean(self, values: Tensor) -> Tensor:
        """`n`, the mean of `n x E` values over the elements that are not ignored; 0 where all are."""
        return masked_mean(values, self.counts)


class ElementsTask(Task):
    """Base of tasks with a class for each element. The loss is cross entropy, the mean over a sample's elements.

    A subclass is a frozen dataclass with `ignore_index`, and says where the classes are.
    """

    ignore_index: int

    @abstractmethod
    def classes_first(self, output: Tensor) -> Tensor:
        """The logits as `n x C x ...`, `C` at least 2.

        Raises:
            ConfigurationError: they have no such shape.
        """

    @abstractmethod
    def elements_passed(self, elements: Elements, reserve: Tensor | None = None) -> Tensor:
        """Whether each sample is right, `n` bool, and if a reserve is given, `n`, whether its margin is at least that.

        Without ranking elements, as `elements_margin` must.
        """

    @abstractmethod
    def elements_margin(self, elements: Elements) -> Tensor:
        """The margin of each sample, `n`, differentiable."""

    def labels(self, target: Any, ndim: int) -> Tensor:
        """The true classes, `n x ...` int64, of so many dimensions.

        Raises:
            ConfigurationError: the target is something else.
        """
        if isinstance(target, Tensor) and not target.is_floating_point() and target.ndim > 1:
            return target.long()
        raise ConfigurationError(
            f"`task`: {type(self).__name__} needs whole labels [samples, ...], found {described(target)}.",
            "give a class number for each element, or pass an `adapter` that does.",
        )

    def check(self, output: Tensor, target: Any) -> None:
        """Refuses shapes that do not fit, labels without a logit, and samples of which every element is ignored."""
        logits = self.classes_first(output)
        label = self.labels(target, logits.ndim - 1)
        name = type(self).__name__
        if (len(logits), *logits.shape[2:]) != label.shape:
            raise ConfigurationError(
                f"`task`: {name} got logits {list(output.shape)} for labels {list(label.shape)}.",
                self._shapes_hint(output, label),
            )
        classes, counts = logits.shape[1], label != self.ignore_index
        wrong = counts & ((label < 0) | (label >= classes))
        if wrong.any():
            raise ConfigurationError(
                f"`task`: there is a label {int(label[wrong][0])}, and the model returned {classes} logits an element.",
                f"labels are from 0 to {classes - 1}; set `ignore_index` if that one means no class.",
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
        """What `passed` and `loss` give; the samples are taken apart once, unless a subclass has a rule of its own."""
        own, plain = type(self), ElementsTask
        if (own.passed, own.margin, own.loss) != (plain.passed, plain.margin, plain.loss):
            return super().passed_and_loss(output, target, reserve, with_loss)
        elements = self.elements(output, target)
        return self.elements_passed(elements, reserve), _cross_entropy(elements) if with_loss else None

    def divergence(self, output: Tensor, teacher: Tensor, target: Any = None) -> Tensor:
        """The Kullback-Leibler divergence of the class probabilities from the teacher's, `n`, the mean over elements.

        Those that the target ignores have no part in it.
        """
        each = class_divergence(*(self.classes_first(x).flatten(2) for x in (output, teacher)))
        return each.mean(1) if target is None else self.elements(output, target).mean(each)

    def elements(self, output: Tensor, target: Any) -> Elements:
        """The samples taken apart; shapes that were not checked must fit."""
        label = self.labels(target, output.ndim - 1).flatten(1)
        counts = label != self.ignore_index
        logits = at_least_float32(self.classes_first(output).flatten(2))
        return Elements(logits, label.masked_fill(~counts, 0), counts)

    def _shapes_hint(self, output: Tensor, label: Tensor) -> str:
        return "the model must give logits for each element of the labels; an `adapter` can change these."


def _cross_entropy(elements: Elements) -> Tensor:
    """`n`, the mean over each sample's elements."""
    return elements.mean(F.cross_entropy(elements.logits.contiguous(), elements.label, reduction="none"))
