"""Training on what is hard more often: failed samples, and those near the border between right and wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_nrl._utils.preserve import preserve
from lightning_nrl.data.adapters import unpack
from lightning_nrl.data.batch import Adapter
from lightning_nrl.errors import ConfigurationError, check_kind, check_whole
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.logit_cache import EASY_MARGIN
from lightning_nrl.tasks import Task, parse_task


class Oversampler(Sampler[int]):
    """Every sample once an epoch in random order, those that a model fails or gets right by a narrow margin more often.

    Narrow is a margin below 3/8 of the median margin of passed samples, as in a repair's own fit. The model is the one
    that is to be replaced, or any earlier one. Epochs are the same for a seed; with several processes Lightning gives
    each a share of them, as it does for any sampler.

    Args:
        passed: `n` bool, which samples of the data set the model gets right.
        margin: `n`, how far each is from being wrong; NaN where that is not known. None: only failed ones are seen more
            often.
        oversample: how many times an epoch sees a failed or near-border sample, from 1.
        seed: of the orders.

    Attributes:
        times: `n` int64, how often an epoch has each sample; also the weights for torch's `WeightedRandomSampler`.

    Example::

        DataLoader(train, batch_size=64, sampler=Oversampler.of(old, train, oversample=3))
    """

    def __init__(self, passed: Tensor, margin: Tensor | None = None, oversample: int = 3, seed: int = 0) -> None:
        fits = isinstance(passed, Tensor) and passed.ndim == 1 and passed.dtype == torch.bool and len(passed) > 0
        check_kind("passed", passed, fits, "tensor of one bool a sample", "a bool tensor, or use `Oversampler.of`")
        check_whole("oversample", oversample, 1)
        if margin is not None and margin.shape != passed.shape:
            raise ConfigurationError(
                f"`margin` has the shape {list(margin.shape)}, `passed` {list(passed.shape)}.",
                "give one margin a sample.",
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
        """One for a data set, from one pass of a model over it. The model and the random state are left as found.

        Args:
            model: is run where it is, in evaluation mode.
            data: with a length and an index: that which is trained on, in its order, without augmentation.
            oversample: as above.
            seed: as above.
            task: what passed means, a name or an object of `lightning_nrl.tasks`; None: multiclass classification.
            adapter: takes a batch apart.
            **loader: arguments of the `DataLoader` that reads it, such as `num_workers` and `collate_fn`.
        """
        check_kind("model", model, isinstance(model, nn.Module), "module", "the module itself, its weights loaded")
        evaluator = Evaluator(model, parse_task(task))
        passed, margins = [], []
        with preserve(model), torch.no_grad():
            for output, target in evaluator.outputs(DataLoader(data, **{"batch_size": 256, **loader}), adapter):
                passed.append(evaluator.task.right(output, target))
                margin = evaluator.task.margin(output, target)
                margins.append(torch.full(passed[-1].shape, torch.nan) if margin is None else margin)
        return cls(torch.cat(passed), torch.cat(margins), oversample, seed)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next, so that a resumed training goes on with other orders than it began with."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rows = torch.arange(len(self.times)).repeat_interleave(self.times)
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        self.epoch += 1
        yield from rows[torch.randperm(len(rows), generator=generator)].tolist()

    def __len__(self) -> int:
        return int(self.times.sum())
