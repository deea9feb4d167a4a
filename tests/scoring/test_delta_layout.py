"""Changed weights sorted by output unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nrl._model.layers import find_layers
from lightning_nrl._scoring.sparse_delta import DeltaLayout, make_delta_layout


def layout(layer: nn.Module, where: list[int]) -> DeltaLayout:
    return make_delta_layout(find_layers(layer, "", include_bias=True).sites[0], torch.tensor(where))


def test_units_with_about_equally_many_weights_are_one_bucket() -> None:
    # 4 x 3 weights, then 4 biases; units 3, 0 and 3 have weights, unit 2 has its bias.
    found = layout(nn.Linear(3, 4), [11, 1, 9, 14, 10])
    assert found.units.tolist() == [0, 2, 3]
    assert found.bias.tolist() == [5, 3, 5]
    assert [bucket.columns.tolist() for bucket in found.buckets] == [[[1], [5]], [[0, 2, 4]]]
    assert [bucket.kernel_index.tolist() for bucket in found.buckets] == [[[1], [0]], [[2, 0, 1]]]


def test_of_a_grouped_convolution_only_the_channels_that_weights_meet_are_needed() -> None:
    # 4 units of 2 x 2 weights; the last two see channels 2 and 3.
    (bucket,) = layout(nn.Conv1d(4, 4, 2, groups=2), [15, 0]).buckets
    assert bucket.channels.tolist() == [0, 3]
    assert bucket.channel.tolist() == [[0], [1]]
    assert bucket.kernel_index.tolist() == [[0], [3]]


def test_beyond_nine_in_ten_all_units_change() -> None:
    assert layout(nn.Linear(1, 12), list(range(11))).units.tolist() == list(range(12))
    assert layout(nn.Linear(1, 12), list(range(10))).units.tolist() == list(range(10))


class Transfers(TorchDispatchMode):
    """Counts copies to another device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_all_tables_go_to_the_device_at_once() -> None:
    made = layout(nn.Linear(3, 4), [11, 1, 9, 14, 10])
    with Transfers() as transfers:
        moved = made.to(torch.device("meta"))
    assert transfers.count == 1
    assert [bucket.columns.shape for bucket in moved.buckets] == [(2, 1), (1, 3)]
