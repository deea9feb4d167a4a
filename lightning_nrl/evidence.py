"""What a model does on data: one row a sample, the same table on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence:
    """One row a sample, split by split, within a split in the order of the data set. On the CPU.

    Attributes:
        splits: names of the splits, `S` of them.
        sizes: samples in each split.
        index: `N` int64, each sample's position in its data set: the id that reports give.
        label: `N` int64, the true class, -1 where the task has none.
        prediction: `N` int64, the predicted class, -1 where the task has none.
        loss: `N` float, each sample's loss.
        passed: `N` bool.
        targeted: `N` bool, failed samples that the target selects (I_neg).
        kept: `N` bool, passed samples that the search scores if nothing is sampled (I_pos before sampling).
    """

    splits: tuple[str, ...]
    sizes: tuple[int, ...]
    index: Tensor
    label: Tensor
    prediction: Tensor
    loss: Tensor
    passed: Tensor
    targeted: Tensor
    kept: Tensor

    def __len__(self) -> int:
        return len(self.passed)

    def rows(self, split: str, position: Tensor) -> Tensor:
        """Rows of the samples at these positions (`Batch.position`) of a split."""
        return position + self.start(split)

    def start(self, split: str) -> int:
        """The first row of a split."""
        return sum(self.sizes[: self.splits.index(split)])

    def of(self, split: str) -> slice:
        """The rows of a split."""
        start = self.start(split)
        return slice(start, start + self.sizes[self.splits.index(split)])

    def ids(self, mask: Tensor) -> dict[str, list[int]]:
        """Data-set positions of the marked rows, by split."""
        return {split: self.index[self.of(split)][mask[self.of(split)]].tolist() for split in self.splits}
