"""What a Linear or a convolution computes its outputs from: inputs as rows, as windows, with padding written out.

Inputs and outputs come as rows, `r x ...`, where `...` is all that the layer looks at: `features` for a Linear,
`channels x space...` for a convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as convolution

from lightning_nrl._model.layers import Convolution, Layer

__all__ = ["CONVOLUTION_WEIGHT_GRAD", "absolute_input", "as_rows", "pad_input", "uses_per_weight", "windows"]

CONVOLUTION_WEIGHT_GRAD: dict[int, Callable[..., Tensor]] = {
    3: convolution.conv1d_weight,
    4: convolution.conv2d_weight,
    5: convolution.conv3d_weight,
}
"""torch's kernel gradients by dimensions of the weight."""


def as_rows(layer: Layer, x: Tensor) -> Tensor:
    """A layer's input or output as `r x ...`."""
    return x.reshape(-1, *x.shape[1 - layer.weight.ndim :])


def uses_per_weight(layer: Layer, output: Tensor) -> int:
    """How many values each weight is multiplied with, over rows and space; `output` has the shape of the output."""
    return output.numel() // len(layer.weight)


def absolute_input(layer: Layer, x: Tensor) -> Tensor:
    """Sum over rows and space of the absolute value that each weight is multiplied with, in the weight's shape.

    It is the same for every output of a group, so it is computed once for each input channel and place in the kernel:
    as the kernel gradient of a depthwise convolution whose output gradient is one everywhere.
    """
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
    sums = CONVOLUTION_WEIGHT_GRAD[len(shape)](
        padded, (channels, 1, *shape[2:]), one, stride=layer.stride, dilation=layer.dilation, groups=channels
    )
    by_group = sums.reshape(groups, 1, *shape[1:])
    return by_group.expand(-1, shape[0] // groups, *by_group.shape[2:]).reshape(shape)


def windows(layer: Layer, x: Tensor, max_positions: int = 2**62) -> Tensor:
    """What one output is a weighted sum of, in the order of the weights: `groups x (r * positions) x weights`.

    A Linear has one position, a convolution one for each place of its kernel; of these about `max_positions` of a row
    of `x`, `r x ...`, are taken, evenly spread.
    """
    if isinstance(layer, nn.Linear):
        return x[None]
    x = pad_input(layer, x)
    n_dims = x.ndim - 2
    side = max(1, int(max_positions ** (1 / n_dims)))
    for i, (kernel, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        # Views up to here: what is left out is never copied.
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        x = x[(slice(None),) * (2 + i) + (slice(None, None, -(-x.shape[2 + i] // side)),)]
    x = torch.unflatten(x, 1, (layer.groups, -1))
    order = (1, 0, *range(3, 3 + n_dims), 2, *range(3 + n_dims, x.ndim))
    return x.permute(order).flatten(2 + n_dims).flatten(1, -2)


def pad_input(layer: Convolution, x: Tensor) -> Tensor:
    """The input with the layer's own padding written out, whatever its mode."""
    sides = layer._reversed_padding_repeated_twice
    if not any(sides):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, sides, mode=mode)
