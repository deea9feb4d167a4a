"""Models whose weights `fully_shard` has split over ranks, so that no rank holds a whole layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import TypeIs

if TYPE_CHECKING:  # the imports take a second, so that functions do them
    from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Puts the ranks' parts back in place of layers that a forward pass has left whole."""
    if is_sharded(model):
        # Its hooks do it, while `FSDPModule.reshard` does nothing after a pass that failed.
        model.state_dict()


def is_split(x: Tensor) -> TypeIs[DTensor]:
    if type(x) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def own_part(x: Tensor) -> Tensor:
    """Returns this rank's part of a split tensor, in the same memory, or a whole tensor itself."""
    return x.to_local() if is_split(x) else x


def placed_like(old: Tensor, x: Tensor) -> Tensor:
    """Returns `x` with the dtype, device and split of `old`; all ranks must call it."""
    x = x.to(old.device, old.dtype)
    if not is_split(old):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, old.device_mesh, old.placements)
