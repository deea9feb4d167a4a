"""Logits by sample, each computed once, and which samples are easy."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrl._utils.device import none_if_out_of_memory

EASY_MARGIN = 3 / 8  # samples with a margin above this part of the median of passed ones are easy
MAX_CACHED_BYTES = 2**28  # of logits that a cache keeps; where they are more the teacher runs again each time


class LogitCache:
    """Logits by sample, on the device where they were computed, as long as they fit in `MAX_CACHED_BYTES`.

    Which samples are known is kept on the CPU, so that to ask costs no wait for the device. All logits have the shape
    and dtype of the first ones; others, as of a batch that is padded to its longest sample, are not kept. Without a
    number of samples it grows with the largest index.
    """

    def __init__(self, n_samples: int | None = None) -> None:
        self.has_varied = False
        self._n_samples, self._max_bytes = n_samples, MAX_CACHED_BYTES
        self._known = torch.zeros(n_samples or 0, dtype=torch.bool)
        self._table: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """True if nothing is kept, so far or for want of memory."""
        return self._table is None

    def unknown(self, index: Tensor) -> Tensor:
        """The samples among `n` (int64 on the CPU) whose logits are not known."""
        return index[~self._known[index]]

    def get(self, index: Tensor, shape: torch.Size | None = None) -> Tensor | None:
        """The logits of samples, `n` int64; None unless all are known and of that shape behind the first dimension."""
        index = index.cpu()
        if self._table is None or (shape is not None and shape[1:] != self._table.shape[1:]):
            return None
        if int(index.max()) >= len(self._known) or not bool(self._known[index].all()):
            return None
        return self._table[index.to(self._table.device, non_blocking=True)]

    def put(self, index: Tensor, logits: Tensor) -> None:
        """Keeps the logits of samples, if there is memory for them and they have the shape of the others."""
        index = index.cpu()
        if self._table is not None and logits.shape[1:] != self._table.shape[1:]:
            self.has_varied = True
            return
        least, known = int(index.max()) + 1, len(self._known)
        # Where the number of samples is not known, the table at least doubles when it grows.
        rows = self._n_samples or (known if least <= known else max(least, 2 * known))
        if rows * logits[0].numel() * logits.element_size() > min(self._max_bytes, MAX_CACHED_BYTES):
            return
        table = self._table
        if table is None or rows > len(table):
            more = (rows - (0 if table is None else len(table)), *logits.shape[1:])
            parts = [] if table is None else [table]
            like = logits if table is None else table
            table = none_if_out_of_memory(lambda: torch.cat([*parts, like.new_empty(more)]))
            if table is None:
                # What is there stays, no more is kept.
                self._max_bytes = 0
                return
            self._table = table
        self._known = torch.cat([self._known, self._known.new_zeros(rows - len(self._known))])
        table[index.to(table.device, non_blocking=True)] = logits.to(table.device, table.dtype)
        self._known[index] = True
