"""A source that is handed on as it is, while something is noted of its batches in passing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_nrl.data.batch import Batch, Source

__all__ = ["ObservedSource"]


class ObservedSource:
    """Everything of another source; subclasses say what they note of a batch.

    Args:
        source: whose batches are handed on.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def split(self) -> str:
        """The source's own."""
        return self.source.split

    @property
    def passed(self) -> bool:
        """The source's own."""
        return self.source.passed

    @property
    def failed(self) -> bool:
        """The source's own."""
        return self.source.failed

    @property
    def index(self) -> Tensor:
        """The source's own."""
        return self.source.index

    @property
    def positions(self) -> Tensor:
        """The source's own."""
        return self.source.positions

    def __iter__(self) -> Iterator[Batch]:
        self.begin()
        for batch in self.source:
            self.observe(batch)
            yield batch

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Chosen samples, of which nothing is noted."""
        return self.source.draw(batches)

    def begin(self) -> None:
        """Is called when a pass begins: what was noted of an earlier one is forgotten."""
        raise NotImplementedError

    def observe(self, batch: Batch) -> None:
        """Is shown each batch of a pass, in order."""
        raise NotImplementedError
