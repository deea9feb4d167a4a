"""`Collective`: sums, gathers, broadcasts and errors over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_nrl import errors
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl.errors import OtherRankError, RepairError, first_line

Result = TypeVar("Result")
PACKAGE_ERRORS: dict[str, type[RepairError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RepairError)
}


@dataclass(frozen=True)
class Collective:
    """The ranks that work on one repair; all call its methods in the same order.

    With a `world_size` of 1 nothing is exchanged. Results are on the devices of their arguments; `device` is where the
    process group takes tensors.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> Collective:
        """Returns the default process group for a model on this device, or a single rank."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(device=device)
        if device.type == "mps" or dist.get_backend() in ("gloo", "mpi"):
            device = torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def sum(self, x: Tensor) -> Tensor:
        """Sums tensors of one shape over ranks; counts bools, as int64."""
        if x.dtype == torch.bool:
            x = x.long()
        if self.world_size == 1:
            return x
        # Some backends cannot add half precision.
        wide = torch.float32 if x.is_floating_point() and x.element_size() < 4 else x.dtype
        total = x.to(self.device, wide, copy=True)
        with _peer_errors():
            dist.all_reduce(total)
        return total.to(x.device, x.dtype)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Returns the tensors of all ranks, in rank order; sizes and dtypes may differ."""
        if self.world_size == 1:
            return [x]
        rows = [x] * self.world_size
        with _peer_errors():
            dist.all_gather_object(rows, x.detach().to("cpu", copy=True))
        return [row.to(x.device) for row in rows]

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor([flag])).item())

    def first_text(self, text: str) -> str:
        """Returns the text of the first rank that has one, on every rank; empty if none has."""
        rows = self.gather(torch.tensor(list(text.encode()), dtype=torch.uint8))
        texts = (bytes(row.tolist()).decode() for row in rows)
        return next(filter(None, texts), "")

    def first_bytes(self, data: bytes) -> bytes:
        """Returns the bytes of the first rank on every rank."""
        size = int(self.agreed(torch.tensor(len(data))))
        if self.world_size == 1 or not size:
            return data if self.rank == 0 else b""
        mine = torch.frombuffer(bytearray(data if self.rank == 0 else size), dtype=torch.uint8)
        return self.agreed(mine).byte().numpy().tobytes()

    def all_or_none(self, work: Callable[[], Result], failed: str) -> Result:
        """Returns this rank's `work()`, which exchanges nothing; if one rank fails all raise, so that none waits.

        An error of this package is raised on every rank. Other errors are raised on their own ranks, with an
        `OtherRankError` about what `failed` elsewhere.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if not self.any(error is not None):
            return result
        # The nearest class of this package, or None.
        kind = next((kind for kind in type(error).mro() if PACKAGE_ERRORS.get(kind.__name__) is kind), None)
        elsewhere = OtherRankError(failed, "look at that rank's own error.")
        if self.any(error is not None and kind is None):
            raise elsewhere if error is None or kind is not None else error
        name, _, message = self.first_text("" if kind is None else f"{kind.__name__}\n{error}").partition("\n")
        if error is not None and type(error).__name__ == name:
            raise error
        raise PACKAGE_ERRORS[name](message) from (error or elsewhere)

    def agreed(self, values: Tensor) -> Tensor:
        """Returns the first rank's values on every rank, which may differ by rounding."""
        return self.sum(values if self.rank == 0 else torch.zeros_like(values))


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        hint = "look at that rank's own error; the weights here are unchanged."
        raise OtherRankError(f"another rank has ended or does not answer: {first_line(error)}", hint) from error
