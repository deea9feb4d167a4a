"""`Collective`: sums, gathers, broadcasts and errors over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
Value = TypeVar("Value")
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

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sums the gradients of all ranks; one that is missing on all ranks stays missing."""
        n_ranks = self.sum(torch.tensor([parameter.grad is not None for parameter in parameters]))
        for parameter, n in zip(parameters, n_ranks.tolist(), strict=True):
            if n:
                gradient = parameter.grad
                parameter.grad = self.sum(
                    torch.zeros_like(parameter) if gradient is None else gradient
                )

    def gather(self, x: Tensor) -> list[Tensor]:
        """Returns the tensors of all ranks, in rank order; sizes and dtypes may differ."""
        if self.world_size == 1:
            return [x]
        rows = self.gather_objects(x.detach().to("cpu", copy=True))
        return [row.to(x.device) for row in rows]

    def gather_sorted(
        self, rows: Sequence[Tensor], *columns: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Joins the parts of `rows` and of each column of all ranks, sorted by row."""
        joined = []
        for parts in (rows, *columns):
            shares = self.gather(torch.cat([*parts]) if parts else torch.zeros(0))
            joined.append(torch.cat([share for share in shares if len(share)] or shares))
        order = joined[0].argsort()
        return tuple(column[order.to(column.device)] for column in joined)

    def gather_objects(self, value: Value) -> list[Value]:
        """Returns the values of all ranks, in rank order; the values must be picklable."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with _peer_errors():
                dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor([flag])).item())

    def first_text(self, text: str) -> str:
        """Returns on every rank the first text in rank order that is not empty, if there is one."""
        return next(filter(None, self.gather_objects(text)), "")

    def of_first(self, value: Value) -> Value:
        """Returns, on every rank, the value of the first rank, which must be picklable."""
        values = [value]
        if self.world_size > 1:
            with _peer_errors():
                dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def all_or_none(self, work: Callable[[], Result], failed: str) -> Result:
        """Returns `work()` of this rank; if it fails on one rank, all raise, so that none waits.

        `work` must not exchange anything between ranks. An error of this package is raised on every
        rank. Any other error is raised on its own rank, while the other ranks raise an
        `OtherRankError` with the message `failed` and the cause.
        """
        error = foreign_error = first_failure = None
        try:
            result = work()
        except RepairError as caught:
            error = caught
            first_failure = _package_class(error).__name__, error.problem, error.hint
        except Exception as caught:
            foreign_error = caught
        if not self.any(error is not None or foreign_error is not None):
            return result
        elsewhere = self.error_elsewhere(failed, foreign_error)
        if self.any(foreign_error is not None):
            raise foreign_error or elsewhere
        name, problem, hint = next(filter(None, self.gather_objects(first_failure)))
        if error is not None and type(error).__name__ == name:
            raise error
        raise PACKAGE_ERRORS[name](problem, hint) from (error or elsewhere)

    def error_elsewhere(self, failed: str, error: Exception | None) -> OtherRankError:
        """Returns an error for the ranks without an `error`, which names that of another rank."""
        cause = "" if error is None else f" {type(error).__name__}: {first_line(error)}"
        return OtherRankError(failed + self.first_text(cause), "look at the error of that rank.")

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
