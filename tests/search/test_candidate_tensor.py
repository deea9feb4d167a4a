"""Changed weights and what candidates share, against the same code on whole tensors."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search.scoring.candidate_tensor import CandidateTensor, as_dense
from lightning_nrl.search.scoring.sparse_delta import make_layer_deltas

P, N, C = 3, 4, 6


def candidates(*rest: int, units: tuple[int, ...] = (4, 1), seed: int = 0) -> CandidateTensor:
    """`P` candidates that differ in some channels, double precision."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(N, C, *rest, generator=g, dtype=torch.float64)
    if not units:
        return CandidateTensor.repeated(base, P)
    changed = torch.randn(P, N, len(units), *rest, generator=g, dtype=torch.float64)
    return CandidateTensor(base, P, 1, torch.tensor(units), changed)


def _module(module: nn.Module) -> Callable[[Tensor], Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
    return module.double().eval()


CHANNELWISE = {
    "relu": ((), F.relu),
    "relu module, in place": ((5, 5), nn.ReLU(inplace=True)),
    "elu module, in place": ((5,), nn.ELU(inplace=True)),
    "gelu": ((), F.gelu),
    "dropout": ((), nn.Dropout().eval()),
    "batch norm 2d": ((5, 5), _module(nn.BatchNorm2d(C))),
    "max pool": ((4, 4), nn.MaxPool2d(3, stride=2, padding=1)),
    "adaptive pool": ((5, 5), nn.AdaptiveAvgPool2d(2)),
    "adaptive pool to one": ((5, 5), nn.AdaptiveAvgPool2d(1)),
    "mean of another type": ((5,), lambda x: x.mean(2, dtype=torch.float32).double()),
    "mean, kept": ((5, 5), lambda x: x.mean(dim=(-1, -2), keepdim=True)),
    "amax": ((5,), lambda x: torch.amax(x, 2)),
    "flatten": ((3, 2), lambda x: torch.flatten(x, 1)),
    "view": ((3, 2), lambda x: x.view(x.size(0), -1)),
    "number": ((5,), lambda x: 2 * x + 1 - x / 3),
    "parameter": ((5,), lambda x: x * torch.arange(C, dtype=torch.float64).view(C, 1)),
    "depthwise convolution": ((5, 5), _module(nn.Conv2d(C, C, 3, padding=1, groups=C))),
    "gated by its mean": ((5, 5), lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))),
    "joined": ((5,), lambda x: torch.cat([x, F.relu(x)], 1)),
}
MIXING = {
    "linear": ((), _module(nn.Linear(C, 5))),
    "convolution": ((5, 5), _module(nn.Conv2d(C, 3, 3, stride=2, padding=1))),
    "grouped convolution": ((5, 5), _module(nn.Conv2d(C, 4, 3, groups=2))),
    "group norm": ((5,), _module(nn.GroupNorm(2, C))),
    "softmax": ((), lambda x: x.softmax(1)),
    "over samples": ((), lambda x: x - x.mean()),
    "comparison": ((), lambda x: (x > 0).double()),
    "in place, unknown": ((), lambda x: x.masked_fill_(x > 0.5, 0.0) + 1),
}


@pytest.mark.parametrize("units", [(), (2,), (4, 1), (5, 3, 0, 1, 2, 4)], ids=str)
@pytest.mark.parametrize("name", CHANNELWISE | MIXING)
def test_gives_what_whole_tensors_give(name, units):
    shape, function = (CHANNELWISE | MIXING)[name]
    x = candidates(*shape, units=units)
    expected = function(candidates(*shape, units=units).dense())
    actual = function(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(as_dense(actual), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CHANNELWISE)
def test_channels_that_do_not_differ_are_not_computed_again(name):
    shape, function = CHANNELWISE[name]
    x = candidates(*shape)
    actual = function(x)
    assert isinstance(actual, CandidateTensor)
    assert actual.materialized is None
    assert x.materialized is None


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def changed(layer: nn.Module, where: Tensor, values: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output under candidates, and the same by the layer itself."""
    space = find_layers(layer, "", include_bias=True)
    with torch.no_grad():
        output = make_layer_deltas(space, where)[0].output(values, x, layer(x))
        expected = [functional_call(layer, space.changed(where, v), (x,)) for v in values]
    return as_dense(output).unflatten(0, (len(values), -1)), torch.stack(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unchanged_candidates_keep_the_recorded_output_to_the_bit(dtype):
    layer, x = nn.Linear(30, 6).to(dtype), torch.randn(5, 30).to(dtype)
    where = torch.arange(0, 180, 7)
    unchanged = find_layers(layer, "").flat()[where].unsqueeze(0)
    assert torch.equal(changed(layer, where, unchanged, x)[0][0], layer(x))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    options = {"groups": groups, "dilation": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
    options["padding"] = draw(st.sampled_from([0, 1, "same"]))
    options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    if options["padding"] != "same":
        options["stride"] = draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = CONVS[dims - 1](2 * groups, 2 * groups, kernel, **options).double()
    size = tuple(draw(st.integers(5, 7)) for _ in range(dims))
    return conv, torch.randn(2, 2 * groups, *size, generator=g, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(1, 40), st.integers(0, 99))
def test_convolutions_of_every_kind(problem, k, seed):
    layer, x = problem
    g = torch.Generator().manual_seed(seed)
    size = find_layers(layer, "", include_bias=True).size
    where = torch.randperm(size, generator=g)[:k]
    values = torch.randn(3, len(where), generator=g, dtype=torch.float64)
    torch.testing.assert_close(*changed(layer, where, values, x), rtol=1e-10, atol=1e-10)
