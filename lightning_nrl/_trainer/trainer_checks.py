"""Checks, before training starts, that a repair is possible under a trainer."""

from __future__ import annotations

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


def check_packages(trainer: object, **arguments: object) -> None:
    """Refuses callbacks, loggers, data and `arguments` of another Lightning package."""
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(
            f"`trainer`: found a {type(trainer).__name__} of `{type(trainer).__module__}`.",
            "give a Trainer of `lightning.pytorch` or of `pytorch_lightning`.",
        )
    parts = [*arguments.items()]
    parts += [("callbacks", callback) for callback in callbacks_of(trainer)]
    parts += [("logger", logger) for logger in trainer.loggers]
    parts.append(("datamodule", data_module_of(trainer)))
    package = packages_of(trainer)[0]
    for argument, part in parts:
        packages = packages_of(original_module(part) if isinstance(part, nn.Module) else part)
        if packages and package not in packages:
            kind = type(part).__name__
            raise ConfigurationError(
                f"`{argument}`: {kind} is of `{packages[0]}`, the Trainer of `{package}`.",
                "import everything from one of the two packages, not from both.",
            )


def check_strategy(
    trainer: Trainer,
    reason: str = "a repair needs them whole",
    hint: str = (
        "train with it, then call `lightning_nrl.repair` on the checkpoint with a single device or "
        "ddp."
    ),
    *,
    only_evaluates: bool = False,
) -> None:
    """Refuses strategies that shard the model, and strategies for XLA and HPUs.

    `only_evaluates` accepts `ModelParallelStrategy` if each rank has its own batches.
    """
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if any(name.startswith(SHARDING_STRATEGIES) or "Sharded" in name for name in names):
        if only_evaluates and "ModelParallelStrategy" in names:
            sampled = trainer.distributed_sampler_kwargs or {}
            if sampled.get("num_replicas") == trainer.world_size:
                return
        raise ConfigurationError(
            f"`strategy`: {names[0]} shards the weights, {reason}.",
            "`ReleaseGate` and `RegressionMetrics` run under `ModelParallelStrategy("
            f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1)`; {hint}",
        )
    if any(name.startswith(UNTESTED_STRATEGIES) for name in names):
        raise ConfigurationError(
            f"`strategy`: {names[0]} runs on XLA or Habana, which was never tried.", hint
        )


def check_whole(model: nn.Module) -> None:
    """Refuses a model that its own code has sharded, such as by `fully_shard`."""
    for name, part in [*model.named_modules(), *model.named_parameters()]:
        for kind in type(part).__mro__:
            if kind.__name__ in SHARDED_CLASSES:
                raise ConfigurationError(
                    f"`model`: {name or type(part).__name__!r} is a {kind.__name__}, split over "
                    "ranks; a repair needs layers whole.",
                    "train with it, then call `lightning_nrl.repair` on the checkpoint with a "
                    "model that is not sharded.",
                )


def check_order(
    callback: Callback,
    trainer: Trainer,
    earlier: tuple[type, ...] = (),
    start_from: str = "last",
    change: str = "the repair",
    kind: type = Callback,
) -> None:
    """Refuses an order of callbacks in which one undoes a change of the weights by another.

    Callbacks of the classes `OVERWRITING_CALLBACKS` and `earlier` must not come after `callback`.
    If `start_from` is `best`, callbacks of the classes `earlier` and `kind` must not come before
    `callback`: it would undo their change.
    """
    callbacks = callbacks_of(trainer)
    position = callbacks.index(callback)
    for later in callbacks[position + 1 :]:
        if isinstance(later, (*OVERWRITING_CALLBACKS, *earlier)):
            raise ConfigurationError(
                f"`callbacks`: {type(later).__name__} comes after {change} and would undo it.",
                f"put {type(callback).__name__} after it.",
            )
    if start_from != "best":
        return
    for previous in callbacks[:position]:
        if isinstance(previous, kind):
            raise ConfigurationError(
                "`start_from='best'`: the best checkpoint lacks the change by the repair before "
                "this one.",
                "set `start_from='best'` for the first repair only; the next repair starts from "
                "its result.",
            )
        if isinstance(previous, earlier):
            raise ConfigurationError(
                "`start_from='best'`: the best checkpoint lacks the change by "
                f"{type(previous).__name__} before it.",
                "leave `start_from='best'` out; the repair then starts from the changed weights.",
            )


def check_twins(callback: Callback, trainer: Trainer) -> None:
    """Refuses two callbacks of one class whose state a checkpoint keeps under one `state_key`."""
    # The key begins with the name of the class.
    n = [twin.state_key for twin in callbacks_of(trainer)].count(callback.state_key)
    if n > 1:
        raise ConfigurationError(
            f"`callbacks`: there are {n} {type(callback).__name__} of the same layer and target.",
            "leave one of them out, or name another `layer` or `target`.",
        )


def warn_without_step() -> None:
    rank_zero_warn(
        NotRepairedWarning(
            "no repair was made, because no training step ran (training was complete, skipped or "
            "stopped).",
            "to repair a trained checkpoint, call "
            "`lightning_nrl.repair(trainer, model, ckpt_path=...)`.",
        )
    )
