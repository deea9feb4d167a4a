"""Terms of a training loss that hold a new model to what the replaced one gets right.

A term is a number for each sample, from what the new model and the replaced one make of it. Its mean over a batch is
added to the loss of the training.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import ConfigurationError, check_kind, check_real
from lightning_nrl.tasks import Task

__all__ = ["TERMS", "FocalDistillation", "MarginHinge", "OldAnswers", "Term", "parse_terms"]


@dataclass(frozen=True, eq=False)
class OldAnswers:
    """What the replaced model makes of the `n` samples of a batch, on the device of the new model's output.

    It gets right those of `passed`, `n` bool. Its logits (`output`, first dimension `n`) and its margins, `n`, at least
    float32, are None where they are not known. For `output` with fewer classes than the new model has, `columns` says
    which of the new model's these are, int64.
    """

    passed: Tensor
    output: Tensor | None = None
    margin: Tensor | None = None
    columns: Tensor | None = None


class Term(ABC):
    """Is added to a training loss.

    Attributes:
        name: what its curve is called.
    """

    name: str

    @abstractmethod
    def __call__(self, task: Task, output: Tensor, target: Any, old: OldAnswers) -> Tensor:
        """`n`, at least float32, not below 0, differentiable in the output.

        Args:
            task: what passed means.
            output: logits of the new model, first dimension `n`.
            target: the truth.
            old: what the replaced model makes of the same samples.

        Raises:
            ConfigurationError: the task or the replaced model does not give what the term needs.
        """


TERMS: Registry[Term] = Registry("term", "term='focal_distillation'", lambda value: isinstance(value, Term))
"""The terms that can be named."""


@TERMS.register("focal_distillation")
@dataclass(frozen=True)
class FocalDistillation(Term):
    """Distils the replaced model, most of all where it is right (Yan et al. 2021, Positive-Congruent Training).

    `weight * (base + focus * 1[old right]) * T^2 * divergence(output / T, old output / T)`, with the divergence of the
    task: Kullback-Leibler for `Multiclass`. T^2 keeps the size of gradients when T is changed (Hinton et al. 2015).
    By default only what the old model gets right is taught; with `focus=0` it is ordinary distillation, which teaches
    its errors too. Samples on which the old output is not finite are left out.

    Attributes:
        weight: of the whole term; above 0.
        base: weight of every sample (alpha in the paper); at least 0.
        focus: weight that a sample has beyond that if the old model gets it right (beta); at least 0.
        temperature: T; above 0. The higher, the more the term is about all logits and the less about the top ones.

    Raises:
        ConfigurationError: on construction, for numbers outside these ranges.
    """

    weight: float = 1.0
    base: float = 0.0
    focus: float = 1.0
    temperature: float = 1.0
    name: str = "focal_distillation"

    def __post_init__(self) -> None:
        _check_numbers(self, above=("weight", "temperature"), least=("base", "focus"))
        if self.base + self.focus == 0:
            raise ConfigurationError("`base=0` and `focus=0`: the term is always 0.", "give one a number above 0.")

    def __call__(self, task: Task, output: Tensor, target: Any, old: OldAnswers) -> Tensor:
        if old.output is None:
            raise ConfigurationError(
                "`reference`: predictions alone cannot be distilled, which takes the old model's logits.",
                "give the model or its checkpoint, or use `term=MarginHinge(most=1.0)`.",
            )
        taught = output if old.columns is None else output[:, old.columns]
        if taught.shape != old.output.shape:
            raise ConfigurationError(
                f"`reference`: the old model returned {list(old.output.shape)}, the new one {list(taught.shape)}.",
                "say which old class is which new one: `OldModel(old, classes=...)`.",
            )
        taught, teacher = at_least_float32(taught), at_least_float32(old.output)
        known = teacher.isfinite()[:, None].flatten(1).all(1)
        # In place of what is not finite the new output itself, from which nothing is to be learnt.
        teacher = torch.where(known.view(-1, *[1] * (teacher.ndim - 1)), teacher, taught.detach())
        apart = task.divergence(taught / self.temperature, teacher / self.temperature, target)
        focal = self.base + self.focus * old.passed.to(apart)
        return self.weight * self.temperature**2 * focal * apart * known


@TERMS.register("margin_hinge")
@dataclass(frozen=True)
class MarginHinge(Term):
    """Asks for a part of the margin that the replaced model had, on samples that it gets right.

    `weight * relu(goal - margin)` with `goal = min(share * old margin, most)`, the goals of a polish
    (`lightning_nrl._optim.polish`): below 0 no loss is made by being surer than that. Where only predictions of the
    old model are known the goal is `most`.

    Attributes:
        weight: of the whole term; above 0.
        share: the part of the old margin that is asked for; above 0.
        most: no goal is above this margin, in the unit of the task's margins (logits); above 0.

    Raises:
        ConfigurationError: on construction, for numbers outside these ranges.
    """

    weight: float = 1.0
    share: float = 0.5
    most: float = math.inf
    name: str = "margin_hinge"

    def __post_init__(self) -> None:
        _check_numbers(self, above=("weight", "share"))
        real = isinstance(self.most, (int, float)) and not isinstance(self.most, bool) and self.most > 0
        check_kind("most", self.most, real, "number above 0", "most=1.0")

    def __call__(self, task: Task, output: Tensor, target: Any, old: OldAnswers) -> Tensor:
        margin = task.margin(output, target)
        if margin is None:
            raise ConfigurationError(
                f"`term`: {type(task).__name__} has no margins.",
                "use `FocalDistillation()`, or a `task` whose `margin` gives a number.",
            )
        if old.margin is None and math.isinf(self.most):
            raise ConfigurationError(
                "`reference`: predictions alone do not say what margin is to be kept.",
                "name it, `term=MarginHinge(most=1.0)`, or give the model or its checkpoint.",
            )
        goal = torch.full_like(margin, self.most) if old.margin is None else (self.share * old.margin).to(margin)
        goal = goal.clamp(max=self.most)
        asked = old.passed & goal.isfinite()
        return self.weight * F.relu(torch.where(asked, goal - margin, torch.zeros_like(margin)))


def parse_terms(term: str | Term | Sequence[str | Term]) -> tuple[Term, ...]:
    """Terms from names, terms, or several; a `ConfigurationError` for none, two of one name, or something else."""
    given: list[Any] = list(term) if isinstance(term, (list, tuple)) else [term]
    terms = tuple(TERMS.parse("term", one) for one in given)
    names = [one.name for one in terms]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(
            f"`term`: {len(names)} terms, named {names}.", "give at least one, each with a `name` of its own."
        )
    return terms


def _check_numbers(term: Any, above: Sequence[str], least: Sequence[str] = ()) -> None:
    for name in above:
        check_real(name, getattr(term, name), "number above 0", f"write {name}=1.0.", above=0)
    for name in least:
        check_real(name, getattr(term, name), "number from 0", f"write {name}=1.0.", least=0)
