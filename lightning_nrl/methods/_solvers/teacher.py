"""Teachers: the logits that other weights, or another model, give for known samples, each computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, live_tensors, temporary_weights
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.logit_cache import LogitCache
from lightning_nrl.methods._solvers.mini_batches import BATCH_SIZE, load_batches
from lightning_nrl.methods.problem import Problem

DISTILLATION_WEIGHT = 5.0  # of the divergence of a taught sample from its teacher, beside its loss


class Teacher:
    """The logits that other weights give for a batch, cached sample by sample.

    Each known sample has one of the states as its teacher; `which`, `N` int64 on the CPU, is its number.
    """

    def __init__(self, problem: Problem, states: Sequence[State], which: Tensor) -> None:
        own = live_tensors(problem.model)
        # Whole states, since the model may hold other weights when the teacher runs.
        given = [{id(own[name]): value for name, value in state.items()} for state in states]
        self._states = [{name: new.get(id(value), value) for name, value in own.items()} for new in given]
        self._problem, self._which = problem, which
        self._cache = LogitCache(len(which))

    def prepare(self, rows: Tensor) -> None:
        """Runs for rows that are not cached yet, alone: a batch that holds one of them would run as a whole."""
        if self._cache.is_empty or self._cache.has_varied:
            return
        for parts in load_batches(self._problem, self._cache.unknown(rows).split(BATCH_SIZE)):
            for batch, places in parts:
                self(batch, places)

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: Tensor, shape: torch.Size | None = None) -> Tensor:
        """The logits of a batch by its rows among the known samples, `n` int64 on the CPU.

        `shape` is that of the logits, where it depends on the batch as in one that is padded to its longest sample.
        """
        cached = self._cache.get(rows, shape)
        if cached is not None:
            return cached
        which, logits = self._which[rows], torch.zeros(0)
        for number, state in enumerate(self._states):
            chosen = which == number
            if chosen.any():
                with temporary_weights(self._problem.model, state):
                    output = self._problem.evaluator.output(batch)
                mask = chosen.to(output.device, non_blocking=True).view(-1, *[1] * (output.ndim - 1))
                logits = torch.where(mask, output, logits) if len(logits) else output
        self._cache.put(rows, logits)
        return logits
