"""Computes weight gradients, summed or per sample, from one forward and backward pass of a batch.

`OutputProbe` adds a zero tensor with `requires_grad` to each layer's output. The gradient at this
tensor and the layer's input determine the weight gradient, so the weights need not require
gradients.

Functions here take inputs and outputs as `r` rows, `r x ...`. A row of a Linear is a vector of
features, so a sample with a sequence has several rows. A row of a convolution is a sample,
`channels x space...`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from lightning_nrl._utils.device import at_least_float32, no_autocast, repeatable_gradients
from lightning_nrl._utils.state import plain_copy
from lightning_nrl.data.batch import Batch, is_sliceable
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import Convolution, Layer, force_eager


def as_rows(layer: Layer, x: Tensor) -> Tensor:
    """Reshapes an input or output to rows: features of a Linear, samples of a convolution."""
    return x.reshape(-1, *x.shape[1 - layer.weight.ndim :])


def uses_per_weight(layer: Layer, output: Tensor) -> int:
    """Counts the inputs that each weight multiplies: one per row and position in space."""
    return output.numel() // len(layer.weight)


def absolute_input(layer: Layer, x: Tensor, output: Tensor) -> Tensor:
    """Sums the absolute values of the inputs of each weight. The result has the weight's shape."""
    total = x.abs().sum(0)
    if isinstance(layer, nn.Linear):
        return total.expand_as(layer.weight)
    # The sums are the kernel gradient of a depthwise convolution of |x|; the output gradient is 1.
    n_channels = len(total)
    ones = total.new_ones(()).expand(1, n_channels, *output.shape[2:])
    sums = _kernel_gradient(
        layer, pad_input(layer, total[None]), ones, (n_channels, 1, *layer.kernel_size), n_channels
    )
    by_group = torch.unflatten(sums, 0, (layer.groups, -1)).squeeze(2)
    outputs_per_group = len(layer.weight) // layer.groups
    return by_group.repeat_interleave(outputs_per_group, 0)


def unfolded(layer: Convolution, x: Tensor) -> Tensor:
    """Returns a view of a padded input: `r x channels x positions... x kernel...`.

    At a place of the kernel it has what this place multiplies at each output position.
    """
    x = pad_input(layer, x)
    for dim, (width, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, dilation * (width - 1) + 1, stride)[..., ::dilation]
    return x


def pad_input(layer: Convolution, x: Tensor) -> Tensor:
    """Pads an input as the convolution would, in its padding mode."""
    padding = layer._reversed_padding_repeated_twice
    if not any(padding):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, padding, mode=mode)


MAX_GRADIENT_ENTRIES = 2**24  # largest number of samples x weights of gradients in memory


class LayerCall(NamedTuple):
    """Input and output gradient of one call of a layer, as rows (see `as_rows`)."""

    input: Tensor  # r x ..., at least float32
    gradient: Tensor  # r x ..., at least float32, the gradient at the layer's output


class OutputProbe:
    """Adds a zero that requires a gradient to the outputs of layers, and records their inputs."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        # By call: layer name, input, and the zero added to the output.
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    @property
    def called(self) -> list[str]:
        return [name for name, *_ in self.seen]

    def add_zero(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        """Records a call of the layer `name`; returns `output` plus a zero with a gradient."""
        zero = torch.zeros_like(output, requires_grad=True)
        # A copy, since the model may change its tensors in place.
        self.seen.append((name, plain_copy(x), zero))
        return output + zero

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Records calls of the layers inside the context.

        Calls of `F.linear` with their weights do not count.
        """

        def hook(name: str, _: Layer, args: tuple[Tensor], output: Tensor) -> Tensor:
            return self.add_zero(name, args[0], output)

        with force_eager(), ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(layer.register_forward_hook(partial(hook, name)))
            yield

    def gradients(
        self,
        values: Tensor,
        weights: Tensor,
        *,
        retain_graph: bool = False,
    ) -> tuple[Tensor, ...]:
        """Returns gradients of `(weights * values).sum()` at the outputs of the recorded calls.

        Returns `()` if not `values.requires_grad`.
        """
        zeros = [zero for *_, zero in self.seen]
        if not zeros or not values.requires_grad:
            return ()
        with no_autocast(values.device):
            return torch.autograd.grad(
                values, zeros, weights, retain_graph=retain_graph, materialize_grads=True
            )

    def calls(self, values: Tensor) -> dict[str, list[LayerCall]]:
        """Returns each layer's calls, with gradients of `values.sum()`.

        Returns no calls if not `values.requires_grad`.
        """
        calls: dict[str, list[LayerCall]] = {name: [] for name in self.layers}
        gradients = self.gradients(values, torch.ones_like(values))
        for (name, x, _), gradient in zip(self.seen, gradients, strict=bool(gradients)):
            layer = self.layers[name]
            x = at_least_float32(as_rows(layer, x))
            gradient = at_least_float32(as_rows(layer, gradient))
            calls[name].append(LayerCall(x, gradient))
        return calls


def margin_calls(
    evaluator: Evaluator, layers: Mapping[str, Layer], batch: Batch
) -> tuple[Tensor, dict[str, list[LayerCall]]]:
    """Computes the margins of a batch, `n`, and each layer's calls with gradients of their sum.

    The list of a layer's calls is empty if the first dimension of the layer's input does not count
    samples, or if the margins have no gradient. Raises a `ConfigurationError` for a task without
    margins.
    """
    probe, task = OutputProbe(layers), evaluator.task
    with probe.hooked(), torch.enable_grad(), repeatable_gradients(evaluator.model):
        margin = task.margin(evaluator.output(batch), batch.target)
        if margin is None:
            raise ConfigurationError(
                f"`task`: {type(task).__name__} has no `margin`.", "give the task a `margin`."
            )
        calls = probe.calls(margin)
    n = len(margin)
    is_separable = is_sliceable((batch.args, batch.kwargs), n)
    for name, x, _ in probe.seen:
        # In a batch of graphs, the number of nodes may be a multiple of the number of samples by
        # chance.
        if len(x) != n and (len(x) % n or not is_separable):
            calls[name] = []
    return margin, calls


def is_by_sample(calls: Sequence[LayerCall], n: int) -> bool:
    """True if there are calls, each with a multiple of `n` rows for `n` samples."""
    return bool(calls) and all(len(rows) % n == 0 for call in calls for rows in call)


def sample_gradients(
    layer: Layer,
    calls: Sequence[LayerCall],
    n: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields gradients of weight, `m x weight shape`, and bias, `m x outputs`, of `m` samples."""
    size = layer.weight.numel()
    if layer.bias is not None:
        size += layer.bias.numel()
    samples_at_once = max(1, MAX_GRADIENT_ENTRIES // size)
    for start in range(0, n, samples_at_once):
        samples = slice(start, start + samples_at_once)
        weights = []
        biases = []
        for call in calls:
            x = torch.unflatten(call.input, 0, (n, -1))[samples]
            gradient = torch.unflatten(call.gradient, 0, (n, -1))[samples]
            weights.append(_weight_gradients(layer, x, gradient))
            # The gradient has the shape `m x p x outputs x space...`, with p rows per sample.
            biases.append(gradient.transpose(1, 2).flatten(2).sum(2))
        yield torch.stack(weights).sum(0), torch.stack(biases).sum(0)


def weight_gradient(layer: Layer, x: Tensor, gradient: Tensor) -> Tensor:
    """Computes the weight gradient from a layer's input and output gradient, summed over rows."""
    if isinstance(layer, nn.Linear):
        return gradient.T @ x
    x = pad_input(layer, x)
    return _kernel_gradient(layer, x, gradient, layer.weight.shape, layer.groups)


def bias_gradient(gradient: Tensor) -> Tensor:
    """Computes the bias gradient, summed over rows, from output gradients, `r x outputs x ...`."""
    return gradient.transpose(0, 1).flatten(1).sum(1)


def _weight_gradients(layer: Layer, x: Tensor, gradient: Tensor) -> Tensor:
    """Computes the weight gradients of `m` samples with `p` rows each, `m x p x ...`."""
    if isinstance(layer, nn.Linear):
        return torch.bmm(gradient.mT, x)
    # One grouped convolution computes all gradients; each sample is a group of channels.
    m = len(x)
    n_outputs, *shape = layer.weight.shape
    x = pad_input(layer, x.transpose(0, 1).flatten(1, 2))
    gradient = gradient.transpose(0, 1).flatten(1, 2)
    kernels = _kernel_gradient(layer, x, gradient, (m * n_outputs, *shape), m * layer.groups)
    return torch.unflatten(kernels, 0, (m, -1))


KERNEL_GRADIENTS: dict[int, Callable[..., Tensor]] = {
    3: conv1d_weight,
    4: conv2d_weight,
    5: conv3d_weight,
}
"""Functions of torch by the number of dimensions of a convolution's input."""


def _kernel_gradient(
    layer: Convolution,
    x: Tensor,
    gradient: Tensor,
    shape: Sequence[int],
    groups: int,
) -> Tensor:
    return KERNEL_GRADIENTS[x.ndim](
        x, shape, gradient, stride=layer.stride, dilation=layer.dilation, groups=groups
    )
