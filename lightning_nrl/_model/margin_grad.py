"""How margins depend on layers: their inputs and output gradients, caught by hooks in one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_nrl._model.layers import Layer
from lightning_nrl._model.weight_grad import rows
from lightning_nrl._utils.precision import Context, at_least_float32, no_autocast, repeatable_gradients
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.tasks import Task

__all__ = ["Call", "by_sample", "trace"]


class Call(NamedTuple):
    """One call of a layer, both as rows, at least float32."""

    input: Tensor  # r x ...
    gradient: Tensor  # r x ..., of the sum of margins at the layer's output


def trace(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, task: Task, context: Context
) -> tuple[Tensor, dict[str, list[Call]]]:
    """The margins of a batch, `n`, and the calls of each layer.

    There are none for a layer that gradients do not reach, or that does not have the samples in its first dimension.

    Args:
        model: in evaluation mode. Its weights need not ask for gradients, and get none.
        layers: by name; they see calls of the module alone, not of a function that is given their weights.
        batch: as large as memory allows in training.
        task: has margins.
        context: entered around the forward pass.

    Raises:
        ConfigurationError: the task has no margin.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def add_zero(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            # A copy, since the model may go on to change its own tensors in place.
            seen.append((name, args[0].detach().clone(), zero))
            return output + zero

        return hook

    with _hooked(layers, add_zero), torch.enable_grad(), repeatable_gradients(model):
        with context():
            output = task.logits(model(*batch.args, **batch.kwargs))
        margin = task.margin(output, batch.target)
        if margin is None:
            raise ConfigurationError(
                explain(
                    f"`task`: {type(task).__name__} has no margin, so there are no gradients of it.",
                    "give the task a `margin`.",
                )
            )
        with no_autocast(margin.device):
            zeros = [zero for *_, zero in seen]
            gradients = (
                torch.autograd.grad(margin.sum(), zeros, materialize_grads=True)
                if seen and margin.requires_grad
                else ()
            )
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    for (name, x, _), gradient in zip(seen, gradients, strict=False):
        calls[name].append(Call(*(at_least_float32(rows(layers[name], t)) for t in (x, gradient))))
    for name in {name for name, x, _ in seen if len(x) % len(margin)}:
        # Time first, for instance: as many rows for each sample, but not one sample after the other.
        calls[name] = []
    return margin, calls


def by_sample(calls: Sequence[Call], n: int) -> bool:
    """Whether a layer was called, each time with as many rows for each of `n` samples."""
    return bool(calls) and all(len(x) % n == len(g) % n == 0 for x, g in calls)


@contextmanager
def _hooked(layers: Mapping[str, Layer], make: Callable[[str], Callable[..., Tensor]]) -> Iterator[None]:
    handles = [layer.register_forward_hook(make(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
