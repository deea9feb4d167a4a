"""Mini-batches of chosen rows over all known splits and ranks, and measurements on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from lightning_nrl._utils.interrupts import poll
from lightning_nrl._utils.preserve import shuffled
from lightning_nrl.data import Batch, Source
from lightning_nrl.methods.problem import Problem

BATCH_SIZE = 128  # samples per step over all ranks; the recipes are tuned for it

Part = tuple[Batch, Tensor]
"""A batch from one split, and the rows of its samples among the known samples, `n` int64."""


def shuffled_batches(rows: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Splits rows in random order into mini-batches of similar size, at most `BATCH_SIZE`."""
    if not len(rows):
        return []
    n_batches = math.ceil(len(rows) / BATCH_SIZE)
    return list(shuffled(rows, generator).tensor_split(n_batches))


def load_batches(problem: Problem, batches: Sequence[Tensor]) -> Iterator[list[Part]]:
    """Yields this rank's parts of each mini-batch.

    A part has samples of one split, at most the split's batch size.
    """
    streams = [
        _load_from(source, problem.before.start(source.split), batches) for source in problem.known
    ]
    for _ in batches:
        poll()
        yield [part for stream in streams for part in next(stream)]


def load_rows(problem: Problem, rows: Tensor) -> Iterator[Part]:
    """Yields this rank's samples among `rows` in mini-batches."""
    for parts in load_batches(problem, rows.split(BATCH_SIZE)):
        yield from parts


def _load_from(source: Source, start: int, batches: Sequence[Tensor]) -> Iterator[list[Part]]:
    """Yields the parts of each mini-batch from a split whose first row is `start`."""
    is_here = torch.zeros(len(source.index), dtype=torch.bool)
    is_here[source.positions] = True
    size = _batch_size(source)
    n_parts = []
    chosen: list[Tensor] = []
    for rows in batches:
        positions = rows[(rows >= start) & (rows < start + len(is_here))] - start
        positions = positions[is_here[positions]]
        parts = positions.split(size) if len(positions) else ()
        n_parts.append(len(parts))
        chosen += parts
    drawn = iter(source.draw(chosen) if chosen else ())
    for n in n_parts:
        yield [(batch, batch.position + start) for batch in islice(drawn, n)]


def _batch_size(source: Source) -> int:
    # Reading a batch to find out is slow if workers must start.
    size = getattr(source, "batch_size", None) or len(next(iter(source), ()))
    return min(size, BATCH_SIZE) or BATCH_SIZE


def merge_measurements(
    problem: Problem, column: Tensor, measured: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Returns a copy of `column`, `N`, updated by the `measured` pairs of all ranks.

    A pair has rows and their values.
    """
    new = torch.zeros_like(column)
    is_new = torch.zeros_like(column)
    if measured:
        sizes = [len(rows) for rows, _ in measured]
        # One transfer; the loop lets later values overwrite earlier ones, which one indexed write
        # does not guarantee.
        values = torch.cat([values for _, values in measured]).cpu()
        for (rows, _), part in zip(measured, values.split(sizes), strict=True):
            new[rows] = part.to(column.dtype)
            is_new[rows] = 1.0
    new, is_new = map(problem.collective.sum, (new, is_new))
    return torch.where(is_new > 0, new, column)
