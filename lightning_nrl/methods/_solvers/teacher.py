"""Teachers: the logits that other weights, or another model, give for known samples, each computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.device import none_if_out_of_memory
from lightning_nrl._utils.state import State, holding, live_tensors
from lightning_nrl.data.batch import Batch
from lightning_nrl.methods._solvers.mini_batches import BATCH_SIZE, load_batches
from lightning_nrl.methods.problem import Problem

DISTILLATION_WEIGHT = 5.0
"""How much the divergence of a taught sample from its teacher counts beside its loss."""

MAX_CACHED_BYTES = 2**28
"""Of logits that a cache keeps; where they are more the teacher runs again each time."""


class LogitCache:
    """Logits by sample, on the device where they were computed, as long as they fit in `MAX_CACHED_BYTES`.

    Which samples are known is kept on the CPU, so that to ask costs no wait for the device. All logits have the shape
    and dtype of the first ones; others, as of a batch that is padded to its longest sample, are not kept.

    Args:
        n_samples: how many there are; None: it grows with the largest index.
    """

    def __init__(self, n_samples: int | None = None) -> None:
        self.has_varied = False
        self._n_samples, self._max_bytes = n_samples, MAX_CACHED_BYTES
        self._known = torch.zeros(n_samples or 0, dtype=torch.bool)
        self._table: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept, so far or for want of memory."""
        return self._table is None

    def unknown(self, index: Tensor) -> Tensor:
        """Those of some samples, `n` int64 on the CPU, whose logits are not known."""
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
        rows = self._rows_for(int(index.max()) + 1)
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

    def _rows_for(self, least: int) -> int:
        """How many rows the table is to have so that `least` fit; it at least doubles where it grows."""
        if self._n_samples is not None:
            return self._n_samples
        return len(self._known) if least <= len(self._known) else max(least, 2 * len(self._known))


class Teacher:
    """The logits that other weights give for a batch, cached sample by sample.

    Args:
        problem: its model is run.
        states: the weights; each sample has one of them as its teacher.
        which: `N` int64 on the CPU, the number of each known sample's state.
    """

    def __init__(self, problem: Problem, states: Sequence[State], which: Tensor) -> None:
        own = live_tensors(problem.model)
        # Whole states, since the model may hold other weights when the teacher runs.
        given = [{id(own[name]): value for name, value in state.items()} for state in states]
        self._states = [{name: new.get(id(value), value) for name, value in own.items()} for new in given]
        self._problem, self._which = problem, which
        self._cache = LogitCache(len(which))

    def prepare(self, rows: Tensor) -> None:
        """Runs for those of some rows, of any rank's share, that are not cached yet, in batches as large as a step's.

        A batch that holds one of them would run as a whole otherwise.
        """
        if self._cache.is_empty or self._cache.has_varied:
            return
        for parts in load_batches(self._problem, self._cache.unknown(rows).split(BATCH_SIZE)):
            for batch, places in parts:
                self(batch, places)

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: Tensor, shape: torch.Size | None = None) -> Tensor:
        """The logits of a batch, on the device of the model.

        Args:
            batch: `n` samples.
            rows: their rows among the known samples, `n` int64 on the CPU.
            shape: of the logits, where it depends on the batch as in one that is padded to its longest sample.
        """
        cached = self._cache.get(rows, shape)
        if cached is not None:
            return cached
        which, logits = self._which[rows], torch.zeros(0)
        for number, state in enumerate(self._states):
            chosen = which == number
            if chosen.any():
                with holding(self._problem.model, state):
                    output = self._problem.evaluator.output(batch)
                mask = chosen.to(output.device, non_blocking=True).view(-1, *[1] * (output.ndim - 1))
                logits = torch.where(mask, output, logits) if len(logits) else output
        self._cache.put(rows, logits)
        return logits
