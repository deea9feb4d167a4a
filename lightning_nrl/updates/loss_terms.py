"""Training loss terms that make negative flips rare, and the `Oversampler`.

The mean of a term over the samples of a batch is added to the training loss. A term compares the
new model's outputs with the old model's outputs, which a teacher provides: `ModelTeacher` or
`PredictedTeacher`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_nrl._utils.checks import check_per_sample
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.registry import Registry
from lightning_nrl.data.adapters import bind_adapter, unpack
from lightning_nrl.data.batch import Adapter, run_model
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    check_kind,
    check_real,
    check_whole,
)
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.logit_cache import EASY_MARGIN, LogitCache
from lightning_nrl.tasks import Task, class_logits, parse_task
from lightning_nrl.updates.old_model import Classes, class_table
from lightning_nrl.updates.predictions import Predictions


@dataclass(frozen=True, eq=False)
class OldAnswers:
    """Outputs of the old model for the n samples of a batch, on the device of the new model's
    output.
    """

    passed: Tensor  # n bool, samples that the old model gets right
    output: Tensor | None = None  # logits, one row per sample; None: unknown
    margin: Tensor | None = None  # n, margins, at least float32; None: unknown
    columns: Tensor | None = (
        None  # int64, new class of each column of `output`; None: column i is class i
    )


class Term(ABC):
    """A term of the training loss. `name` is the name under which its values are logged."""

    name: str

    @abstractmethod
    def __call__(self, task: Task, output: Tensor, target: Any, old: OldAnswers) -> Tensor:
        """Returns a value of at least 0 per sample, in at least float32, differentiable in the new
        model's `output`.
        """


TERMS: Registry[Term] = Registry(
    "term", "term='focal_distillation'", lambda value: isinstance(value, Term)
)
"""Loss terms by name."""


@TERMS.register("focal_distillation")
@dataclass(frozen=True)
class FocalDistillation(Term):
    """Term that pulls the new outputs towards the old outputs, above all where the old model is
    right.

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
        for name in ("weight", "temperature"):
            check_real(name, getattr(self, name), "number above 0", f"write {name}=1.0.", above=0)
        for name in ("base", "focus"):
            check_real(name, getattr(self, name), "number from 0", f"write {name}=1.0.", least=0)
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
        taught = output if old.columns is None else class_logits(output)[:, old.columns]
        if taught.shape != old.output.shape:
            raise ConfigurationError(
                f"`reference`: the old model returned {list(old.output.shape)}, but the new one {list(taught.shape)}.",
                "map the old classes to the new ones: `OldModel(old, classes=...)`.",
            )
        taught, teacher = at_least_float32(taught), at_least_float32(old.output)
        known = teacher.isfinite()[:, None].flatten(1).all(1)
        # Comparing the new output with itself gives the divergence 0 without NaN gradients.
        teacher = torch.where(known.view(-1, *[1] * (teacher.ndim - 1)), teacher, taught.detach())
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
        for name in ("weight", "share"):
            check_real(name, getattr(self, name), "number above 0", f"write {name}=1.0.", above=0)
        real = (
            isinstance(self.most, (int, float))
            and not isinstance(self.most, bool)
            and self.most > 0
        )
        check_kind("most", self.most, real, "number above 0", "most=1.0")

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
        goal = (
            torch.full_like(margin, self.most)
            if old.margin is None
            else (self.share * old.margin).to(margin)
        )
        goal = goal.clamp(max=self.most)
        asked = old.passed & goal.isfinite()
        return self.weight * F.relu(torch.where(asked, goal - margin, torch.zeros_like(margin)))


def parse_terms(term: str | Term | Sequence[str | Term]) -> tuple[Term, ...]:
    """Parses one or several terms. Raises a `ConfigurationError` if there is none, or if two have
    the same name.
    """
    given: list[Any] = list(term) if isinstance(term, (list, tuple)) else [term]
    terms = tuple(TERMS.parse("term", one) for one in given)
    names = [one.name for one in terms]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(
            f"`term` has {len(names)} terms, with the names {names}.",
            "give at least one, each with its own `name`.",
        )
    return terms


OUTPUT_TOLERANCE = (
    0.02  # times the largest output; differences by rounding are smaller in any precision
)
Index = Callable[[Any], Any]
"""Returns the data-set positions of the n samples of a raw batch, as n whole numbers."""
ReferenceTeacher = Callable[[tuple[Any, ...], Mapping[str, Any], Any, Any, Tensor], OldAnswers]
"""Returns the old model's outputs for a batch. The arguments are the args and kwargs of the new
model,
the target, the raw batch, and the new model's logits."""


class ModelTeacher:
    """Runs the old model on a batch, without gradients. The caller sets the model's device and
    evaluation mode.

    `adapter` makes the old model's inputs from a raw batch. If it is None, the old model gets the
    new model's inputs. `index` returns data-set positions, by which outputs are cached in up to 256
    MiB; leave it out for augmented data.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        adapter: Adapter | None = None,
        classes: Classes | None = None,
        index: Index | None = None,
    ) -> None:
        self.model, self.task = model, task
        self.adapter = None if adapter is None else bind_adapter(adapter, model)
        self.classes = class_table(classes, task)
        self.index, self.cache, self._is_checked = index, LogitCache(), False
        held = (x.dtype for x in (*model.parameters(), *model.buffers()) if x.is_floating_point())
        self._dtype = next(held, None)

    @torch.no_grad()
    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, raw: Any, like: Tensor
    ) -> OldAnswers:
        rows = None if self.index is None else rows_of(self.index, raw, len(like))
        # Outputs of two dimensions are not compared in shape, since the models may have different
        # numbers of classes.
        output = (
            None if rows is None else self.cache.get(rows, like.shape if like.ndim > 2 else None)
        )
        if output is None or not self._is_checked:
            known, output = output, self._run(args, kwargs, raw, len(like))
            self._check(known, output)
            if rows is not None and self.index is not None:
                self.cache.put(rows, output)
        if self.classes is None:
            return OldAnswers(
                self.task.right(output, target), output, self.task.margin(output, target)
            )
        output = class_logits(output)
        wide, new, old = _reorder_classes(output, self.classes, class_logits(like).shape[1])
        passed = self.task.passed(wide, target) & output.isfinite().all(1)
        return OldAnswers(passed, output[:, old], self.task.margin(wide, target), new)

    def _check(self, known: Tensor | None, output: Tensor) -> None:
        """Compares cached outputs with new ones when samples first repeat. If they differ, switches
        the cache off.
        """
        if known is None:
            return
        self._is_checked = True
        distance, size = (x.float().abs().nan_to_num().max() for x in (known - output, output))
        if bool(distance > OUTPUT_TOLERANCE * size):
            self.index = None
            problem = (
                "`index`: samples change between epochs, so the old model's outputs are not cached."
            )
            warnings.warn(
                DataWarning(problem, "leave `index` out where samples are augmented."), stacklevel=2
            )

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], raw: Any, n: int) -> Tensor:
        if self.adapter is not None:
            args, kwargs, _ = self.adapter(raw)
        args = tuple(map(self._cast, args))
        kwargs = {name: self._cast(x) for name, x in kwargs.items()}
        try:
            output = self.task.logits(run_model(self.model, args, kwargs))
        except Exception as error:
            raise ConfigurationError(
                f"`reference`: the old model raised {type(error).__name__} on a batch ({error}).",
                "give the old model its own inputs with `OldModel(old, adapter=...)`.",
            ) from error
        if not output.ndim or len(output) != n:
            raise ConfigurationError(
                f"`reference`: the old model returned {list(output.shape)} for a batch of {n} samples.",
                "it must return one row per sample; give it its own inputs with `OldModel(old, adapter=...)`.",
            )
        return output

    def _cast(self, x: Any) -> Any:
        return (
            x.to(self._dtype)
            if self._dtype and isinstance(x, Tensor) and x.is_floating_point()
            else x
        )


class PredictedTeacher:
    """Finds the samples that the old model gets right, by its predictions for one split. Logits
    stay unknown.
    """

    def __init__(self, predictions: Predictions, split: str, task: Task, index: Index) -> None:
        self.task, self.index, self.split = task, index, split
        self.rows = predictions.splits.get(split, {})
        if not self.rows:
            there = ", ".join(f"`{name}`" for name in predictions.splits) or "no split"
            raise ConfigurationError(
                f"`reference` has predictions for {there}, not for `{split}`.", "add these."
            )

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, raw: Any, like: Tensor
    ) -> OldAnswers:
        ids, label = rows_of(self.index, raw, len(like)).tolist(), self.task.label(target)
        missing = [at for at in ids if at not in self.rows]
        found = [self.rows[at] for at in ids if at in self.rows]
        if missing or (label is None and any(right is None for _, right in found)):
            lacks = (
                f"no prediction for the samples {missing[:5]} of"
                if missing
                else "no column `passed` for"
            )
            raise ConfigurationError(
                f"`reference` has {lacks} `{self.split}`.", "give one for each data-set position."
            )
        if label is None:
            passed = torch.tensor([bool(right) for _, right in found])
        else:
            passed = torch.tensor([predicted for predicted, _ in found]) == label.cpu()
        return OldAnswers(passed.to(like.device))


def rows_of(index: Index, raw: Any, n: int) -> Tensor:
    """Returns the `n` positions `index(raw)`, int64. Raises a `ConfigurationError` if `index`
    returns anything else.
    """
    try:
        found = index(raw)
    except Exception as error:
        raise ConfigurationError(
            f"`index` raised {type(error).__name__}: {error}.",
            "it must take a batch of the data loader and return the data-set positions of its samples.",
        ) from error
    return check_per_sample("`index`", found, n, "whole number from 0").long()


def _reorder_classes(
    output: Tensor, table: Mapping[int, int], classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reorders old logits: first the columns of the `classes` new classes, then classes that only
    the
    old model has.

    A class that only the new model has gets -infinity. `table` maps old class numbers to new ones.
    Also returns the new and the old numbers of the classes that both models have.
    """
    pairs = [(new, old) for old, new in table.items() if old < output.shape[1] and new < classes]
    new, old = torch.tensor(pairs, device=output.device).view(-1, 2).unbind(1)
    alone = [i for i in range(output.shape[1]) if i not in {o for _, o in pairs}]
    wide = output.new_full((len(output), classes + len(alone)), -torch.inf)
    wide[:, new] = output[:, old]
    wide[:, classes:] = output[:, alone]
    return wide, new, old


class Oversampler(Sampler[int]):
    """Sampler that draws a hard sample several times per epoch and every other sample once, in
    random
    order.

    A sample is hard if a model, such as the old model, gets it wrong, or if its margin is below 3/8
    of the median margin of the passed samples. The seed determines the orders. Lightning splits
    each epoch among several processes.

    Args:
        passed: `n` bool, True for samples of the data set that the model gets right.
        margin: `n`, the model's margins; NaN where unknown. None: only failed samples are hard.
        oversample: how many times a hard sample is in an epoch, at least 1.
        seed: seed of the orders.

    Attributes:
        times: `n` int64, how often each sample is in an epoch; torch's `WeightedRandomSampler`
            takes it as weights.

    Example::

        DataLoader(train, batch_size=64, sampler=Oversampler.of(old, train, oversample=3))
    """

    def __init__(
        self, passed: Tensor, margin: Tensor | None = None, oversample: int = 3, seed: int = 0
    ) -> None:
        fits = (
            isinstance(passed, Tensor)
            and passed.ndim == 1
            and passed.dtype == torch.bool
            and len(passed) > 0
        )
        check_kind(
            "passed",
            passed,
            fits,
            "tensor with one bool per sample",
            "a bool tensor, or use `Oversampler.of`",
        )
        check_whole("oversample", oversample, 1)
        if margin is not None and margin.shape != passed.shape:
            raise ConfigurationError(
                f"`margin` has the shape {list(margin.shape)}, `passed` {list(passed.shape)}.",
                "give one margin per sample.",
            )
        hard = ~passed.cpu()
        if margin is not None and bool(passed.any()):
            known = margin.cpu().float()
            hard |= known < EASY_MARGIN * known[passed.cpu()].nanmedian()
        self.times = 1 + (oversample - 1) * hard.long()
        self.seed, self.epoch = seed, 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Dataset[Any],
        oversample: int = 3,
        seed: int = 0,
        *,
        task: str | Task | None = None,
        adapter: Adapter = unpack,
        **loader: Any,
    ) -> Oversampler:
        """Builds a sampler from one pass of a model over a data set. Leaves the model and random
        states unchanged.

        Args:
            model: the model that finds hard samples; it runs on its current device in evaluation
                mode.
            data: the training data set, map-style and without augmentation.
            oversample: how many times a hard sample is in an epoch, at least 1.
            seed: seed of the orders.
            task: decides which samples pass; a name or an object of `lightning_nrl.tasks`; None:
                multiclass.
            adapter: converts a raw batch into `(args, kwargs, target)`.
            **loader: arguments of the `DataLoader` that reads the data, such as `num_workers` and
                `collate_fn`.
        """
        check_kind(
            "model",
            model,
            isinstance(model, nn.Module),
            "module",
            "the module itself, its weights loaded",
        )
        evaluator = Evaluator(model, parse_task(task))
        passed, margins = [], []
        with preserve_state(model), torch.no_grad():
            for output, target in evaluator.outputs(
                DataLoader(data, **{"batch_size": 256, **loader}), adapter
            ):
                passed.append(evaluator.task.right(output, target))
                margin = evaluator.task.margin(output, target)
                margins.append(
                    torch.full(passed[-1].shape, torch.nan) if margin is None else margin
                )
        return cls(torch.cat(passed), torch.cat(margins), oversample, seed)

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the next epoch, so that a resumed training does not repeat its first
        epochs' orders.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rows = torch.arange(len(self.times)).repeat_interleave(self.times)
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        self.epoch += 1
        yield from rows[torch.randperm(len(rows), generator=generator)].tolist()

    def __len__(self) -> int:
        return int(self.times.sum())
