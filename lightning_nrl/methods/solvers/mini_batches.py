"""Mini-batches of chosen rows over all known splits and ranks, and measurements on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_nrl._utils.interrupts import poll
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.methods.problem import Problem

BATCH_SIZE = 128  # samples per step over all ranks; the recipes are tuned for it

Part = tuple[Batch, Tensor]
"""A batch from one split, and the rows of its samples among the known samples, `n` int64."""


def shuffled_batches(
    rows: Tensor, generator: torch.Generator, size: int = BATCH_SIZE
) -> list[Tensor]:
    """Splits rows in random order into mini-batches of similar size, at most `size`."""
    if not len(rows):
        return []
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    return list(shuffled.tensor_split(-(-len(rows) // size)))


def load_batches(problem: Problem, batches: Sequence[Tensor]) -> Iterator[list[Part]]:
    """Yields this rank's parts of each mini-batch. A part has samples of one split, at most the
    split's batch size.
    """
    streams = []
    for source in problem.known:
        start, mine = (
            problem.before.start(source.split),
            torch.zeros(len(source.index), dtype=torch.bool),
        )
        mine[source.positions] = True
        at_once = min(BATCH_SIZE, _batch_size(source) or BATCH_SIZE)
        chosen = []
        for rows in batches:
            places = rows[(rows >= start) & (rows < start + len(mine))] - start
            places = places[mine[places]]
            chosen.append(list(places.split(at_once)) if len(places) else [])
        flat = [places for parts in chosen for places in parts]
        streams.append(
            (start, [len(parts) for parts in chosen], iter(source.draw(flat) if flat else ()))
        )
    for at in range(len(batches)):
        poll()
        yield [
            (batch, batch.position + start)
            for start, counts, stream in streams
            for batch in (next(stream) for _ in range(counts[at]))
        ]


def merge_measurements(
    problem: Problem, column: Tensor, measured: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Returns a copy of `column`, `N`, updated by all ranks' `measured` values, given as pairs
    (rows, values).
    """
    new, is_new = torch.zeros_like(column), torch.zeros_like(column)
    if measured:
        rows, values = (
            torch.cat([rows for rows, _ in measured]),
            torch.cat([values for _, values in measured]),
        )
        sizes = [len(rows) for rows, _ in measured]
        # One transfer; the loop lets later values overwrite earlier ones, which one indexed write
        # does not guarantee.
        for some, value in zip(rows.split(sizes), values.cpu().split(sizes), strict=True):
            new[some], is_new[some] = value.to(column.dtype), 1.0
    new, is_new = problem.collective.sum(torch.stack([new, is_new])).unbind()
    return torch.where(is_new > 0, new, column)


def _batch_size(source: Source) -> int:
    # Reading a batch to find out is slow if workers must start.
    return getattr(source, "batch_size", None) or len(next(iter(source), ()))
