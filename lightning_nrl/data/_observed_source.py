"""A source that is handed on as it is, while something is noted of its batches in passing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.data.batch import Batch, Source

__all__ = ["ObservedSource"]


class ObservedSource:
    """Everything of another source; subclasses say what they note of a batch.

    Args:
        source: whose batches are handed on.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.split, self.passed, self.failed = source.split, source.passed, source.failed
        self.index, self.positions = source.index, source.positions
        self._rows: list[Tensor] = []
        self.begin()

    def __iter__(self) -> Iterator[Batch]:
        self.begin()
        for batch in self.source:
            self.observe(batch)
            self._rows.append(batch.position)
            yield batch

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Chosen samples, of which nothing is noted."""
        return self.source.draw(batches)

    def begin(self) -> None:
        """Is called when a pass begins: what was noted of an earlier one is forgotten."""
        self._rows = []

    def observe(self, batch: Batch) -> None:
        """Notes what matters of a batch; batches come in order."""
        raise NotImplementedError

    def in_order(self, noted: Sequence[Tensor], empty: Tensor, collective: Collective) -> Tensor:
        """What was noted of all ranks' samples, on the CPU, in the order of the source.

        Args:
            noted: a tensor for each batch of the last pass, one row a sample.
            empty: no rows, for a rank without batches.
            collective: the ranks that share the source.
        """
        mine = torch.cat(list(noted)).cpu() if noted else empty
        position = torch.cat(self._rows) if self._rows else torch.zeros(0, dtype=torch.int64)
        values, order = (torch.cat(collective.gather(x)) for x in (mine, position))
        return values[order.argsort()]
