"""Recorded tensors of many samples: kept in memory, or computed again whenever they are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_nrl.search._scoring.sample_layout import SampleLayout


@dataclass
class InMemory:
    """Tensors in the memory of a device."""

    layouts: Sequence[SampleLayout]  # where the samples are in each
    device: torch.device
    expected: int = 0  # samples for which memory is taken from the first batch on; what comes beyond them is joined
    parts: list[list[Tensor]] = field(default_factory=list)  # of each, batch by batch; one is left when it is finished
    filled: list[int] = field(default_factory=list)  # entries of each first part that are taken, where it is reserved

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for parts in self.parts for x in parts)

    def add(self, tensors: Sequence[Tensor], rows: Tensor) -> None:
        if not self.parts:
            self.parts = [[] for _ in tensors]
            self.filled = [0] * len(tensors)
        for i, x in enumerate(tensors):
            kept = x.to(self.device)
            if not self._is_filled_in(i, kept):
                self.parts[i].append(kept)

    def _is_filled_in(self, i: int, kept: Tensor) -> bool:
        parts, layout, start = self.parts[i], self.layouts[i], self.filled[i]
        reserved = self.expected * layout.m if self.device.type == "cpu" and layout.dim == 0 else 0
        stop = start + kept.shape[layout.dim]
        if stop > reserved or len(parts) > 1 or (parts and not start):
            return False
        if not parts:
            # Its pages are taken as they fill.
            parts.append(kept.new_empty(reserved, *kept.shape[1:]))
        parts[0][start:stop] = kept
        self.filled[i] = stop
        return True

    def finish(self, pin: bool = False) -> None:
        for i, (parts, layout) in enumerate(zip(self.parts, self.layouts, strict=True)):
            if self.filled[i]:
                parts[0] = parts[0][: self.filled[i]]
            whole = _joined(parts, layout.dim)
            parts[:] = [whole.pin_memory() if pin else whole]

    def take(self, samples: slice | Tensor, device: torch.device, first: int = 0) -> list[Tensor]:
        """Returns some samples of the tensors from the `first` on, as views where nothing has to be moved."""
        kept = zip(self.layouts[first:], self.parts[first:], strict=True)
        return [layout.take(x[0], samples).to(device, non_blocking=True) for layout, x in kept]


@dataclass
class Recomputed:
    """Tensors that are made again whenever they are taken; those of about one batch are kept."""

    again: Callable[[Tensor], list[Tensor]]  # the tensors of samples by row of the results, `n` int64
    layouts: Sequence[SampleLayout]
    rows: list[Tensor] = field(default_factory=list)
    latest: tuple[int, int, list[Tensor]] = (0, 0, [])  # first and last place of what is kept, and what it is

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.latest[2])

    def add(self, tensors: Sequence[Tensor], rows: Tensor) -> None:
        self.rows.append(rows)

    def finish(self, pin: bool = False) -> None:
        """Nothing is left to do."""

    def take(self, samples: slice | Tensor, device: torch.device, first: int = 0) -> list[Tensor]:
        """The chosen samples, with those after them if together they are no more than a batch."""
        rows, size = torch.cat(self.rows), max(len(x) for x in self.rows)
        places = torch.arange(len(rows))[samples if isinstance(samples, slice) else samples.cpu()]
        low, high = int(places.min()), int(places.max()) + 1
        if high - low > size:
            return [x.to(device) for x in self.again(rows[places])[first:]]
        start, stop, kept = self.latest
        if not kept or low < start or high > stop:
            self.latest = (0, 0, [])  # so that memory is held once
            start, stop = low, min(low + size, len(rows))
            self.latest = start, stop, self.again(rows[start:stop])
        chosen = zip(self.layouts[first:], self.latest[2][first:], strict=True)
        return [layout.take(x, places - start).to(device) for layout, x in chosen]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """All parts in one tensor, each given up as soon as it is copied; in main memory pages are taken as they fill."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(x.shape[dim] for x in parts)
    whole, start = parts[0].new_empty(shape), 0
    parts.reverse()
    while parts:
        x = parts.pop()
        whole.narrow(dim, start, x.shape[dim]).copy_(x)
        start += x.shape[dim]
    return whole
