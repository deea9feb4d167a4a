"""`Collective`: sums, gathers, broadcasts and errors over ranks."""

from __future__ import annotations

import json
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
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, RepairError)
}


@dataclass(frozen=True)
class Collective:
    """The ranks that work on one repair. All ranks must call the methods in the same order.

    With a `world_size` of 1 nothing is exchanged. `device` is the device on which the process group
    exchanges tensors; a method returns tensors on the device of its argument.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> Collective:
        """Returns the ranks of torch's default process group, or a single rank without a group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(device=device)
        if device.type == "mps" or dist.get_backend() in ("gloo", "mpi"):
            device = torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def sum(self, x: Tensor) -> Tensor:
        """Sums a tensor, of the same shape on each rank, over all ranks; bools become int64."""
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
        """Returns on every rank the first text in rank order that is not empty, if there is one."""
        for row in self.gather(torch.tensor(list(text.encode()), dtype=torch.uint8)):
            if len(row):
                return bytes(row.tolist()).decode()
        return ""

    def first_bytes(self, data: bytes) -> bytes:
        """Returns, on every rank, the `data` of the first rank."""
        if self.world_size == 1:
            return data
        size = int(self.agreed(torch.tensor(len(data))))
        if not size:
            return b""
        buffer = bytearray(data if self.rank == 0 else size)
        values = self.agreed(torch.frombuffer(buffer, dtype=torch.uint8))
        return values.byte().numpy().tobytes()

    def all_or_none(self, work: Callable[[], Result], failed: str) -> Result:
        """Returns `work()` of this rank; if it fails on one rank, all raise, so that none waits.

        `work` must not exchange anything between ranks. An error of this package is raised on every
        rank. Any other error is raised on its own rank, while the other ranks raise an
        `OtherRankError` with the message `failed`.
        """
        error = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if not self.any(error is not None):
            return result
        elsewhere = OtherRankError(failed, "look at the error of that rank.")
        is_foreign = error is not None and not isinstance(error, RepairError)
        if self.any(is_foreign):
            raise error if error is not None and is_foreign else elsewhere
        text = ""
        if isinstance(error, RepairError):
            text = json.dumps([_package_class(error).__name__, error.problem, error.hint])
        name, problem, hint = json.loads(self.first_text(text))
        if error is not None and type(error).__name__ == name:
            raise error
        raise PACKAGE_ERRORS[name](problem, hint) from (error or elsewhere)

    def agreed(self, values: Tensor) -> Tensor:
        """Returns on every rank the values of the first rank, where ranks may round differently."""
        return self.sum(values if self.rank == 0 else torch.zeros_like(values))


def _package_class(error: Exception) -> type[Exception]:
    """Returns the class of this package that the error's class is or extends."""
    return next(kind for kind in type(error).mro() if PACKAGE_ERRORS.get(kind.__name__) is kind)


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise OtherRankError(
            f"another rank has ended or does not answer: {first_line(error)}",
            "look at the error of that rank; the weights on this rank are unchanged.",
        ) from error
