"""`Teacher`: logits of known samples under fixed weights, computed once per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, live_tensors, temporary_weights
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.logit_cache import LogitCache
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solvers.mini_batches import BATCH_SIZE, load_batches

DISTILLATION_WEIGHT = (
    5.0  # of the divergence of a sample's logits from the teacher's, relative to its loss
)


class Teacher:
    """Computes and caches logits. Sample i runs with weights `states[which[i]]`; `which` is `N`
    int64 on the CPU.
    """

    def __init__(self, problem: Problem, states: Sequence[State], which: Tensor) -> None:
        own = live_tensors(problem.model)
        # Whole states, since the model may hold other weights when the teacher runs.
        given = [{id(own[name]): value for name, value in state.items()} for state in states]
        self._states = [
            {name: new.get(id(value), value) for name, value in own.items()} for new in given
        ]
        self._problem, self._which = problem, which
        self._cache = LogitCache(len(which))

    def prepare(self, rows: Tensor) -> None:
        """Caches the missing logits of `rows`, so that no batch must run as a whole later for a few
        of them.
        """
        if self._cache.is_empty or self._cache.has_varied:
            return
        for parts in load_batches(self._problem, self._cache.unknown(rows).split(BATCH_SIZE)):
            for batch, places in parts:
                self(batch, places)

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: Tensor, shape: torch.Size | None = None) -> Tensor:
        """Returns the logits of a batch; `rows`, `n` int64 on the CPU, are its rows among the known
        samples.

        `shape` is the shape of the logits. It is needed if this shape varies, as with padding to
        the longest sample.
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
                mask = chosen.to(output.device, non_blocking=True).view(
                    -1, *[1] * (output.ndim - 1)
                )
                logits = torch.where(mask, output, logits) if len(logits) else output
        self._cache.put(rows, logits)
        return logits
