"""What the replaced model says of a training batch: asked each time, or remembered sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._optim.logit_cache import LogitCache
from lightning_nrl._utils.checks import check_per_sample
from lightning_nrl.data.adapters import bind_adapter
from lightning_nrl.data.batch import Adapter, run_model
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.reference.loss_terms import OldAnswers
from lightning_nrl.reference.old_model import Classes, table_for
from lightning_nrl.reference.predictions import Predictions
from lightning_nrl.tasks import Task

__all__ = ["ModelTeacher", "PredictedTeacher", "ReferenceTeacher"]

OUTPUT_TOLERANCE = 0.02
"""Outputs of the same samples differ by less than this part of the largest one, in any precision and batch size."""
Index = Callable[[Any], Any]
"""The data-set positions of the samples of a raw batch, `n` whole numbers."""


class ReferenceTeacher:
    """Says what the replaced model makes of a batch."""

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, raw: Any, like: Tensor
    ) -> OldAnswers:
        """The answers for the `n` samples of a batch: what the new model was called with, the truth, the raw batch.

        `like` are the new model's logits, first dimension `n`.
        """
        raise NotImplementedError


class ModelTeacher(ReferenceTeacher):
    """Runs the replaced model, on the device of the new one, in evaluation mode and without gradients.

    Args:
        adapter: takes a raw batch apart for it; None: it gets the inputs that the new model got.
        classes: which of its classes are which of the new model (see `lightning_nrl.OldModel`).
        index: where samples are always the same, which ones a raw batch has: each is asked about once, as long as there
            is room (256 MiB). None: every batch is asked about.
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
        self.classes = table_for(task, classes)
        self.index, self.cache, self._is_checked = index, LogitCache(), False
        held = next((x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()), None)
        self._dtype = None if held is None else held.dtype

    @torch.no_grad()
    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, raw: Any, like: Tensor
    ) -> OldAnswers:
        rows = None if self.index is None else rows_of(self.index, raw, len(like))
        # Of two dimensions the second counts classes, which may be others than those of the new model.
        output = None if rows is None else self.cache.get(rows, like.shape if like.ndim > 2 else None)
        if output is None or not self._is_checked:
            known, output = output, self._run(args, kwargs, raw, len(like))
            self._check(known, output)
            if rows is not None and self.index is not None:
                self.cache.put(rows, output)
        if self.classes is None:
            return OldAnswers(self.task.right(output, target), output, self.task.margin(output, target))
        wide, new, old = _relaid(output, self.classes, like.shape[1])
        passed = self.task.passed(wide, target) & output.isfinite().all(1)
        return OldAnswers(passed, output[:, old], self.task.margin(wide, target), new)

    def _check(self, known: Tensor | None, output: Tensor) -> None:
        """The first samples that come back are asked about twice, to see whether they are still the same."""
        if known is None:
            return
        self._is_checked = True
        apart, size = (known.float() - output.float()).abs().nan_to_num().max(), output.float().abs().nan_to_num().max()
        if bool(apart > OUTPUT_TOLERANCE * size):
            self.index = None
            warnings.warn(
                DataWarning(
                    "`index`: samples come back changed, so what the old model said of them is not remembered.",
                    "leave `index` out where samples are augmented.",
                ),
                stacklevel=2,
            )

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], raw: Any, n: int) -> Tensor:
        if self.adapter is not None:
            args, kwargs, _ = self.adapter(raw)
        cast = self._dtype
        args, kwargs = tuple(_cast(x, cast) for x in args), {name: _cast(x, cast) for name, x in kwargs.items()}
        try:
            output = self.task.logits(run_model(self.model, args, kwargs))
        except Exception as error:
            raise ConfigurationError(
                f"`reference`: the old model raised {type(error).__name__} on a batch ({error}).",
                "give it inputs of its own with `OldModel(old, adapter=...)`.",
            ) from error
        if not output.ndim or len(output) != n:
            raise ConfigurationError(
                f"`reference`: the old model returned {list(output.shape)} for a batch of {n} samples.",
                "it must count the same samples; give it inputs of its own with `OldModel(old, adapter=...)`.",
            )
        return output


class PredictedTeacher(ReferenceTeacher):
    """Knows from a file, of one split, which samples the replaced model gets right, and nothing else."""

    def __init__(self, predictions: Predictions, split: str, task: Task, index: Index) -> None:
        rows = predictions.splits.get(split, {})
        if not rows:
            there = ", ".join(f"`{name}`" for name in predictions.splits) or "none at all"
            raise ConfigurationError(
                f"`reference`: no predictions of `{split}`; there are those of {there}.", "add them."
            )
        self.task, self.index, self.split = task, index, split
        ids, said = torch.tensor(list(rows)), [prediction for prediction, _ in rows.values()]
        right = [-1 if passed is None else int(passed) for _, passed in rows.values()]
        self.table = torch.full((int(ids.max()) + 1, 3), -1)
        self.table[ids] = torch.tensor([said, right, [1] * len(said)]).T

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, raw: Any, like: Tensor
    ) -> OldAnswers:
        rows = rows_of(self.index, raw, len(like)).to(self.table.device)
        inside = rows < len(self.table)
        said, right, there = self.table[rows.clamp(max=len(self.table) - 1)].unbind(1)
        missing = rows[~inside | (there < 0)].tolist()
        label = self.task.label(target)
        if missing or (label is None and bool((right < 0).any())):
            found = f"no prediction for the samples {missing[:5]} of" if missing else "no column `passed` for"
            raise ConfigurationError(f"`reference`: {found} `{self.split}`.", "give one for each data-set position.")
        passed = right.bool() if label is None else said == label.to(said.device)
        return OldAnswers(passed.to(like.device))


def rows_of(index: Index, raw: Any, n: int) -> Tensor:
    """The positions that a function gives for a raw batch, `n` int64; a `ConfigurationError` for anything else."""
    try:
        found = index(raw)
    except Exception as error:
        raise ConfigurationError(
            f"`index` raised {type(error).__name__}: {error}.",
            "it is called with a batch as the data loader gives it, and returns data-set positions.",
        ) from error
    return check_per_sample("`index`", found, n, "whole number from 0").long()


def _relaid(output: Tensor, table: Mapping[int, int], classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Old logits in the new order of classes, those that only the old model has behind them; and the pairs of classes.

    Classes that only the new model has are impossible for the old one.
    """
    pairs = [(new, old) for old, new in table.items() if old < output.shape[1] and new < classes]
    new, old = torch.tensor(pairs, device=output.device).view(-1, 2).unbind(1)
    alone = [i for i in range(output.shape[1]) if i not in {o for _, o in pairs}]
    wide = output.new_full((len(output), classes + len(alone)), -torch.inf)
    wide[:, new] = output[:, old]
    wide[:, classes:] = output[:, alone]
    return wide, new, old


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x
