"""Backward and forward impacts, against numbers worked out by hand and against autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ranks import Collective
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lightning_nrl.errors import ConfigurationError, DataWarning, EvaluationError, ReplayError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.localization import measure
from lightning_nrl.tasks import Custom

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

AGGREGATIONS = ["mean_gradient", "per_sample"]
EVERY, EVERY_12 = torch.ones(2, dtype=torch.bool), torch.ones(12, dtype=torch.bool)


def toy_linear() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    layer.bias.data = torch.tensor([-0.25, 4.0])
    return layer, torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 2.0]])


@pytest.mark.parametrize(
    ("aggregation", "backward"),
    [
        ("mean_gradient", [1.0, 1.5, 3.0, 1.0, 0.0, 1.0]),
        ("per_sample", [2.0, 1.5, 3.0, 1.0, 1.0, 1.0]),
    ],
)
def test_linear_by_hand(recorded, weighted, aggregation, backward):
    recording = recorded(*toy_linear(), include_bias=True)
    impact = measure(recording, weighted, EVERY, aggregation=aggregation)
    assert impact.backward.tolist() == backward
    assert impact.forward.tolist() == [2.0, 3.0, 1.0, 4.5, 0.25, 4.0]


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv1d(4, 4, 3, padding=2, padding_mode="reflect", groups=4),
    nn.Conv2d(4, 2, (2, 3), stride=(3, 2), padding=(0, 2), dilation=(2, 1), groups=2),
    nn.Conv2d(4, 2, (3, 2), padding="same", padding_mode="circular"),
    nn.Conv2d(4, 8, 3, stride=2, padding="valid", padding_mode="replicate", groups=4, bias=False),
    nn.Conv3d(4, 3, 2, padding="same", dilation=(2, 1, 1)),
]


def convolution_data(layer: nn.Module, n: int = 7) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network around the layer, with inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        n, 4, *(9, 7, 5)[: layer.weight.ndim - 2], generator=generator, dtype=torch.float64
    )
    layer = layer.double()
    head = nn.Linear(layer(x).flatten(1).shape[1], 3).double()
    head.weight.data = torch.randn(head.weight.shape, generator=generator, dtype=torch.float64)
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head), x, torch.arange(n) % 3


def autograd_oracle(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, aggregation: str
) -> torch.Tensor:
    """Backward impacts of all parameters from one gradient a sample."""

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    return flat.mean(0).abs() if aggregation == "mean_gradient" else flat.abs().mean(0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_backward_of_several_layers_is_that_of_autograd(recorded, layer, aggregation):
    model, x, y = convolution_data(layer)
    recording = recorded(model, x, y, ["0", "3"], include_bias=True, size=3)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    impact = measure(recording, EVALUATOR, mask, aggregation=aggregation)
    torch.testing.assert_close(
        impact.backward, autograd_oracle(model, x[mask], y[mask], aggregation)
    )


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_forward_is_the_mean_of_what_each_weight_alone_passes_on(recorded, layer):
    model, x, y = convolution_data(layer)
    impact = measure(recorded(model, x, y, "0"), EVALUATOR, torch.ones(len(x), dtype=torch.bool))
    weight = layer.weight.detach()
    bias = {} if layer.bias is None else {"bias": 0 * layer.bias.detach()}
    alone = []
    for i, value in enumerate(weight.flatten()):
        only = torch.zeros(weight.numel(), dtype=weight.dtype)
        only[i] = value
        output = functional_call(layer, {"weight": only.view_as(weight), **bias}, (x,))
        alone.append(output[:, i // weight[0].numel()].abs().mean())
    torch.testing.assert_close(impact.forward, torch.stack(alone))


class Tokens(nn.Module):
    """A linear layer at every token, twice, the second time with tokens folded into the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.tanh(self.mix(x))
        return self.mix(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_positions_and_calls_of_a_layer_count_together(recorded, aggregation):
    torch.manual_seed(0)
    model, x, y = Tokens().double(), torch.randn(6, 3, 4, dtype=torch.float64), torch.arange(6) % 4
    mask = torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.bool)
    impact = measure(
        recorded(model, x, y, include_bias=True), EVALUATOR, mask, aggregation=aggregation
    )
    torch.testing.assert_close(
        impact.backward, autograd_oracle(model, x[mask], y[mask], aggregation)
    )
    second = torch.tanh(model.mix(x[mask])).detach()
    mean = (x[mask].abs().mean((0, 1)) + second.abs().mean((0, 1))) / 2
    torch.testing.assert_close(
        impact.forward[:16].view(4, 4), mean * model.mix.weight.detach().abs()
    )


def small_network(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    return model, torch.randn(12, 5), torch.arange(12) % 4


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_ranks_add_up_also_one_without_marked_samples(recorded, aggregation):
    model, x, y = small_network()
    mask = torch.arange(12) >= 3
    total = torch.zeros(())

    class Ranks(Collective):
        def sum(self, x):
            nonlocal total
            total = total + x
            return total

    for share in (slice(3, 8), slice(8, 12), slice(0, 3)):
        recording = recorded(model, x[share], y[share], size=3)
        ranks = measure(
            recording, replace(EVALUATOR, collective=Ranks()), mask[share], aggregation=aggregation
        )
    alone = measure(recorded(model, x, y), EVALUATOR, mask, aggregation=aggregation)
    torch.testing.assert_close(ranks.backward, alone.backward, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(ranks.forward, alone.forward, rtol=1e-5, atol=1e-8)


@torch.backends.cudnn.flags(benchmark=True)
def test_the_model_and_cudnn_flags_are_left_as_they_were(recorded):
    model, x, y = small_network()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        free = measure(recorded(model, x, y, ["0", "2"]), EVALUATOR, EVERY_12)
        assert not torch.is_grad_enabled()
    frozen = measure(recorded(model.requires_grad_(False), x, y, ["0", "2"]), EVALUATOR, EVERY_12)
    assert torch.equal(free.backward, frozen.backward)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (True, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_half_precision_is_summed_in_full_width(recorded, weighted, aggregation, dtype):
    # 2049 ones add up to 2048 in either half precision.
    layer, ones = nn.Linear(1, 1, dtype=dtype), torch.ones(2049, 1, dtype=dtype)
    nn.init.constant_(layer.weight, -0.5)
    nn.init.constant_(layer.bias, 0.25)
    recording = recorded(layer, ones, ones, include_bias=True, size=2049)
    impact = measure(
        recording, weighted, torch.ones(2049, dtype=torch.bool), aggregation=aggregation
    )
    assert impact.backward.dtype == impact.forward.dtype == torch.float64
    assert impact.backward.tolist() == [1.0, 1.0]
    assert impact.forward.tolist() == [0.5, 0.25]


def test_input_that_is_changed_in_place_later_counts_as_it_was(recorded, weighted):
    class Overwrites(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            x = x.clone()
            output = self.layer(x)
            x.zero_()
            return output

    layer, x, target = toy_linear()
    impact = measure(recorded(Overwrites(layer.requires_grad_(False)), x, target), weighted, EVERY)
    assert impact.backward.tolist() == [1.0, 1.5, 3.0, 1.0]


def test_only_marked_samples_need_a_finite_loss(recorded):
    model, x, y = small_network()
    mask = torch.ones(12, dtype=torch.bool)
    mask[3] = False
    clean = measure(recorded(model, x, y, ["0", "2"], size=12), EVALUATOR, mask)
    x[3] = torch.nan
    spoilt = measure(recorded(model, x, y, ["0", "2"], size=12), EVALUATOR, mask)
    assert torch.equal(clean.backward, spoilt.backward)
    with pytest.raises(EvaluationError, match="not finite"):
        measure(recorded(model, x, y), EVALUATOR, ~mask)


def wrong(output, target):
    return ((output * target).sum(1) < 0).float()


# The outputs are [-3.25, 10.5] and [4.75, 2.5], the gradient of half their squared size; the
# margin's is `target`.
@pytest.mark.parametrize(
    ("margin", "name", "backward"),
    [
        (None, "mean squared output", [5.5, 5.625, 9.0, 9.25]),
        (lambda output, target: (output * target).sum(1), "margin", [1.0, 1.5, 3.0, 1.0]),
    ],
)
def test_a_loss_without_a_gradient_is_replaced_with_a_warning(recorded, margin, name, backward):
    task = Custom(lambda output, target: wrong(output, target) == 0, wrong, margin)
    with pytest.warns(DataWarning, match=f"`task`: its loss has no gradient, .* the {name}"):
        impact = measure(recorded(*toy_linear()), Evaluator(nn.Identity(), task), EVERY)
    assert impact.backward.tolist() == backward


def test_what_cannot_be_measured_is_refused(recorded):
    model, x, y = small_network()
    with pytest.raises(EvaluationError, match="no sample"):
        measure(recorded(model, x, y), EVALUATOR, ~EVERY_12)
    with pytest.raises(ConfigurationError, match=r"`aggregation='median'`.*\n.*per_sample"):
        measure(recorded(model, x, y), EVALUATOR, EVERY_12, aggregation="median")
    detached = nn.Sequential(nn.Linear(5, 4))
    detached.forward = lambda x: detached[0](x).detach()
    with pytest.raises(ReplayError, match="has no gradient"):
        measure(recorded(detached, x, y), EVALUATOR, EVERY_12)


class TimeFirst(nn.Module):
    """A layer that sees `steps x samples x features`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.layer, self.steps = nn.Linear(5, 4), steps

    def forward(self, x):
        return self.layer(x + torch.arange(self.steps, dtype=x.dtype)[:, None, None]).mean(0)


@pytest.mark.parametrize("steps", [12, 7])
def test_order_of_samples_and_positions_matters_to_single_samples_alone(recorded, steps):
    model, x, y = TimeFirst(steps).double(), *small_network()[1:]
    recording, mask = (
        recorded(model, x.double(), y, include_bias=True, size=12),
        torch.ones(12, dtype=torch.bool),
    )
    impact = measure(recording, EVALUATOR, mask)
    expected = autograd_oracle(model, x.double(), y, "mean_gradient")
    torch.testing.assert_close(impact.backward, expected)
    with pytest.raises(
        ReplayError, match=r"`aggregation='per_sample'`.*'layer'` do not belong to one sample"
    ):
        measure(recording, EVALUATOR, mask, aggregation="per_sample")


class SmallMemory:
    """A recording on a device that holds few samples at once."""

    def __init__(self, recording, fits):
        self.recording, self.space, self.fits, self.sizes = recording, recording.space, fits, []

    def chunks(self, size=None, keep=None):
        self.sizes.append(size)
        self.recording.size = size
        return self.recording.chunks(size, keep)

    def replay(self, chunk, edit, copies=1):
        if len(chunk.rows) > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        return self.recording.replay(chunk, edit, copies)


@pytest.mark.parametrize("aggregation", ["mean_gradient", "per_sample"])
def test_where_memory_runs_out_fewer_samples_run_at_once(recorded, aggregation):
    model, x, y = small_network()
    mask, recording = torch.ones(12) > 0, recorded(model.double(), x.double(), y)
    whole = measure(recording, EVALUATOR, mask, aggregation=aggregation)
    small = SmallMemory(recording, fits=5)
    pieces = measure(small, EVALUATOR, mask, aggregation=aggregation)
    assert small.sizes == [64, 32, 16, 8, 4]
    torch.testing.assert_close(pieces.backward, whole.backward)
    torch.testing.assert_close(pieces.forward, whole.forward)
    with pytest.raises(torch.OutOfMemoryError):
        measure(SmallMemory(recorded(model, x, y), fits=0), EVALUATOR, mask)
