"""How a model is run on a batch where that is more than `model(*args, **kwargs)`; it travels with the inputs."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_nrl._utils.preserve import preserve
from lightning_nrl.errors import ConfigurationError

__all__ = ["ADAPTER_HINT", "ModelAdapter", "ModelCall", "as_adapter", "bound", "required_parameters", "run_model"]

Unpacked = tuple[tuple[Any, ...], Mapping[str, Any], Any]

ADAPTER_HINT = """give what is deployed as `data=DataOptions(adapter=predict)`, here for a batch `(x, y)`:

    def predict(module, batch):
        x, y = batch
        logits = module.net(x)  # as your own step makes them: normalised, embedded, chosen
        return logits, y
"""


class ModelCall(ABC):
    """Runs a model on a raw batch. It stands first in the `args` of a `Batch`, the raw batch second (`run_model`)."""

    @abstractmethod
    def __call__(self, model: nn.Module, raw: Any) -> Any:
        """What the model predicts, with gradients; `raw` may hold some of the batch's samples only."""


@dataclass(frozen=True)
class _AdapterCall(ModelCall):
    adapt: Callable[[nn.Module, Any], tuple[Any, Any]]

    def __call__(self, model: nn.Module, raw: Any) -> Any:
        return _pair(self.adapt(model, raw))[0]


@dataclass(frozen=True)
class ModelAdapter:
    """An adapter that runs the model itself: `adapt(module, batch) -> (logits, target)`.

    It is run once more for each batch that is read, without gradients, for the target.
    """

    adapt: Callable[[nn.Module, Any], tuple[Any, Any]]
    model: nn.Module | None = None  # whose predictions it is asked for; see `bound`

    def __call__(self, raw: Any) -> Unpacked:
        """`(args, kwargs, target)` for `run_model`; a `ConfigurationError` where no model is known."""
        if self.model is None:
            raise ConfigurationError(
                "`adapter`: f(module, batch) -> (logits, target) cannot be used here, where inputs are needed.",
                "give f(batch) -> (args, kwargs, target).",
            )
        with torch.no_grad(), preserve(self.model):
            _, target = _pair(self.adapt(self.model, raw))
        return (_AdapterCall(self.adapt), raw), {}, target


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a model gives for the inputs of a batch."""
    if args and isinstance(args[0], ModelCall):
        return args[0](model, *args[1:])
    return model(*args, **kwargs)


def bound(adapter: Callable[[Any], Unpacked], model: nn.Module) -> Callable[[Any], Unpacked]:
    """An adapter ready to be called with a raw batch alone: one that runs the model gets it."""
    adapter = as_adapter(adapter)
    return replace(adapter, model=model) if isinstance(adapter, ModelAdapter) else adapter


def as_adapter(function: Callable[..., Any]) -> Callable[[Any], Unpacked]:
    """The adapter that a function is: one of two required parameters runs the model, f(module, batch)."""
    return ModelAdapter(function) if required_parameters(function) == 2 else function


def required_parameters(function: Callable[..., Any]) -> int:
    """How many positional parameters without a default a function has; 0 where it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _pair(found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigurationError(
            f"`adapter`: f(module, batch) returned {type(found).__name__}, not (logits, target).", ADAPTER_HINT
        )
    return found
