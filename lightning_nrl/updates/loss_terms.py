"""Training loss terms that make negative flips rare.

The mean of a term over the samples of a batch is added to the training loss. A term compares the
new model's outputs with the old model's outputs, which a teacher provides: `ModelTeacher` or
`PredictedTeacher`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._utils.checks import check_per_sample
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.registry import Registry
from lightning_nrl.data.adapters import bind_adapter
from lightning_nrl.data.batch import Adapter, Args, Kwargs, run_model
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    check_real,
)
from lightning_nrl.methods.solvers.logit_cache import LogitCache
from lightning_nrl.tasks import Task, class_logits
from lightning_nrl.updates.old_model import Classes, class_table
from lightning_nrl.updates.predictions import Predictions


@dataclass(frozen=True, eq=False)
class OldAnswers:
    """Outputs of the old model for the n samples of a batch, on the new output's device."""

    passed: Tensor  # n bool, samples that the old model gets right
    output: Tensor | None = None  # logits, one row per sample; None: unknown
    margin: Tensor | None = None  # n, margins, at least float32; None: unknown
    # int64, new class of each column of `output`; None: column i is class i
    columns: Tensor | None = None


class Term(ABC):
    """A term of the training loss. `name` is the name under which its values are logged."""

    name: str

    @abstractmethod
    def __call__(self, task: Task, output: Tensor, target: Any, old: OldAnswers) -> Tensor:
        """Returns a value of at least 0 per sample, in at least float32.

        The values are differentiable in the new model's `output`.
        """


TERMS: Registry[Term] = Registry(
    "term", "term='focal_distillation'", lambda value: isinstance(value, Term)
)
"""Loss terms by name."""


@TERMS.register("focal_distillation")
@dataclass(frozen=True)
class FocalDistillation(Term):
    """Term that pulls the new outputs to the old outputs, above all where the old model is right.

    It is `weight * (base + focus * 1[old right]) * T^2 * divergence(output / T, old output / T)`
    (Yan et al. 2021, Positive-Congruent Training). The task defines the divergence; for
    `Multiclass` it is that of Kullback and Leibler. The factor T^2 makes the size of the gradients
    independent of T (Hinton et al. 2015). With `base=0` the term is 0 where the old model is wrong;
    with `focus=0` it treats all samples alike. It is 0 if the old output is not finite.

    Attributes:
        weight: weight of the whole term, above 0.
        base: weight of every sample (alpha in the paper), at least 0.
        focus: additional weight of samples that the old model gets right (beta in the paper), at
            least 0.
        temperature: T, above 0. At a high temperature all logits count; at a low one, mainly the
            largest logit counts.
    """

    weight: float = 1.0
    base: float = 0.0
    focus: float = 1.0
    temperature: float = 1.0
    name: str = "focal_distillation"

    def __post_init__(self) -> None:
        _check_above_0("weight", self.weight)
        _check_above_0("temperature", self.temperature)
        check_real("base", self.base, "number from 0", "write base=1.0.", least=0)
        check_real("focus", self.focus, "number from 0", "write focus=1.0.", least=0)
        if self.base + self.focus == 0:
            raise ConfigurationError(
                "`base=0` and `focus=0`: the term is always 0.", "give one a number above 0."
            )

    def __call__(self, task: Task, output: Tensor, target: Any, old: OldAnswers) -> Tensor:
        if old.output is None:
            raise ConfigurationError(
                "`reference`: distillation needs the old model's logits, not just its predictions.",
                "give the model or its checkpoint, or use `term=MarginHinge(most=1.0)`.",
            )
        taught = class_logits(output)[:, old.columns] if old.columns is not None else output
        if taught.shape != old.output.shape:
            raise ConfigurationError(
                f"`reference`: the old model returned {list(old.output.shape)}, "
                f"but the new one {list(taught.shape)}.",
                "map the old classes to the new ones: `OldModel(old, classes=...)`.",
            )
        taught, teacher = at_least_float32(taught), at_least_float32(old.output)
        is_finite = teacher.isfinite()
        known = is_finite[:, None].flatten(1).all(1)
        # Comparing the new output with itself gives no NaN gradients.
        teacher = torch.where(is_finite, teacher, taught.detach())
        distance = task.divergence(taught / self.temperature, teacher / self.temperature, target)
        focal = self.base + self.focus * old.passed.to(distance)
        return self.weight * self.temperature**2 * focal * distance * known


@TERMS.register("margin_hinge")
@dataclass(frozen=True)
class MarginHinge(Term):
    """Term that keeps a share of the old model's margin on samples that the old model gets right.

    It is `weight * relu(goal - margin)`, where `goal = min(share * old margin, most)`. It is 0
    where the old model is wrong. If the old model's predictions are known, but not its logits, the
    goal is `most`, which must be finite then.

    Attributes:
        weight: weight of the whole term, above 0.
        share: share of the old margin to keep, above 0.
        most: upper limit of the goal, in the unit of the task's margins (logits), above 0.
    """

    weight: float = 1.0
    share: float = 0.5
    most: float = math.inf
    name: str = "margin_hinge"

    def __post_init__(self) -> None:
        _check_above_0("weight", self.weight)
        _check_above_0("share", self.share)
        if self.most != math.inf:  # the default: no upper limit
            check_real("most", self.most, "number above 0", "write most=1.0.", above=0)

    def __call__(self, task: Task, output: Tensor, target: Any, old: OldAnswers) -> Tensor:
        margin = task.margin(output, target)
        if margin is None:
            raise ConfigurationError(
                f"`term`: {type(task).__name__} has no margins.",
                "use `FocalDistillation()`, or a `task` with a `margin`.",
            )
        if old.margin is None and math.isinf(self.most):
            raise ConfigurationError(
                "`reference`: predictions have no margin to keep.",
                "set one, `term=MarginHinge(most=1.0)`, or give the model or its checkpoint.",
            )
        goal = torch.full_like(margin, self.most)
        if old.margin is not None:
            goal = (self.share * old.margin).to(margin).clamp(max=self.most)
        has_goal = old.passed & goal.isfinite()
        return self.weight * F.relu(torch.where(has_goal, goal - margin, 0.0))


def _check_above_0(argument: str, value: float) -> None:
    check_real(argument, value, "number above 0", f"write {argument}=1.0.", above=0)


def parse_terms(term: str | Term | Sequence[str | Term]) -> tuple[Term, ...]:
    """Parses one or several terms.

    Raises:
        ConfigurationError: there is no term, or two terms have the same name.
    """
    if isinstance(term, (str, Term)) or not isinstance(term, Sequence):
        term = [term]
    terms = tuple(TERMS.parse("term", part) for part in term)
    names = [part.name for part in terms]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(
            f"`term` has {len(names)} terms, with the names {names}.",
            "give at least one, each with its own `name`.",
        )
    return terms


OUTPUT_TOLERANCE = 0.02
"""Times the largest output. Differences by rounding are smaller in any precision."""
Index = Callable[[Any], object]
"""Returns the data-set positions of the n samples of a raw batch, as n whole numbers."""
ReferenceTeacher = Callable[[Args, Kwargs, object, object, Tensor], OldAnswers]
"""Returns the old model's outputs for a batch. The arguments are the args and kwargs of the new
model, the target, the raw batch, and the new model's logits.
"""


class ModelTeacher:
    """Runs the old model on a batch, without gradients.

    The caller sets the model's device and evaluation mode. `adapter` makes the old model's inputs
    from a raw batch. If it is None, the old model gets the new model's inputs. `index` returns
    data-set positions, by which outputs are cached in up to 256 MiB; leave it out for augmented
    data.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        adapter: Adapter | None = None,
        classes: Classes | None = None,
        index: Index | None = None,
    ) -> None:
        self.model, self.task, self.index = model, task, index
        self.adapter = None if adapter is None else bind_adapter(adapter, model)
        self.classes = class_table(classes, task)
        self.cache, self._is_checked = LogitCache(), False
        tensors = (*model.parameters(), *model.buffers())
        self._dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)

    @torch.no_grad()
    def __call__(
        self, args: Args, kwargs: Kwargs, target: object, raw: object, like: Tensor
    ) -> OldAnswers:
        output = self._output(args, kwargs, raw, like)
        if self.classes is None:
            right, margin = self.task.right(output, target), self.task.margin(output, target)
            return OldAnswers(right, output, margin)
        output = class_logits(output)
        wide, new, old = _reorder_classes(output, self.classes, class_logits(like).shape[1])
        passed = self.task.passed(wide, target) & output.isfinite().all(1)
        return OldAnswers(passed, output[:, old], self.task.margin(wide, target), new)

    def _output(self, args: Args, kwargs: Kwargs, raw: object, like: Tensor) -> Tensor:
        """Returns outputs from the cache if they are known, else runs the old model."""
        n = len(like)
        if self.index is None:
            return self._run(args, kwargs, raw, n)
        rows = rows_of(self.index, raw, n)
        # Outputs of two dimensions are not compared in shape, since the models may have different
        # numbers of classes.
        shape = like.shape if like.ndim > 2 else None
        cached = self.cache.get(rows, shape)
        if cached is not None and self._is_checked:
            return cached
        output = self._run(args, kwargs, raw, n)
        if cached is not None:
            self._check_repeated(cached, output)
        if self.index is not None:
            self.cache.put(rows, output)
        return output

    def _check_repeated(self, cached: Tensor, output: Tensor) -> None:
        """Switches the cache off if samples that repeat have other outputs than before."""
        self._is_checked = True
        distance = (cached - output).float().abs().nan_to_num().max()
        if distance > OUTPUT_TOLERANCE * output.float().abs().nan_to_num().max():
            self.index = None
            problem = (
                "`index`: samples change between epochs, so the old model's outputs are not cached."
            )
            hint = "leave `index` out where samples are augmented."
            warnings.warn(DataWarning(problem, hint), stacklevel=2)

    def _run(self, args: Args, kwargs: Kwargs, raw: object, n: int) -> Tensor:
        if self.adapter is not None:
            args, kwargs, _ = self.adapter(raw)
        args = tuple(self._cast(value) for value in args)
        kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        try:
            output = self.task.logits(run_model(self.model, args, kwargs))
        except Exception as error:
            raise ConfigurationError(
                f"`reference`: the old model raised {type(error).__name__} on a batch ({error}).",
                "give the old model its own inputs with `OldModel(old, adapter=...)`.",
            ) from error
        if output.shape[:1] != (n,):
            raise ConfigurationError(
                f"`reference`: the old model returned {list(output.shape)} for a batch of {n} "
                "samples.",
                "it must return one row per sample; "
                "give it its own inputs with `OldModel(old, adapter=...)`.",
            )
        return output

    def _cast(self, value: object) -> object:
        if self._dtype and isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self._dtype)
        return value


class PredictedTeacher:
    """Finds the training samples that the old model gets right, by its predictions for `train`.

    Logits stay unknown.
    """

    def __init__(self, predictions: Predictions, task: Task, index: Index) -> None:
        self.task, self.index = task, index
        self.rows = predictions.splits.get("train", {})
        if not self.rows:
            raise ConfigurationError(
                f"`reference` has predictions for {predictions.listed_splits}, not for `train`.",
                "add these.",
            )

    def __call__(
        self, args: Args, kwargs: Kwargs, target: object, raw: object, like: Tensor
    ) -> OldAnswers:
        ids = rows_of(self.index, raw, len(like)).tolist()
        missing = [at for at in ids if at not in self.rows]
        if missing:
            raise ConfigurationError(
                f"`reference` has no prediction for the samples {missing[:5]} of `train`.",
                "give one for each data-set position.",
            )
        predicted, passed = zip(*[self.rows[at] for at in ids], strict=True)
        label = self.task.label(target)
        if label is not None:
            right = torch.tensor(predicted) == label.cpu()
        elif None in passed:
            raise ConfigurationError(
                "`reference` has no column `passed` for `train`.", "add one, 1 or 0."
            )
        else:
            right = torch.tensor(passed)
        return OldAnswers(right.to(like.device))


def rows_of(index: Index, raw: object, n: int) -> Tensor:
    """Returns the `n` positions `index(raw)`, int64.

    Raises:
        ConfigurationError: `index` returns anything else.
    """
    try:
        rows = index(raw)
    except Exception as error:
        raise ConfigurationError(
            f"`index` raised {type(error).__name__}: {error}.",
            "it must take a batch of the data loader and return the data-set positions of its "
            "samples.",
        ) from error
    return check_per_sample("`index`", rows, n, "whole number from 0").long()


def _reorder_classes(
    output: Tensor, table: Mapping[int, int], n_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reorders old logits: first the new classes, then the classes that only the old model has.

    A class that only the new model has gets -infinity. `table` maps old class numbers to new ones.
    Also returns the new and the old numbers of the classes that both models have.
    """
    n_old = output.shape[1]
    shared = [(new, old) for old, new in table.items() if old < n_old and new < n_classes]
    new, old = torch.tensor(shared, device=output.device).view(-1, 2).unbind(1)
    only_old = sorted(set(range(n_old)) - set(old.tolist()))
    wide = output.new_full((len(output), n_classes + len(only_old)), -torch.inf)
    wide[:, new] = output[:, old]
    wide[:, n_classes:] = output[:, only_old]
    return wide, new, old
