"""Copies of a module and a data module for a training that leaves the originals unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._trainer.lightning.packages import (
    Callback,
    LightningDataModule,
    LightningModule,
)
from lightning_nrl._trainer.lightning.private_parts import (
    Loaders,
    release_copy,
    shared_with_copies,
)
from lightning_nrl._trainer.lightning.step_outputs import no_op
from lightning_nrl._trainer.trainer_state import DROPPED_CALLBACKS
from lightning_nrl._utils.state import State, write
from lightning_nrl.methods.solvers.distill import WEIGHT_DECAY

WARM_UP_SHARE = 0.1  # share of the steps in which the learning rate of `_adamw` rises


def copied_module(
    module: LightningModule,
    state: State,
    modes: Mapping[nn.Module, bool],
    *,
    shared: Sequence[object],
    left_out: tuple[type, ...] = (),
    rate: float | None = None,
) -> LightningModule:
    """Copies a module for training; leaves the module and its trainer unchanged.

    Hooks that download data, and hooks after training (which save, export or report), do nothing in
    the copy.

    Args:
        module: the module to copy.
        state: weights that the copy gets after `setup`, which may create layers again.
        modes: training flags of parts of the module; other parts train.
        shared: objects to share with the copy, such as data sets. Locks and open files are always
            shared.
        left_out: classes of callbacks that the copy drops in addition to `DROPPED_CALLBACKS`.
        rate: learning rate of an AdamW that replaces the module's optimizers; None: keep the
            module's optimizers.
    """
    memo = {id(part): part for part in (*shared, *shared_with_copies(module))}
    with torch.no_grad():  # so that parameters of scripted modules stay leaves
        try:
            new = copy.deepcopy(module, dict(memo))
        except Exception:
            _share_uncopyable(module, memo)
            new = copy.deepcopy(module, memo)
    for old_parameter, parameter in zip(module.parameters(), new.parameters(), strict=True):
        parameter.requires_grad_(old_parameter.requires_grad)
    release_copy(new)
    for old_part, part in zip(module.modules(), new.modules(), strict=True):
        part.training = modes.get(old_part, True)
    configure_callbacks = new.configure_callbacks
    hooks = {
        "prepare_data": no_op,
        "configure_model": partial(write, new, state),
        "configure_callbacks": lambda: _kept_callbacks(configure_callbacks(), left_out),
        "on_train_end": no_op,
        "on_fit_end": no_op,
    }
    if rate is not None:
        hooks["configure_optimizers"] = partial(_adamw, new, rate)
        hooks["lr_scheduler_step"] = lambda scheduler, metric: scheduler.step()
    for name, hook in hooks.items():
        setattr(new, name, hook)
    return new


def copied_data_module(data: LightningDataModule, loader: Loaders) -> LightningDataModule:
    """Copies a data module, but not its data, with the training loader `loader`."""
    new = copy.copy(data)
    for name in ("prepare_data", "setup", "teardown"):
        setattr(new, name, no_op)
    new.train_dataloader = lambda: loader  # type: ignore[method-assign]
    return new


def _adamw(module: LightningModule, rate: float) -> dict[str, Any]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY)
    total = max(1, int(module.trainer.estimated_stepping_batches))
    warm_up = max(1, round(WARM_UP_SHARE * total))

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warm_up)
        return rise * (1 + math.cos(math.pi * min(1.0, step / total))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _kept_callbacks(
    callbacks: Sequence[Callback] | Callback, left_out: tuple[type, ...]
) -> list[Callback]:
    if isinstance(callbacks, Callback):
        callbacks = [callbacks]
    dropped = (*DROPPED_CALLBACKS, *left_out)
    return [callback for callback in callbacks if not isinstance(callback, dropped)]


def _share_uncopyable(module: nn.Module, memo: dict[int, object]) -> None:
    """Adds attributes that cannot be copied to the `memo` of a deep copy."""
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                _share_in(value, memo)


def _share_in(value: object, memo: dict[int, object]) -> None:
    if id(value) in memo or isinstance(value, nn.Module):
        return
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()  # a computed tensor, without its graph
    elif isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            _share_in(item, memo)
    else:
        try:
            copy.deepcopy(value, dict(memo))
        except Exception:
            memo[id(value)] = value
