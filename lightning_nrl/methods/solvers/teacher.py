"""`Teacher`: logits of known samples under fixed weights, computed once per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, completed, temporary_weights
from lightning_nrl.data import Batch
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solvers.logit_cache import LogitCache
from lightning_nrl.methods.solvers.mini_batches import load_rows

# Weight of the divergence of a sample's logits from the teacher's, relative to the sample's loss.
DISTILLATION_WEIGHT = 5.0


class Teacher:
    """Computes and caches logits of the original model, and of others.

    Sample i runs with the weights `states[numbers[i]]`; `numbers` is `N` int64 or bool on the CPU.
    By default all samples run with the original weights.
    """

    def __init__(
        self, problem: Problem, states: Sequence[State] = ({},), numbers: Tensor | None = None
    ) -> None:
        if numbers is None:
            numbers = torch.zeros(len(problem.before), dtype=torch.bool)
        # All tensors, since the model may hold other weights when the teacher runs.
        self._states = [completed(problem.model, state) for state in states]
        self._problem = problem
        self._numbers = numbers
        self._cache = LogitCache(len(numbers))

    def prepare(self, rows: Tensor) -> None:
        """Caches the missing logits of `rows`: a batch that lacks a few later runs as a whole."""
        if self._cache.is_empty or self._cache.has_varied:
            return
        for batch, places in load_rows(self._problem, self._cache.unknown(rows)):
            self(batch, places)

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: Tensor, shape: torch.Size | None = None) -> Tensor:
        """Returns the logits of a batch.

        Args:
            batch: known samples.
            rows: their rows among the known samples, `n` int64 on the CPU.
            shape: shape of the logits, needed if it varies, as with padding to the longest sample.
        """
        cached = self._cache.get(rows, shape)
        if cached is not None:
            return cached
        numbers = self._numbers[rows]
        logits = None
        for number, state in enumerate(self._states):
            chosen = numbers == number
            if not chosen.any():
                continue
            with temporary_weights(self._problem.model, state):
                output = self._problem.evaluator.output(batch)
            if logits is not None:
                mask = chosen.to(output.device, non_blocking=True)
                output = torch.where(mask.view(-1, *[1] * (output.ndim - 1)), output, logits)
            logits = output
        assert logits is not None
        self._cache.put(rows, logits)
        return logits
