"""A data set whose random draws for a sample are the same whenever the sample is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any, cast

from torch.utils.data import Dataset, get_worker_info

from lightning_nrl._utils.preserve import CpuRandomState, mixed_seed, seed_cpu


class SeededDataset(Dataset[Any]):
    """Another data set, read with random numbers that depend on a seed and on the position of the sample alone.

    So a sample is the same in any order, batch or worker. That holds of what draws from the global generators of torch
    (on the CPU), numpy and `random`; they are as found afterwards. A data set with a generator of its own is not
    reached.

    Of `n` samples, position `i + k * n` is draw `k` of sample `i`: the same sample under other random numbers.

    Where no sample has drawn a random number yet, a batch is read as it is, and once more with seeds if one of its
    samples did: data without randomness cost no seeds, only a comparison of states a batch.

    Attributes:
        dataset: the other data set.
        seed: any whole number.
        draws: whether reading it is known to depend on random numbers.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed, self.draws = dataset, seed, False

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, index: Sequence[int]) -> list[Any]:
        """The samples at some positions; torch's data loaders read batches by this."""
        found = CpuRandomState.current()
        if not self.draws:
            samples = self._unseeded(list(index))
            if found.is_current():
                return samples
            self.draws = True
        try:
            return [self._seeded(i) for i in index]
        finally:
            found.restore()

    def _unseeded(self, index: list[int]) -> list[Any]:
        dataset, n = self.dataset, len(self)
        index = [i % n for i in index]
        whole: Callable[[list[int]], list[Any]] | None = getattr(dataset, "__getitems__", None)
        return [dataset[i] for i in index] if whole is None else whole(index)

    def _seeded(self, i: int) -> Any:
        seed_cpu(mixed_seed(self.seed, i))
        return self.dataset[i % len(self)]


def init_worker(function: Callable[[int], None] | None, worker_id: int) -> None:
    """A worker's start: the user's own function, and all that asks for the worker's data set, get the user's."""
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, SeededDataset):
        # torch locks the attributes of this object.
        object.__setattr__(info, "dataset", info.dataset.dataset)
    if function is not None:
        function(worker_id)
