"""A piece of the known data, ready to be run under many candidates at once within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lightning_nrl._scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl._scoring.channelwise import Varied
from lightning_nrl._scoring.head_scorer import HeadScorer, counted, is_plain_multiclass, make_head
from lightning_nrl._scoring.memory import is_out_of_memory, measured
from lightning_nrl._scoring.sample_layout import repeat_all
from lightning_nrl._scoring.sparse_delta import LayerDelta, Taps, edits, make_changes
from lightning_nrl._utils.precision import widest
from lightning_nrl.tasks import Task

__all__ = ["Piece", "make_pieces"]

T = TypeVar("T")

CACHE = 1 << 20
"""Bytes of the first site's output, or of logits in front of a last layer, that a CPU works on at once, so that they
stay in its cache."""
WORK = 16 << 20
"""Bytes that a pass over a block should make on a CPU, up to eight caches of them at once: less is all overhead."""
GPU_BLOCK = 256 << 20
"""The same bytes on a GPU, enough to keep it busy."""
SAMPLES = 512
"""Samples a piece at most."""


@dataclass
class Piece:
    """`n` samples with all that does not depend on the candidates.

    Attributes:
        recording: where they come from.
        chunk: the samples.
        changes: the change of each site.
        where: flat positions of the changed weights.
        task: says what passed and loss mean.
        rows: how many rows, candidates times samples, are run at once. Halved for good when memory runs out.
        taps: what the first site's change needs to know of the samples, if there is room to keep it.
        head: the samples in front of a last layer that is the model's output, if there is room to keep that.
        direct: whether they are in front of such a layer.
        reserve: `n`, the margin that a sample must keep to pass, on the device of the weights; None: any.
        weight: `n`, what each sample counts, likewise; None: all alike.
    """

    recording: ActivationCache
    chunk: Chunk
    changes: tuple[LayerDelta, ...]
    where: Tensor
    task: Task
    rows: int
    taps: Taps | None = None
    head: HeadScorer | None = None
    direct: bool = False
    reserve: Tensor | None = None
    weight: Tensor | None = None

    @property
    def total(self) -> float:
        """What all samples count together."""
        return len(self.chunk) if self.weight is None else float(self.weight.sum())

    def judge(self, values: Tensor, with_loss: bool = True) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Runs candidates.

        Args:
            values: `P x K`.
            with_loss: whether losses are asked for.

        Yields:
            Which candidates, their passes `p x n` bool, their losses `p x n` or None.
        """
        for part, (passed, loss) in self._parts(values, partial(self._run, with_loss=with_loss)):
            yield part, passed, loss

    def tally(
        self, values: Tensor, with_loss: bool = True
    ) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
        """The same with sums over the samples.

        Yields:
            Which candidates, how many samples pass, what these weigh or None without weights, and the sum of all
            losses, weighted where there are weights, or None; `p` each.
        """

        def work(values: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
            head = None if with_loss or values.device.type != "cpu" else self._head()
            if head is not None:
                return (*head.survivors(values, self.weight), None)
            passed, loss = self._run(values, with_loss)
            if loss is not None and self.weight is not None:
                loss = loss * self.weight
            total = None if loss is None else loss.sum(1, dtype=widest(values.device))
            return (*counted(passed, self.weight), total)

        for part, (passed, weight, loss) in self._parts(values, work):
            yield part, passed, weight, loss

    def _head(self) -> HeadScorer | None:
        if self.head is not None or not self.direct:
            return self.head
        x, y = self.recording.site(self.chunk)
        change = next(change for change in self.changes if change.site is self.recording.first(self.chunk))
        return make_head(change, change.taps(x, y), y, _labels(self.task, self.chunk), self.reserve)

    def _parts(self, values: Tensor, work: Callable[[Tensor], T]) -> Iterator[tuple[slice, T]]:
        """Does the work for as many candidates at once as memory allows."""
        start = 0
        while start < len(values):
            part = slice(start, min(len(values), start + max(1, self.rows // len(self.chunk))))
            try:
                done = work(values[part])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.rows <= 1:
                    raise
                self.rows //= 2
                if self.recording.subject.space.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            yield part, done
            start = part.stop

    def _run(self, values: Tensor, with_loss: bool) -> tuple[Tensor, Tensor | None]:
        head = self._head()
        if head is not None:
            return head.judge(values, with_loss)
        n = len(self.chunk)
        if self.rows >= n:
            return self._outputs(self.chunk, self.taps, values, with_loss, self.reserve)
        chunks = list(self.recording.split(self.chunk, self.rows))
        reserves = [None] * len(chunks) if self.reserve is None else self.reserve.split(self.rows)
        parts = [
            self._outputs(chunk, None, values, with_loss, reserve)
            for chunk, reserve in zip(chunks, reserves, strict=True)
        ]
        losses = [loss for _, loss in parts if loss is not None]
        return torch.cat([passed for passed, _ in parts], 1), torch.cat(losses, 1) if losses else None

    def _outputs(
        self, chunk: Chunk, taps: Taps | None, values: Tensor, with_loss: bool, reserve: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        p = len(values)
        if self.recording.replayable(chunk):
            logits = self.recording.replay(chunk, edits(self.changes, values, taps), copies=p)
            logits = logits.dense() if isinstance(logits, Varied) else logits
        else:
            logits = self.recording.rerun(chunk, self.where, values)
        target = repeat_all(chunk.target, p)
        passed = self.task.passed(logits, target).view(p, -1)
        if reserve is not None:
            margin = self.task.margin(logits, target)
            assert margin is not None
            passed = passed & (margin.view(p, -1) >= reserve)
        return passed, self.task.loss(logits, target).view(p, -1) if with_loss else None


@torch.no_grad()
def make_pieces(
    recording: ActivationCache,
    where: Tensor,
    mask: Tensor,
    task: Task,
    budget: int,
    room: int,
    reserve: Tensor | None = None,
    weight: Tensor | None = None,
) -> list[Piece]:
    """Cuts samples into pieces.

    Args:
        recording: the known data.
        where: `K` int64, flat positions of the changed weights.
        mask: `N` bool by row of the evidence, which samples.
        task: says what passed and loss mean.
        budget: bytes that running a block may take.
        room: bytes that may be kept from one call to the next.
        reserve: `N` float by row of the evidence, the margin that each must keep to pass; None: any.
        weight: `N` float64 by row of the evidence, what each counts; None: all alike.
    """

    def kept(chunk: Chunk, column: Tensor | None = reserve) -> Tensor | None:
        return None if column is None else column[chunk.rows].to(recording.subject.space.device)

    if weight is not None:
        weight = weight.to(widest(recording.subject.space.device))

    on_cpu = recording.subject.space.device.type == "cpu"
    changes = make_changes(recording.subject.space, where)
    pieces: list[Piece] = []
    for group in recording.chunks(None, mask):
        piece = Piece(recording, group, changes, where, task, 1, reserve=kept(group), weight=kept(group, weight))
        if not recording.replayable(group):
            pieces.append(replace(piece, rows=_rows(piece, budget, 0, on_cpu)))
            continue
        first = recording.first(group)
        change = next(c for c in changes if c.site is first)
        _, y = recording.site(next(iter(recording.split(group, 1))))
        direct = recording.direct(group) and is_plain_multiclass(task) and len(change.units) > 0
        direct = direct and y.ndim == 2 and y.dtype in (torch.float32, torch.float64)
        if direct:
            per_row = len(change.units) * y.element_size()
            rows = max(1, min(CACHE if on_cpu else GPU_BLOCK, budget // 6) // per_row)
        else:
            rows = _rows(piece, budget, y.nbytes, on_cpu)
        samples = max(1, min(SAMPLES, rows if direct else int(rows**0.5)))
        for chunk in recording.split(group, samples):
            x, y = recording.site(chunk)
            taps = change.taps(x, y) if len(change.units) else None
            made = replace(piece, chunk=chunk, rows=rows, direct=direct, reserve=kept(chunk))
            made.weight = kept(chunk, weight)
            if direct and taps is not None:
                head = make_head(change, taps, y, _labels(task, chunk), made.reserve)
                made.head = head if head.nbytes <= room else None
                room -= head.nbytes if made.head is not None else 0
            elif taps is not None and taps.nbytes <= room:
                made.taps = taps
                room -= taps.nbytes
            pieces.append(made)
    return pieces


def _labels(task: Task, chunk: Chunk) -> Tensor:
    label = task.label(chunk.target)
    assert label is not None
    return label


def _rows(piece: Piece, budget: int, y_bytes: int, on_cpu: bool) -> int:
    """How many rows to run at once, by what a few of them take; the same on every run."""
    few = next(iter(piece.recording.split(piece.chunk, 2)))
    original = piece.recording.subject.space.flat()[piece.where.to(piece.recording.subject.space.device)]
    measures = [measured(partial(piece._outputs, few, None, original.expand(p, -1), True)) for p in (4, 8)]
    together = len(few) * (8 if piece.recording.replayable(piece.chunk) else 1)
    peak = measures[1][0] / together
    total = (measures[1][1] - measures[0][1]) / (4 * len(few))
    fitting = int(budget / max(1, peak))
    if not on_cpu or not y_bytes:
        return max(1, min(fitting, int(GPU_BLOCK / max(1, peak))))
    wanted = min(max(int(WORK / max(1, total)), CACHE // y_bytes), 8 * CACHE // y_bytes)
    return max(1, min(fitting, wanted))
