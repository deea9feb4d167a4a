"""Cache of logits by sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.device import none_if_out_of_memory

# Largest size of the cached logits; logits that do not fit are computed each time.
MAX_CACHED_BYTES = 2**28


class LogitCache:
    """Caches logits by sample number, on the device of the logits, up to `MAX_CACHED_BYTES`.

    The set of cached samples is kept on the CPU, so a lookup never waits for the device. The table
    has room for `n_samples` at first and grows with the largest sample number. Logits that differ
    in shape from the first cached logits, as in padded batches, are not cached; `has_varied` is
    then True.
    """

    def __init__(self, n_samples: int = 0) -> None:
        self.has_varied = False
        self._max_bytes = MAX_CACHED_BYTES
        self._known = torch.zeros(n_samples, dtype=torch.bool)
        self._table: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self._table is None

    def unknown(self, index: Tensor) -> Tensor:
        """Returns the numbers in `index` (int64 on the CPU) whose samples are not cached."""
        return index[~self._known[index]]

    def get(self, index: Tensor, shape: torch.Size | None = None) -> Tensor | None:
        """Returns the logits of the samples `index`, or None if a sample is not cached.

        If `shape` is given, None is also returned if the cached logits of a sample do not have the
        shape `shape[1:]`.
        """
        index = index.cpu()
        if self._table is None or (shape is not None and shape[1:] != self._table.shape[1:]):
            return None
        if int(index.max()) >= len(self._known) or not self._known[index].all():
            return None
        return self._table[index.to(self._table.device, non_blocking=True)]

    def put(self, index: Tensor, logits: Tensor) -> None:
        """Caches the logits of the samples `index` if memory and their shape allow it."""
        index = index.cpu()
        table = logits[:0] if self._table is None else self._table
        if logits.shape[1:] != table.shape[1:]:
            self.has_varied = True
            return
        rows = len(self._known)
        least = int(index.max()) + 1
        if least > rows:
            rows = max(least, 2 * rows)
        if rows * logits[0].numel() * logits.element_size() > self._max_bytes:
            return
        if rows > len(table):
            added = (rows - len(table), *table.shape[1:])
            grown = none_if_out_of_memory(lambda: torch.cat([table, table.new_empty(added)]))
            if grown is None:
                self._max_bytes = 0  # keeps the present entries and caches no more
                return
            self._table = table = grown
            self._known = F.pad(self._known, (0, rows - len(self._known)))
        table[index.to(table.device, non_blocking=True)] = logits.to(table)
        self._known[index] = True
