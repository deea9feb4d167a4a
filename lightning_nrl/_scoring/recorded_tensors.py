"""Where recorded tensors of many samples are kept: in memory, there in half the precision, in a file, or not at all."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Literal, Protocol

import torch
from torch import Tensor

from lightning_nrl._scoring.sample_layout import SampleLayout
from lightning_nrl.errors import ReplayError

__all__ = ["InMemory", "MappedFile", "Recomputed", "RecordedTensors", "StorageKind", "half_nbytes", "halved"]

StorageKind = Literal["memory", "half", "mapped", "recomputed"]

HALF_OF = {torch.float64: torch.float32, torch.float32: torch.float16}
"""What has half the precision of a type; what is narrower already stays as it is."""


def halved(x: Tensor) -> Tensor:
    """The tensor in half the precision, if it has one."""
    return x.to(HALF_OF.get(x.dtype, x.dtype))


def half_nbytes(x: Tensor) -> int:
    """Bytes of the tensor in half the precision."""
    return x.numel() * HALF_OF.get(x.dtype, x.dtype).itemsize


class RecordedTensors(Protocol):
    """Some tensors of many samples: batches are added, then samples are taken."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are held."""
        ...

    def add(self, tensors: Sequence[Tensor], rows: Tensor) -> None:
        """Takes in a batch of samples with these rows in the results."""
        ...

    def finish(self, pin: bool = False) -> None:
        """Ends the recording; page-locked (`pin`) memory is what a GPU takes without a wait."""
        ...

    def take(self, samples: slice | Tensor, device: torch.device, first: int = 0) -> list[Tensor]:
        """Some samples of the tensors from the `first` on, on a device, in the precision that they came in."""
        ...


@dataclass
class InMemory:
    """Tensors in the memory of a device."""

    layouts: Sequence[SampleLayout]  # where the samples are in each
    device: torch.device
    half: bool = False  # whether they are kept in half the precision
    expected: int = 0  # samples for which memory is taken from the first batch on; what comes beyond them is joined
    dtypes: list[torch.dtype] = field(default_factory=list)  # that they came in
    parts: list[list[Tensor]] = field(default_factory=list)  # of each, batch by batch; one is left when it is finished
    filled: list[int] = field(default_factory=list)  # entries of each first part that are taken, where it is reserved

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(x.nbytes for parts in self.parts for x in parts)

    def add(self, tensors: Sequence[Tensor], rows: Tensor) -> None:
        """Keeps a batch."""
        if not self.parts:
            self.parts, self.dtypes = [[] for _ in tensors], [x.dtype for x in tensors]
            self.filled = [0] * len(tensors)
        for i, x in enumerate(tensors):
            kept = (halved(x) if self.half else x).to(self.device)
            if not self._is_filled_in(i, kept):
                self.parts[i].append(kept)

    def _is_filled_in(self, i: int, kept: Tensor) -> bool:
        """Whether a batch of one tensor went to where memory was taken before."""
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
        """Makes one tensor of each."""
        for i, (parts, layout) in enumerate(zip(self.parts, self.layouts, strict=True)):
            if self.filled[i]:
                parts[0] = parts[0][: self.filled[i]]
            whole = _joined(parts, layout.dim)
            parts[:] = [whole.pin_memory() if pin else whole]

    def take(self, samples: slice | Tensor, device: torch.device, first: int = 0) -> list[Tensor]:
        """Views where nothing has to be converted or moved."""
        chosen = [
            layout.take(x[0], samples) for layout, x in zip(self.layouts[first:], self.parts[first:], strict=True)
        ]
        # Half a number is sent to a device before it is widened there.
        moved = (x.to(device, non_blocking=True) for x in chosen)
        return [x.to(dtype) for x, dtype in zip(moved, self.dtypes[first:], strict=True)]


@dataclass
class MappedFile:
    """Tensors in temporary files that have no name, or lose it when they are closed: none is ever left behind."""

    layouts: Sequence[SampleLayout]
    nbytes: int = 0  # what is read is a copy, so that no page stays
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)  # of one entry, samples first
    files: list[IO[bytes]] = field(default_factory=list)  # one a tensor

    def add(self, tensors: Sequence[Tensor], rows: Tensor) -> None:
        """Writes a batch; a `ReplayError` where the temporary folder takes no more."""
        by_sample = [x.movedim(layout.dim, 0) for x, layout in zip(tensors, self.layouts, strict=True)]
        try:
            if not self.files:
                self.dtypes, self.shapes = [x.dtype for x in tensors], [x.shape[1:] for x in by_sample]
                for _ in tensors:
                    self.files.append(tempfile.TemporaryFile(prefix="lightning_nrl-"))  # noqa: SIM115
            for file, x in zip(self.files, by_sample, strict=True):
                file.write(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            raise ReplayError(
                f"`layer`: recorded activations could not be written to {tempfile.gettempdir()!r}: {error}",
                "let TMPDIR name a folder with more space, or raise `SearchOptions.budget`.",
            ) from error

    def finish(self, pin: bool = False) -> None:
        """Brings all to the file."""
        for file in self.files:
            file.flush()

    def take(self, samples: slice | Tensor, device: torch.device, first: int = 0) -> list[Tensor]:
        """Copies of the chosen samples."""
        places = samples if isinstance(samples, slice) else samples.cpu()
        taken = []
        columns = zip(self.layouts, self.dtypes, self.shapes, self.files, strict=True)
        for layout, dtype, shape, file in list(columns)[first:]:
            # Private and so writable, as `torch.frombuffer` wants it; closed when the tensor is gone.
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            whole = torch.frombuffer(pages, dtype=dtype).view(-1, *shape)
            chosen = SampleLayout(0, layout.m).take(whole, places)
            chosen = chosen.clone() if isinstance(places, slice) else chosen
            taken.append(chosen.movedim(0, layout.dim).contiguous().to(device))
        return taken


@dataclass
class Recomputed:
    """Tensors that are made again whenever they are taken; those of about one batch are kept."""

    again: Callable[[Tensor], list[Tensor]]  # the tensors of samples by row of the results, `n` int64
    layouts: Sequence[SampleLayout]
    rows: list[Tensor] = field(default_factory=list)
    latest: tuple[int, int, list[Tensor]] = (0, 0, [])  # first and last place of what is kept, and what it is

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(x.nbytes for x in self.latest[2])

    def add(self, tensors: Sequence[Tensor], rows: Tensor) -> None:
        """Notes which samples there are."""
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
