"""A chunk of the known data, ready to be run under many candidates at once within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_nrl._scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl._scoring.candidate_tensor import CandidateTensor
from lightning_nrl._scoring.head_scorer import HeadScorer, make_head_scorer, sum_passed
from lightning_nrl._scoring.sample_layout import repeat_all
from lightning_nrl._scoring.sparse_delta import GatheredInputs, LayerDelta, edit_layers
from lightning_nrl._utils.out_of_memory import none_if_out_of_memory
from lightning_nrl._utils.precision import widest
from lightning_nrl.tasks import Task

__all__ = ["ChunkScorer", "Sums", "summed"]

T = TypeVar("T")


class Sums(NamedTuple):
    """What `p` candidates do on all samples of a chunk, `p` each."""

    passed: Tensor  # how many pass
    weight: Tensor | None  # what these weigh; None: all alike
    loss: Tensor | None = None  # sum of (weighted) losses; None: not asked for
    credit: Tensor | None = None  # sum of 1 if right, else 1 / (loss + 1); None: not asked for


def summed(passed: Tensor, loss: Tensor | None, weight: Tensor | None, with_credit: bool) -> Sums:
    """Sums over samples, the last dimension of `passed` and `loss`."""
    wide = widest(passed.device)
    credit = None
    if loss is not None and with_credit:
        credit = torch.where(passed, 1.0, 1 / (loss + 1)).sum(-1, dtype=wide)
    if loss is not None and weight is not None:
        loss = loss * weight
    return Sums(*sum_passed(passed, weight), None if loss is None else loss.sum(-1, dtype=wide), credit)


@dataclass
class ChunkScorer:
    """`n` samples with all that does not depend on the candidates."""

    cache: ActivationCache  # where they come from
    chunk: Chunk
    deltas: tuple[LayerDelta, ...]  # the change of each site
    where: Tensor  # flat positions of the changed weights
    task: Task
    rows: int  # candidates times samples that are run at once; halved for good when memory runs out
    reserve: Tensor | None = None  # n, the margin that a sample must keep to pass; None: any
    weight: Tensor | None = None  # n, what each sample counts; None: all alike
    total_weight: float = 0.0  # what all samples count together
    is_head: bool = False  # whether the samples are in front of a last layer whose output is the model's
    gathered: GatheredInputs | None = None  # what the first site's change needs of the samples, if there is room
    head: HeadScorer | None = None  # the samples in front of that last layer, if there is room

    @property
    def nbytes(self) -> int:
        """Bytes that are kept from one call to the next."""
        return sum(kept.nbytes for kept in (self.gathered, self.head) if kept is not None)

    def keep(self, room: int) -> None:
        """Keeps what is the same in every call, if it takes at most `room` bytes."""
        if not self.is_head:
            if len(self.first_delta.units):
                gathered = self.first_delta.gather(*self.cache.activations(self.chunk))
                self.gathered = gathered if gathered.nbytes <= room else None
            return
        head = self._make_head()
        self.head = head if head.nbytes <= room else None

    def evaluate(self, values: Tensor, with_loss: bool = True) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Runs candidates `P x K`: which of them, their passes `p x n` bool, and if asked for their losses `p x n`."""
        for part, (passed, loss) in self._blocks(values, partial(self._run, with_loss=with_loss)):
            yield part, passed, loss

    def sums(self, values: Tensor, with_loss: bool = True, with_credit: bool = False) -> Iterator[tuple[slice, Sums]]:
        """The same summed over the samples."""

        def work(values: Tensor) -> Sums:
            # To leave decided samples out, the host has to learn which those are.
            if self.is_head and not with_loss and values.device.type == "cpu":
                return Sums(*(self.head or self._make_head()).count_passed(values, self.weight))
            passed, loss = self._run(values, with_loss)
            return summed(passed, loss, self.weight, with_credit)

        yield from self._blocks(values, work)

    @property
    def first_delta(self) -> LayerDelta:
        """The change of the site that the model calls first."""
        first = self.cache.plan(self.chunk).first
        return next(delta for delta in self.deltas if delta.site is first)

    def _make_head(self) -> HeadScorer:
        x, y = self.cache.activations(self.chunk)
        label = self.task.label(self.chunk.target)
        assert label is not None
        return make_head_scorer(self.first_delta, self.first_delta.gather(x, y), y, label, self.reserve)

    def _blocks(self, values: Tensor, work: Callable[[Tensor], T]) -> Iterator[tuple[slice, T]]:
        """Does the work for as many candidates at once as memory allows."""
        start = 0
        while start < len(values):
            part = slice(start, min(len(values), start + max(1, self.rows // len(self.chunk))))
            done = none_if_out_of_memory(partial(work, values[part]), last_try=self.rows <= 1)
            if done is None:
                self.rows //= 2
                continue
            yield part, done
            start = part.stop

    def _run(self, values: Tensor, with_loss: bool) -> tuple[Tensor, Tensor | None]:
        if self.is_head:
            return (self.head or self._make_head()).evaluate(values, with_loss)
        if self.rows >= len(self.chunk):
            return self.outputs(self.chunk, self.gathered, values, with_loss, self.reserve)
        chunks = list(self.cache.split(self.chunk, self.rows))
        reserves = [None] * len(chunks) if self.reserve is None else self.reserve.split(self.rows)
        parts = [
            self.outputs(chunk, None, values, with_loss, reserve)
            for chunk, reserve in zip(chunks, reserves, strict=True)
        ]
        losses = [loss for _, loss in parts if loss is not None]
        return torch.cat([passed for passed, _ in parts], 1), torch.cat(losses, 1) if losses else None

    def outputs(
        self,
        chunk: Chunk,
        gathered: GatheredInputs | None,
        values: Tensor,
        with_loss: bool,
        reserve: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Passes and losses of some of the samples under candidates `P x K`, all in one block."""
        p = len(values)
        if self.cache.is_replayable(chunk):
            logits = self.cache.replay(chunk, edit_layers(self.deltas, values, gathered), copies=p)
            logits = logits.dense_view() if isinstance(logits, CandidateTensor) else logits
        else:
            logits = self.cache.rerun(chunk, self.where, values)
        own_reserve = None if reserve is None else reserve.repeat(p)
        passed, loss = self.task.passed_and_loss(logits, repeat_all(chunk.target, p), own_reserve, with_loss)
        return passed.view(p, -1), None if loss is None else loss.view(p, -1)
