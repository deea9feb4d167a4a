"""Checks, before training starts, that a repair is possible under a trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_nrl._trainer.lightning.packages import (
    Callback,
    Trainer,
    callback_kinds,
    packages_of,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    callbacks_of,
    data_module_of,
    original_module,
)
from lightning_nrl.errors import ConfigurationError, NotRepairedWarning

SHARDING_STRATEGIES = ("FSDP", "DeepSpeed", "ModelParallel", "XLA")
"""Prefixes of strategies that shard layers over processes."""
UNTESTED_STRATEGIES = ("SingleDeviceXLA", "SingleTPU", "HPU", "SingleHPU")
SHARDED_CLASSES = ("DTensor", "FlatParameter", "FSDPModule", "FullyShardedDataParallel")
OVERWRITING_CALLBACKS = callback_kinds("StochasticWeightAveraging WeightAveraging ModelPruning")
"""Callbacks that write weights when training ends."""


def check_packages(trainer: Any, **others: object) -> None:
    """Refuses callbacks, loggers, data and `others` that are not of the same Lightning package as
    the trainer.
    """
    if not isinstance(trainer, Trainer):
        found = f"`trainer`: found a {type(trainer).__name__} of `{type(trainer).__module__}`."
        raise ConfigurationError(
            found, "give a Trainer of `lightning.pytorch` or of `pytorch_lightning`."
        )
    own = packages_of(trainer)[0]
    attached: list[tuple[str, object]] = [
        ("callbacks", callback) for callback in callbacks_of(trainer)
    ]
    attached += [("logger", logger) for logger in trainer.loggers]
    for argument, thing in (*others.items(), *attached, ("datamodule", data_module_of(trainer))):
        packages = packages_of(original_module(thing) if isinstance(thing, nn.Module) else thing)
        if packages and own not in packages:
            problem = f"`{argument}`: {type(thing).__name__} is of `{packages[0]}`, the Trainer of `{own}`."
            raise ConfigurationError(
                problem, "import everything from one of the two packages, not from both."
            )


def check_strategy(
    trainer: Trainer,
    why: str = "a repair needs them whole",
    hint: str = "train with it, then call `lightning_nrl.repair` on the checkpoint with a single device or ddp.",
) -> None:
    """Refuses strategies that shard the model, and strategies for XLA and HPUs."""
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if any(name.startswith(SHARDING_STRATEGIES) or "Sharded" in name for name in names):
        raise ConfigurationError(f"`strategy`: {names[0]} shards the weights, {why}.", hint)
    if any(name.startswith(UNTESTED_STRATEGIES) for name in names):
        raise ConfigurationError(
            f"`strategy`: {names[0]} runs on XLA or Habana, which was never tried.", hint
        )


def check_whole(model: nn.Module) -> None:
    """Refuses a model that its own code has sharded (`fully_shard`, `FullyShardedDataParallel`,
    `DTensor`).
    """
    for name, part in [*model.named_modules(), *model.named_parameters()]:
        kind = next(
            (kind.__name__ for kind in type(part).__mro__ if kind.__name__ in SHARDED_CLASSES), None
        )
        if kind is not None:
            problem = f"{name or type(part).__name__!r} is a {kind}, split over ranks; a repair needs layers whole."
            hint = "train with it, then call `lightning_nrl.repair` on the checkpoint with a model that is not sharded."
            raise ConfigurationError(f"`model`: {problem}", hint)


def check_order(
    callback: Callback,
    trainer: Trainer,
    earlier: tuple[type, ...] = (),
    start_from: str = "last",
    what: str = "the repair",
    kind: type = Callback,
) -> None:
    """Refuses an order of callbacks in which one callback undoes a change of the weights by
    another.

    Callbacks of the classes `OVERWRITING_CALLBACKS` and `earlier` must not come after `callback`.
    If `start_from` is `best`, callbacks of the classes `earlier` and `kind` must not come before
    `callback`: it would undo their change.
    """
    callbacks = callbacks_of(trainer)
    place = callbacks.index(callback)
    behind = [
        c for c in callbacks[place + 1 :] if isinstance(c, (*OVERWRITING_CALLBACKS, *earlier))
    ]
    if behind:
        problem = f"`callbacks`: {type(behind[0]).__name__} comes after {what} and would undo it."
        raise ConfigurationError(problem, f"put {type(callback).__name__} after it.")
    before = [c for c in callbacks[:place] if isinstance(c, (kind, *earlier))]
    if start_from == "best" and before:
        repairs = isinstance(before[0], kind)
        whose = "the repair before this one" if repairs else f"{type(before[0]).__name__} before it"
        hint = "leave `start_from='best'` out; the repair then starts from the changed weights."
        if repairs:
            hint = "set `start_from='best'` for the first repair only; the next repair starts from its result."
        raise ConfigurationError(
            f"`start_from='best'`: the best checkpoint lacks the change by {whose}.", hint
        )


def check_twins(callback: Callback, trainer: Trainer) -> None:
    """Refuses two callbacks of one class with the same `state_key`, under which a checkpoint keeps
    their state.
    """
    twins = [
        c
        for c in callbacks_of(trainer)
        if type(c) is type(callback) and c.state_key == callback.state_key
    ]
    if len(twins) > 1:
        problem = f"`callbacks`: there are {len(twins)} {type(callback).__name__} of the same layer and target."
        raise ConfigurationError(
            problem, "leave one of them out, or name another `layer` or `target`."
        )


def warn_without_step() -> None:
    problem = "no repair was made, because no training step ran (training was complete, skipped or stopped)."
    hint = "to repair a trained checkpoint, call `lightning_nrl.repair(trainer, model, ckpt_path=...)`."
    rank_zero_warn(NotRepairedWarning(problem, hint))
