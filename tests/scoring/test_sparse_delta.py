"""The sparse change of a layer: by hand, and against the layer itself with other weights."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.func import functional_call

from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search._scoring.candidate_tensor import CandidateTensor
from lightning_nrl.search._scoring.sparse_delta import edit_layers, make_layer_deltas

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def changed(layer: nn.Module, where: Tensor, values: Tensor, x: Tensor, include_bias: bool = False) -> Tensor:
    space = find_layers(layer, "", include_bias=include_bias)
    with torch.no_grad():
        out = make_layer_deltas(space, where)[0].output(values, x, layer(x))
    return (out.dense() if isinstance(out, CandidateTensor) else out).unflatten(0, (len(values), -1))


def oracle(layer: nn.Module, where: Tensor, values: Tensor, x: Tensor, include_bias: bool = False) -> Tensor:
    space = find_layers(layer, "", include_bias=include_bias)
    with torch.no_grad():
        return torch.stack([functional_call(layer, space.changed(where, v), (x,)) for v in values])


def test_linear_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    x = torch.tensor([[1.0, 10.0], [5.0, 0.0]])
    out = changed(layer, torch.tensor([1, 2]), torch.tensor([[2.0, 3.0], [0.0, 4.0]]), x)
    assert out.tolist() == [[[21.0, 43.0], [5.0, 15.0]], [[1.0, 44.0], [5.0, 20.0]]]


def test_unchanged_candidates_keep_the_recorded_output_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = nn.Linear(30, 6).to(dtype), torch.randn(5, 30).to(dtype)
        where = torch.arange(0, 180, 7)
        same = find_layers(layer, "").flat()[where].unsqueeze(0)
        assert torch.equal(changed(layer, where, same, x)[0], layer(x))


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
def test_convolutions_of_every_kind(problem: tuple[nn.Module, Tensor], k: int, seed: int) -> None:
    layer, x = problem
    g = torch.Generator().manual_seed(seed)
    size = find_layers(layer, "", include_bias=True).size
    where = torch.randperm(size, generator=g)[:k]
    values = torch.randn(3, len(where), generator=g, dtype=torch.float64)
    actual = changed(layer, where, values, x, include_bias=True)
    torch.testing.assert_close(actual, oracle(layer, where, values, x, include_bias=True), rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 99), st.lists(st.integers(1, 3), max_size=2))
def test_linear_with_any_leading_dimensions(k: int, seed: int, lead: list[int]) -> None:
    g = torch.Generator().manual_seed(seed)
    layer, x = nn.Linear(5, 6).double(), torch.randn(4, *lead, 5, generator=g, dtype=torch.float64)
    where = torch.randperm(30, generator=g)[:k]
    values = torch.randn(3, k, generator=g, dtype=torch.float64)
    torch.testing.assert_close(
        changed(layer, where, values, x), oracle(layer, where, values, x), rtol=1e-10, atol=1e-10
    )


def test_autocast_rounds_weights_and_inputs_first() -> None:
    g = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(16, 5), torch.randn(40, 16, generator=g)
    where, values = torch.arange(0, 80, 3), torch.randn(4, 27, generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = changed(layer, where, values, x), oracle(layer, where, values, x)
    assert actual.dtype == torch.bfloat16
    assert (actual != expected).float().mean() < 0.01
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-3)


@torch.no_grad()
def test_several_sites_share_one_set_of_values() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    space = find_layers(model, ["0", "1"])
    first, second = make_layer_deltas(space, torch.tensor([0, 10]))
    assert (first.units.tolist(), second.units.tolist()) == ([0], [0])
    x, y = torch.ones(2, 3), model[0](torch.ones(2, 3))
    edit = edit_layers((first, second), space.flat()[[0, 10]].unsqueeze(0))
    torch.testing.assert_close(edit(space.sites[0], x, y).dense(), y)
