"""Which samples each batch of a training holds: the order in which a trainer's data loader draws them, overheard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from lightning_nrl._lightning import Trainer, observing_loaders, set_batch_sampler

__all__ = ["BatchOrder", "OrderObserver", "Positions"]

Positions = NDArray[np.int64]
"""Of the samples of a batch in the data set."""


class BatchOrder:
    """Passes on the batches of a loader's own sampler and keeps the positions of the newest iteration."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self._drawn: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        drawn: list[Any] = []
        self._drawn = drawn
        return self._passed_on(drawn)

    def _passed_on(self, drawn: list[Any]) -> Iterator[Any]:
        for batch in self.own:
            drawn.append(batch)
            yield batch

    def __len__(self) -> int:
        return len(self.own)

    def take(self, number: int) -> Positions | None:
        """Data-set positions of a batch of this iteration, once; None: they are not known."""
        if not 0 <= number < len(self._drawn):
            return None
        batch, self._drawn[number] = self._drawn[number], None
        try:
            return np.array(batch, dtype=np.int64)  # a fifth of the time that a tensor takes
        except (TypeError, ValueError, OverflowError):
            return None


class OrderObserver:
    """Overhears the order of a trainer's training data; the loader has its own sampler whenever others look at it.

    A data loader takes its sampler when an iteration begins, so that it has another one only then: at the first epoch
    from `begin` to `on_train_start`, which says that training begins, later from `on_epoch_start` to
    `on_batch_start`.
    """

    def __init__(self) -> None:
        self._orders: dict[int, tuple[DataLoader[Any], BatchOrder]] = {}
        self._end: Callable[[], None] | None = None
        self._loader: DataLoader[Any] | None = None
        self._offset: int | None = None
        self._resumed = False

    def begin(self, trainer: Trainer) -> None:
        """Before data loaders are made."""
        self.close()
        self._end = observing_loaders(trainer, self._install)

    def on_train_start(self, trainer: Trainer) -> None:
        """The first iteration has begun."""
        self._release()
        self._loader = trainer.train_dataloader if isinstance(trainer.train_dataloader, DataLoader) else None
        self._offset, self._resumed = None, trainer.ckpt_path is not None

    def on_epoch_start(self, trainer: Trainer) -> None:
        """An iteration may begin; the trainer may have made its loader anew."""
        self._loader = trainer.train_dataloader if isinstance(trainer.train_dataloader, DataLoader) else None
        if self._loader is not None:
            self._install(self._loader)
        self._offset = None

    def on_batch_start(self, batch_idx: int) -> Positions | None:
        """Positions of the samples of the batch that is trained on next, None where they cannot be known."""
        if self._offset is None:
            self._release()
            # An epoch that is resumed half way counts on, while its data begin anew.
            self._offset, self._resumed = batch_idx if self._resumed else 0, False
        found = self._orders.get(id(self._loader))
        return None if found is None else found[1].take(batch_idx - self._offset)

    def close(self) -> None:
        """Leaves all as found."""
        self._release()
        self._orders, self._loader, self._offset = {}, None, None

    def why_not(self) -> str:
        """Why the order cannot be overheard, in words; empty where it can."""
        loader = self._loader
        if loader is None:
            return "the training data are no single DataLoader"
        if type(loader).__iter__ is not DataLoader.__iter__:
            return f"{type(loader).__name__} draws its samples in a way of its own"
        if not getattr(loader, "in_order", True):
            return "its DataLoader gives batches in another order than drawn (`in_order=False`)"
        if id(loader) not in self._orders:
            return "its DataLoader was iterated before"
        return ""

    def _install(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.batch_sampler, BatchOrder) or loader.batch_sampler is None:
            return
        # Workers that outlive an epoch keep the sampler that they began with.
        known = self._orders.get(id(loader))
        order = BatchOrder(loader.batch_sampler) if known is None else known[1]
        self._orders[id(loader)] = (loader, order)
        set_batch_sampler(loader, order)

    def _release(self) -> None:
        if self._end is not None:
            self._end()
            self._end = None
        for loader, order in self._orders.values():
            if loader.batch_sampler is order:
                set_batch_sampler(loader, order.own)
