"""`Oversampler`, which draws samples that a model finds hard several times per epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_nrl._utils.preserve import preserve_state, shuffled
from lightning_nrl.data.adapters import unpack
from lightning_nrl.data.batch import Adapter
from lightning_nrl.errors import (
    ConfigurationError,
    check_kind,
    check_whole,
)
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.methods.solvers.distill import EASY_MARGIN
from lightning_nrl.tasks import Task, parse_task


class Oversampler(Sampler[int]):
    """Sampler that draws hard samples several times per epoch and other samples once, at random.

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
        is_mask = isinstance(passed, Tensor) and passed.ndim == 1 and passed.dtype == torch.bool
        example = "a bool tensor, or use `Oversampler.of`"
        check_kind("passed", passed, is_mask, "tensor with one bool per sample", example)
        check_whole("oversample", oversample, 1)
        if margin is not None and margin.shape != passed.shape:
            raise ConfigurationError(
                f"`margin` has the shape {list(margin.shape)}, `passed` {list(passed.shape)}.",
                "give one margin per sample.",
            )
        hard = ~passed.cpu()
        if margin is not None:
            margin = margin.cpu().float()
            # Without a passed sample, the median is NaN and no comparison true.
            hard |= margin < EASY_MARGIN * margin[~hard].nanmedian()
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
        """Builds a sampler from one pass of a model over a data set.

        The model and random states do not change.

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
        example = "the module itself, its weights loaded"
        check_kind("model", model, isinstance(model, nn.Module), "module", example)
        task = parse_task(task)
        batches = DataLoader(data, **{"batch_size": 256, **loader})
        rights, margins = [], []
        with preserve_state(model), torch.no_grad():
            for output, target in Evaluator(model, task).outputs(batches, adapter):
                right, margin = task.right(output, target), task.margin(output, target)
                if margin is None:
                    margin = torch.full(right.shape, torch.nan)
                rights.append(right)
                margins.append(margin)
        return cls(torch.cat(rights), torch.cat(margins), oversample, seed)

    def set_epoch(self, epoch: int) -> None:
        """Sets the next epoch's number, so that a resumed training repeats no earlier order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rows = torch.arange(len(self.times)).repeat_interleave(self.times)
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        self.epoch += 1
        yield from shuffled(rows, generator).tolist()

    def __len__(self) -> int:
        return int(self.times.sum())
