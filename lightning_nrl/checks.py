"""What can be known to be wrong before training starts."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelPruning, StochasticWeightAveraging

from lightning_nrl.errors import ConfigurationError, check_choice, explain

__all__ = ["check_arguments", "check_kind", "check_namespace", "check_order", "check_strategy"]

SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLA")


def check_arguments(
    *, n_passed: int | None, start_from: str, seed: int, budget: int | None, layer: Any, localizer: Any
) -> None:
    """Refuses numbers and names that have no meaning.

    Raises:
        ConfigurationError: the first of them.
    """
    check_choice("start_from", start_from, ("last", "best"))
    if n_passed is not None and not _whole(n_passed, 1):
        raise ConfigurationError(
            explain(f"`n_passed={n_passed!r}` must be positive.", "leave it out to score every known passed sample.")
        )
    if not _whole(seed, 0) or seed >= 2**32:
        raise ConfigurationError(explain(f"`seed={seed!r}` is no seed.", "give a whole number from 0 to 2**32 - 1."))
    if budget is not None and not _whole(budget, 1):
        raise ConfigurationError(
            explain(f"`budget={budget!r}` must be a positive number of bytes.", "leave it out to use what is free.")
        )
    if localizer is not None and not (callable(localizer) and hasattr(localizer, "include_bias")):
        raise ConfigurationError(
            explain(f"`localizer={localizer!r}` is no localizer.", "give a `NeuRecoverLite(...)`, or leave it out.")
        )
    names = layer if isinstance(layer, (list, tuple)) else [layer]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(explain(f"`layer={layer!r}` names no layer.", "name one, or say `layer='auto'`."))


def check_kind(argument: str, value: Any, kind: type[Any], hint: str) -> None:
    """Refuses a value of another kind than the argument's.

    Raises:
        ConfigurationError: it is.
    """
    if not isinstance(value, kind):
        raise ConfigurationError(explain(f"`{argument}={value!r}` is no {kind.__name__}.", hint))


def check_namespace(trainer: Any) -> None:
    """Refuses a trainer of the package `lightning`, whose classes are others than those of `pytorch_lightning`.

    Raises:
        ConfigurationError: it is.
    """
    if not isinstance(trainer, pl.Trainer):
        raise ConfigurationError(
            explain(
                f"`trainer`: found a {type(trainer).__name__} of `{type(trainer).__module__}`.",
                "import everything from `pytorch_lightning`; the classes of `lightning.pytorch` do not mix with it.",
            )
        )


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuses strategies under which no rank holds the whole layer.

    Raises:
        ConfigurationError: the strategy shards the model.
    """
    name = type(trainer.strategy).__name__
    if name.startswith(SHARDED) or "Sharded" in name:
        raise ConfigurationError(
            explain(
                f"`strategy`: {name} shards the weights, a repair needs them whole.",
                "train with it, then call `lightning_nrl.repair` on the checkpoint with a single device or ddp.",
            )
        )


def check_order(callback: Callback, trainer: pl.Trainer, start_from: str) -> None:
    """Refuses places among the callbacks where one repair of the weights undoes another.

    Raises:
        ConfigurationError: weight averaging or pruning comes after this repair, or a repair comes before it and this
            one would go back to the best checkpoint.
    """
    overwriting: list[Any] = [StochasticWeightAveraging, ModelPruning]
    averaging = getattr(pl.callbacks, "WeightAveraging", None)
    if averaging is not None:
        overwriting.append(averaging)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    place = callbacks.index(callback)
    behind = [c for c in callbacks[place + 1 :] if isinstance(c, tuple(overwriting))]
    if behind:
        raise ConfigurationError(
            explain(
                f"`callbacks`: {type(behind[0]).__name__} comes after the repair and would undo it.",
                f"put {type(callback).__name__} last.",
            )
        )
    if start_from == "best" and any(isinstance(c, type(callback)) for c in callbacks[:place]):
        raise ConfigurationError(
            explain(
                "`start_from='best'`: the best checkpoint lacks what the repair before this one does.",
                "say `start_from='best'` to the first repair alone; the next ones go on from what it left.",
            )
        )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
