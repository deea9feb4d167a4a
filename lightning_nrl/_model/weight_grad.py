"""What calls of a layer add to the impacts of its weights, for a Linear and every convolution alike.

Inputs and output gradients come as rows, `r x ...`, where `...` is all that the layer looks at: `features` for a
Linear, `channels x space...` for a convolution. Where samples are told apart, each has as many rows: `m x p x ...`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as convolution

from lightning_nrl._model.layers import Convolution, Layer

__all__ = [
    "absolute_input",
    "bias_gradient",
    "bias_gradients",
    "positions",
    "rows",
    "weight_gradient",
    "weight_gradients",
    "windows",
]

_WEIGHT_GRADIENT = {
    3: convolution.conv1d_weight,
    4: convolution.conv2d_weight,
    5: convolution.conv3d_weight,
}
"""By dimensions of the weight."""


def rows(layer: Layer, x: Tensor) -> Tensor:
    """A layer's input or output as `r x ...`."""
    return x.reshape(-1, *x.shape[1 - layer.weight.ndim :])


def positions(layer: Layer, gradient: Tensor) -> int:
    """How many values each weight was multiplied with, over rows and space; `gradient` is that of the output."""
    return gradient.numel() // len(layer.weight)


def weight_gradient(layer: Layer, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the weight, from the layer's input `r x ...` and the gradient of its output `r x ...`."""
    if isinstance(layer, nn.Linear):
        return gradient.T @ x
    return _convolution_gradient(layer, x, gradient)


def weight_gradients(layer: Layer, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the weight for each sample, `m x weight shape`, from the same as `m x p x ...`.

    A convolution takes each sample as a group of its own, so that one call of the gradient kernel serves them all.
    """
    if isinstance(layer, nn.Linear):
        return torch.bmm(gradient.mT, x)
    m = len(x)
    x, gradient = (t.transpose(0, 1).flatten(1, 2) for t in (x, gradient))
    return _convolution_gradient(layer, x, gradient, samples=m).unflatten(0, (m, -1))


def bias_gradient(gradient: Tensor) -> Tensor:
    """The gradient of the bias, from that of the output, `r x out...`."""
    return gradient.transpose(0, 1).flatten(1).sum(1)


def bias_gradients(gradient: Tensor) -> Tensor:
    """The gradient of the bias for each sample, `m x out`, from that of the output, `m x p x out...`."""
    return gradient.transpose(1, 2).flatten(2).sum(2)


def absolute_input(layer: Layer, x: Tensor) -> Tensor:
    """Sum over rows and space of the absolute value that each weight is multiplied with, in the weight's shape.

    It is the same for every output of a group, so it is computed once for each input channel and place in the kernel:
    as the kernel gradient of a depthwise convolution whose output gradient is one everywhere.
    """
    total = x.abs().sum(0)
    if isinstance(layer, nn.Linear):
        return total.expand_as(layer.weight)
    channels, groups, shape = len(total), layer.groups, layer.weight.shape
    padded = _pad(layer, total.unsqueeze(0))
    positions = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded.shape[2:], shape[2:], layer.stride, layer.dilation, strict=True
        )
    ]
    one = padded.new_ones(()).expand(1, channels, *positions)
    windows = _WEIGHT_GRADIENT[len(shape)](
        padded, (channels, 1, *shape[2:]), one, stride=layer.stride, dilation=layer.dilation, groups=channels
    )
    by_group = windows.reshape(groups, 1, *shape[1:])
    return by_group.expand(-1, shape[0] // groups, *by_group.shape[2:]).reshape(shape)


def windows(layer: Layer, x: Tensor, most: int = 2**62) -> Tensor:
    """What one output is a weighted sum of, in the order of the weights: `groups x (r * positions) x weights`.

    Args:
        layer: a Linear has one position, a convolution one for each place of its kernel.
        x: its input, `r x ...`.
        most: about how many positions of a row are taken, evenly spread; all if there are fewer.
    """
    if isinstance(layer, nn.Linear):
        return x[None]
    x = _pad(layer, x)
    n_dims = x.ndim - 2
    side = max(1, int(most ** (1 / n_dims)))
    for i, (kernel, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        # Views up to here: what is left out is never copied.
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        x = x[(slice(None),) * (2 + i) + (slice(None, None, -(-x.shape[2 + i] // side)),)]
    x = x.unflatten(1, (layer.groups, -1))
    order = (1, 0, *range(3, 3 + n_dims), 2, *range(3 + n_dims, x.ndim))
    return x.permute(order).flatten(2 + n_dims).flatten(1, -2)


def _convolution_gradient(layer: Convolution, x: Tensor, gradient: Tensor, samples: int = 1) -> Tensor:
    """The kernel gradient; with several samples side by side in the channels, one behind the other in dimension 0."""
    out, *kernel = layer.weight.shape
    return _WEIGHT_GRADIENT[x.ndim](
        _pad(layer, x),
        (samples * out, *kernel),
        gradient,
        stride=layer.stride,
        dilation=layer.dilation,
        groups=samples * layer.groups,
    )


def _pad(layer: Convolution, x: Tensor) -> Tensor:
    """The input with the layer's own padding written out, whatever its mode."""
    sides = layer._reversed_padding_repeated_twice
    if not any(sides):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, sides, mode=mode)
