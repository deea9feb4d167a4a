"""Computes weight gradients, summed or per sample, from one forward and one backward pass of a
batch.

`OutputProbe` adds a zero tensor with `requires_grad` to each layer's output. The gradient at this
tensor and the layer's input determine the weight gradient, so the weights need not require
gradients.

Functions here take inputs and outputs as `r` rows, `r x ...`. A row of a Linear is a vector of
features, so a sample with a sequence has several rows. A row of a convolution is a sample,
`channels x space...`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as convolution

from lightning_nrl._utils.device import Context, at_least_float32, no_autocast, repeatable_gradients
from lightning_nrl.data.batch import Batch, is_sliceable, run_model
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.layers import Convolution, Layer, force_eager
from lightning_nrl.tasks import Task


def as_rows(layer: Layer, x: Tensor) -> Tensor:
    """Reshapes a layer's input or output to rows, `r x ...`: feature vectors of a Linear, samples
    of a convolution.
    """
    return x.reshape(-1, *x.shape[1 - layer.weight.ndim :])


def uses_per_weight(layer: Layer, output: Tensor) -> int:
    """Returns how many inputs each weight is multiplied with to get `output`: one per row and
    position in space.
    """
    return output.numel() // len(layer.weight)


def absolute_input(layer: Layer, x: Tensor) -> Tensor:
    """Sums the absolute values of the inputs that each weight multiplies. The result has the
    weight's shape.
    """
    # For a convolution, the sums are the kernel gradient of a depthwise convolution of |x|; the
    # output gradient is 1.
    total = x.abs().sum(0)
    if isinstance(layer, nn.Linear):
        return total.expand_as(layer.weight)
    channels, groups, shape = len(total), layer.groups, layer.weight.shape
    padded = pad_input(layer, total.unsqueeze(0))
    positions = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded.shape[2:], shape[2:], layer.stride, layer.dilation, strict=True
        )
    ]
    one = padded.new_ones(()).expand(1, channels, *positions)
    sums = _kernel_gradient(layer, padded, one, (channels, 1, *shape[2:]), channels)
    by_group = sums.reshape(groups, 1, *shape[1:])
    return by_group.expand(-1, shape[0] // groups, *by_group.shape[2:]).reshape(shape)


def windows(layer: Layer, x: Tensor, max_positions: int = 2**62) -> Tensor:
    """Unfolds inputs into windows: the values that one output channel multiplies by its weights at
    one
    position.

    The shape is `groups x (r * positions) x weights per output channel`. A Linear has one position
    per row, and a convolution one position for each place of its kernel. About `max_positions` per
    row are kept, evenly spread.
    """
    if isinstance(layer, nn.Linear):
        return x[None]
    x = pad_input(layer, x)
    n_dims = x.ndim - 2
    side = max(1, int(max_positions ** (1 / n_dims)))
    for i, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        # Only views are made here, so skipped positions are never copied.
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        x = x[(slice(None),) * (2 + i) + (slice(None, None, -(-x.shape[2 + i] // side)),)]
    x = torch.unflatten(x, 1, (layer.groups, -1))
    order = (1, 0, *range(3, 3 + n_dims), 2, *range(3 + n_dims, x.ndim))
    return x.permute(order).flatten(2 + n_dims).flatten(1, -2)


def pad_input(layer: Convolution, x: Tensor) -> Tensor:
    """Pads an input as the convolution would, in its padding mode."""
    sides = layer._reversed_padding_repeated_twice
    if not any(sides):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, sides, mode=mode)


MAX_GRADIENT_ENTRIES = (
    2**24
)  # largest number of samples x weights for which gradients are held at once


class LayerCall(NamedTuple):
    """Input and output gradient of one call of a layer, as rows (see `as_rows`), at least float32."""

    input: Tensor  # r x ...
    gradient: Tensor  # r x ..., the gradient at the layer's output


class OutputProbe:
    """Adds a zero tensor that requires a gradient to the outputs of layers, and records the inputs
    of the layers.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.seen: list[
            tuple[str, Tensor, Tensor]
        ] = []  # by call: layer name, input, zero added to the output

    @property
    def called(self) -> list[str]:
        return [name for name, *_ in self.seen]

    def add_zero(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        """Records a call of the layer `name` and returns `output` plus a zero that requires a
        gradient.
        """
        zero = torch.zeros_like(output, requires_grad=True)
        # A copy, since the model may change its tensors in place.
        self.seen.append((name, x.detach().clone(), zero))
        return output + zero

    def hooked(self) -> AbstractContextManager[Any]:
        """Returns a context that records calls of the layers. Calls of `F.linear` with their
        weights do not count.
        """

        def hook_of(name: str) -> Any:
            return lambda module, args, output: self.add_zero(name, args[0], output)

        stack = ExitStack()
        stack.enter_context(force_eager())
        for name, layer in self.layers.items():
            stack.callback(layer.register_forward_hook(hook_of(name)).remove)
        return stack

    def gradients(
        self, values: Tensor, weights: Tensor, *, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Returns gradients of `(weights * values).sum()` at recorded outputs; `()` if not
        `values.requires_grad`.
        """
        zeros = [zero for *_, zero in self.seen]
        if not zeros or not values.requires_grad:
            return ()
        with no_autocast(values.device):
            return torch.autograd.grad(
                values, zeros, weights, retain_graph=retain_graph, materialize_grads=True
            )

    def calls(self, values: Tensor) -> dict[str, list[LayerCall]]:
        """Returns each layer's calls, with gradients of `values.sum()`; no calls if not
        `values.requires_grad`.
        """
        calls: dict[str, list[LayerCall]] = {name: [] for name in self.layers}
        gradients = self.gradients(values, torch.ones_like(values))
        for (name, x, _), gradient in zip(self.seen, gradients, strict=bool(gradients)):
            calls[name].append(
                LayerCall(*(at_least_float32(as_rows(self.layers[name], t)) for t in (x, gradient)))
            )
        return calls


def margin_calls(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, task: Task, context: Context
) -> tuple[Tensor, dict[str, list[LayerCall]]]:
    """Computes the margins of a batch, `n`, and each layer's calls with the gradients of the sum of
    the margins.

    The list of a layer's calls is empty if the first dimension of the layer's input does not count
    samples, or if the margins have no gradient. Raises a `ConfigurationError` for a task without
    margins.
    """
    probe = OutputProbe(layers)
    with probe.hooked(), torch.enable_grad(), repeatable_gradients(model):
        with context():
            output = task.logits(run_model(model, batch.args, batch.kwargs))
        margin = task.margin(output, batch.target)
        if margin is None:
            raise ConfigurationError(
                f"`task`: {type(task).__name__} has no `margin`.", "give the task a `margin`."
            )
        calls = probe.calls(margin)
    n, sliceable = len(margin), is_sliceable((batch.args, batch.kwargs), len(margin))
    for name, x, _ in probe.seen:
        # In a batch of graphs, the number of nodes may be a multiple of the number of samples by
        # chance.
        if len(x) % n if sliceable else len(x) != n:
            calls[name] = []
    return margin, calls


def is_by_sample(calls: Sequence[LayerCall], n: int) -> bool:
    """True if there are calls, and the number of rows of every call is a multiple of the number of
    samples `n`.
    """
    return bool(calls) and all(len(x) % n == len(g) % n == 0 for x, g in calls)


def sample_gradients(
    layer: Layer, calls: Sequence[LayerCall], n: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, for `m` samples at a time, gradients of the weight, `m x weight shape`, and the bias,
    `m x outputs`.
    """
    size = layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
    for start in range(0, n, step := max(1, MAX_GRADIENT_ENTRIES // size)):
        block = [
            [torch.unflatten(t, 0, (n, -1))[start : start + step] for t in call] for call in calls
        ]
        weight = torch.stack([_weight_gradients(layer, x, g) for x, g in block]).sum(0)
        # g has the shape `m x p x outputs x space...`, with p rows per sample.
        bias = torch.stack([g.transpose(1, 2).flatten(2).sum(2) for _, g in block]).sum(0)
        yield weight, bias


def weight_gradient(layer: Layer, x: Tensor, gradient: Tensor) -> Tensor:
    """Computes the weight gradient, summed over rows, from the layer's input and output gradient,
    `r x ...` each.
    """
    if isinstance(layer, nn.Linear):
        return gradient.T @ x
    return _kernel_gradient(layer, pad_input(layer, x), gradient, layer.weight.shape, layer.groups)


def bias_gradient(gradient: Tensor) -> Tensor:
    """Computes the bias gradient, summed over rows, from the output gradient, `r x outputs x
    space...`.
    """
    return gradient.transpose(0, 1).flatten(1).sum(1)


def _weight_gradients(layer: Layer, x: Tensor, gradient: Tensor) -> Tensor:
    """Computes the weight gradients of `m` samples, `m x weight shape`, from `p` rows per sample,
    `m x p x ...`.
    """
    if isinstance(layer, nn.Linear):
        return torch.bmm(gradient.mT, x)
    # One grouped convolution computes all gradients; each sample is a group of channels.
    m, (out, *kernel) = len(x), layer.weight.shape
    x, gradient = (t.transpose(0, 1).flatten(1, 2) for t in (x, gradient))
    found = _kernel_gradient(
        layer, pad_input(layer, x), gradient, (m * out, *kernel), m * layer.groups
    )
    return torch.unflatten(found, 0, (m, -1))


def _kernel_gradient(
    layer: Convolution, x: Tensor, gradient: Tensor, shape: Sequence[int], groups: int
) -> Tensor:
    kernel: Any = getattr(convolution, f"conv{x.ndim - 2}d_weight")
    found: Tensor = kernel(
        x, shape, gradient, stride=layer.stride, dilation=layer.dilation, groups=groups
    )
    return found
