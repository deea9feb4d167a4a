from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.errors import EvaluationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.updates.interpolation import batch_norms, estimate_statistics

LABEL = torch.zeros(2, dtype=torch.int64)


def batch(*values: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(values)[:, None], LABEL


# Means 2 and 7, unbiased variances 2 and 8.
BATCHES = [batch(1.0, 3.0), batch(5.0, 9.0)]


def norm() -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(1, momentum=0.3))


def source(values: Tensor, batch_size: int) -> TensorSource:
    return TensorSource(values[:, None], torch.zeros(len(values), dtype=torch.int64), "train", batch_size=batch_size)


def test_every_batch_counts_alike_and_nothing_else_is_in_training_mode() -> None:
    found = estimate_statistics(norm(), BATCHES)
    assert {name: value.tolist() for name, value in found.items()} == {
        "1.running_mean": [4.5],
        "1.running_var": [5.0],
        "1.num_batches_tracked": 2,
    }
    assert estimate_statistics(norm(), BATCHES, batches=1)["1.running_mean"].tolist() == [2.0]
    assert estimate_statistics(nn.BatchNorm1d(1), BATCHES)["running_var"].tolist() == [5.0]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_left_as_found(training: bool) -> None:
    model = norm().train(training)
    model(torch.randn(4, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer, state = model[1], torch.get_rng_state()
    mean = layer.running_mean
    estimate_statistics(model, source(torch.arange(6.0), 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert layer.running_mean is mean
    assert (layer.momentum, model.training, layer.training) == (0.3, training, training)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise KeyError("in the middle")
        return self.norm(x)


def test_also_after_an_exception() -> None:
    model = Broken()
    with pytest.raises(KeyError, match="in the middle"):
        estimate_statistics(model, BATCHES)
    assert (model.norm.momentum, model.norm.running_mean.tolist(), int(model.norm.num_batches_tracked)) == (0.1, [0], 0)


def frozen(model: nn.Sequential) -> None:
    model[1].eval()


def untracked(model: nn.Sequential) -> None:
    model[1].track_running_stats = False


def without(model: nn.Sequential) -> None:
    model[1] = nn.BatchNorm1d(1, track_running_stats=False)


@pytest.mark.parametrize("change", [frozen, untracked, without])
def test_layers_that_are_frozen_or_track_nothing_are_left_alone(change: Any) -> None:
    model = norm().train()
    change(model)
    assert batch_norms(model) == {}
    # Not even read.
    assert estimate_statistics(model, ["no batch"]) == {}


class Aside(nn.Module):
    """Has a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.aside = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_a_layer_that_is_never_called_keeps_what_it_has() -> None:
    assert [name.partition(".")[0] for name in estimate_statistics(Aside(), BATCHES)] == ["norm"] * 3


def test_a_source_is_read_in_random_order() -> None:
    # In the order in which they come each batch of ten would be of one value, and no variance.
    values = torch.tensor([0.0, 10.0]).repeat_interleave(100)
    found = estimate_statistics(norm(), source(values, 10))
    torch.testing.assert_close(found["1.running_mean"], torch.tensor([5.0]))
    torch.testing.assert_close(found["1.running_var"], torch.tensor([25.0]), rtol=0.1, atol=0)
    again, other = (estimate_statistics(norm(), source(values, 10), seed=seed) for seed in (0, 1))
    assert torch.equal(again["1.running_var"], found["1.running_var"])
    assert not torch.equal(other["1.running_var"], found["1.running_var"])


def test_no_batch_of_a_source_is_left_with_a_single_sample() -> None:
    # 3 and 2 of them, where 4 and 1 would be refused by the layer.
    found = estimate_statistics(norm(), source(torch.arange(5.0), 4))
    assert int(found["1.num_batches_tracked"]) == 2


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 3, 5, 7, 9])
def test_nor_where_batches_are_tiny(n: int, batch_size: int) -> None:
    values = torch.arange(float(n))
    found = estimate_statistics(norm(), source(values, batch_size))
    assert found["1.running_var"] > 0


def test_ranks_count_by_their_batches() -> None:
    shares = (BATCHES, [batch(8.0, 10.0)])
    first, second = on_ranks(2, lambda own: estimate_statistics(Evaluator(norm(), collective=own), shares[own.rank]))
    assert (
        first
        == second
        == {
            "1.running_mean": torch.tensor([6.0]),  # of 2, 7 and 9
            "1.running_var": torch.tensor([4.0]),  # of 2, 8 and 2
            "1.num_batches_tracked": torch.tensor(3),
        }
    )


def test_no_rank_waits_for_one_that_failed() -> None:
    said = []

    def run(own: Any) -> None:
        try:
            estimate_statistics(Evaluator(norm(), collective=own), BATCHES if own.rank else ["no batch"])
        except (ConfigurationError, EvaluationError) as error:
            said.append((own.rank, str(error).partition("\n")[0]))

    on_ranks(2, run)
    unreadable = "`adapter`: a batch of type str is neither (x, y, *extras) nor a mapping."
    assert sorted(said) == [(0, unreadable), (1, unreadable)]


def test_data_without_a_batch_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no batch came for batch norm statistics"):
        estimate_statistics(norm(), [])
