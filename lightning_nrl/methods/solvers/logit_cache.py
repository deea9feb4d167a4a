"""Cache of logits by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrl._utils.device import none_if_out_of_memory

# Largest size of the cached logits; logits that do not fit are computed each time.
MAX_CACHED_BYTES = 2**28


class LogitCache:
    """Caches logits by sample number, on the device of the logits, up to `MAX_CACHED_BYTES`.

    The set of cached samples is kept on the CPU, so a lookup never waits for the device. If
    `n_samples` is None, the table grows with the largest sample number. Logits that differ in shape
    from the first cached logits, as in padded batches, are not cached; `has_varied` is then True.
    """

    def __init__(self, n_samples: int | None = None) -> None:
        self.has_varied = False
        self._n_samples, self._max_bytes = n_samples, MAX_CACHED_BYTES
        self._known = torch.zeros(n_samples or 0, dtype=torch.bool)
        self._table: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self._table is None

    def unknown(self, index: Tensor) -> Tensor:
        """Returns the numbers in `index` (int64 on the CPU) whose samples are not cached."""
        return index[~self._known[index]]

    def get(self, index: Tensor, shape: torch.Size | None = None) -> Tensor | None:
        """Returns the logits of the samples `index`. Returns None if one of these samples is not
        cached.

        If `shape` is given, None is also returned if the cached logits of a sample do not have the
        shape `shape[1:]`.
        """
        index = index.cpu()
        if self._table is None or (shape is not None and shape[1:] != self._table.shape[1:]):
            return None
        if int(index.max()) >= len(self._known) or not bool(self._known[index].all()):
            return None
        return self._table[index.to(self._table.device, non_blocking=True)]

    def put(self, index: Tensor, logits: Tensor) -> None:
        """Caches the logits of the samples `index` if memory allows it and their shape is that of
        the cached logits.
        """
        index = index.cpu()
        if self._table is not None and logits.shape[1:] != self._table.shape[1:]:
            self.has_varied = True
            return
        least, known = int(index.max()) + 1, len(self._known)
        # If the number of samples is unknown, the table at least doubles when it grows.
        rows = self._n_samples or (known if least <= known else max(least, 2 * known))
        if rows * logits[0].numel() * logits.element_size() > min(
            self._max_bytes, MAX_CACHED_BYTES
        ):
            return
        table = self._table
        if table is None or rows > len(table):
            more = (rows - (0 if table is None else len(table)), *logits.shape[1:])
            parts = [] if table is None else [table]
            like = logits if table is None else table
            table = none_if_out_of_memory(lambda: torch.cat([*parts, like.new_empty(more)]))
            if table is None:
                self._max_bytes = 0  # keeps the present entries and caches no more
                return
            self._table = table
        self._known = torch.cat([self._known, self._known.new_zeros(rows - len(self._known))])
        table[index.to(table.device, non_blocking=True)] = logits.to(table.device, table.dtype)
        self._known[index] = True
