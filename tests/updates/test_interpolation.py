"""Weights between two models, and the batch norm statistics that fit them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Collective, on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy_problems import left_alone, normed, same, threshold

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.updates import choose_interpolation, interpolate
from lightning_nrl.updates.interpolation import (
    InterpolationChoice,
    estimate_statistics,
)


def linear(weight: Any) -> nn.Linear:
    weight = torch.as_tensor(weight)
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.load_state_dict({"weight": weight})
    return model


def at(border: float) -> nn.Linear:
    """Class 1 for points (x, 1) with x above a border."""
    return linear(threshold(border)["weight"])


# A strength s puts the border at 3 (1 - s). Class 1 begins at 0, so that the new model is right on
# all ten, and loses the small ones one after the other; the old one gets the five of class 0 right.
X = torch.tensor([[x, 1.0] for x in (0.1, 0.4, 0.7, 1.0, 1.3, -1.0, -1.0, -1.0, -1.0, -1.0)])
Y = torch.tensor([1] * 5 + [0] * 5)
DATA = TensorSource(X, Y, "val", batch_size=4)


def chosen(data: Any = DATA, collective: Any = None, **arguments: Any) -> InterpolationChoice:
    return choose_interpolation(
        at(3.0), Evaluator(at(0.0), collective=collective or Collective()), data, **arguments
    )


def test_weights_lie_between():
    old, new = linear([[1.0, 0.0]]), linear([[0.0, 2.0]])
    assert interpolate(old, new, 0.75)["weight"].tolist() == [[0.25, 1.5]]
    assert interpolate(old.state_dict(), new, 0)["weight"].tolist() == [[1.0, 0.0]]
    assert new.weight.tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize(
    ("tolerance", "strength"), [(0.0, 1.0), (0.1, 0.9), (0.15, 0.9), (0.2, 0.8), (None, 0.5)]
)
def test_the_smallest_strength_within_the_tolerance_is_chosen(tolerance, strength):
    choice = chosen(tolerance=tolerance)
    assert choice.strength == strength
    assert [point.counts.right for point in choice.curve] == [10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5]


def test_a_strength_that_breaks_more_than_the_new_model_is_not_chosen():
    # Both tell the sign of x, with hidden units in another order; half way all weights cancel, and
    # all is class 0.
    def signs(order: list[int]) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        first, last = torch.tensor([[1.0], [-1.0]]), torch.eye(2)
        model.load_state_dict({"0.weight": first[order], "2.weight": last[:, order]})
        return model

    data = [(torch.tensor([[1.0]] * 9 + [[-1.0]]), torch.tensor([0] * 9 + [1]))]
    old, new = signs([0, 1]), signs([1, 0])
    choice = choose_interpolation(old, new, data, tolerance=0.2, strengths=[0.5])
    assert [(point.counts.broken, point.counts.right) for point in choice.curve] == [
        (0, 10),
        (1, 9),
    ]
    assert choice.strength == 1
    assert choose_interpolation(old, new, data, tolerance=None, strengths=[0.5]).strength == 0.5


def test_a_choice_says_what_becomes_of_samples_and_changes_the_model_when_told():
    new = at(0.0)
    choice = choose_interpolation(at(3.0), new, DATA, tolerance=0.1)
    counts = choice.chosen.counts
    assert (counts.kept, counts.broken, counts.repaired, counts.failing) == (5, 0, 4, 1)
    assert (choice.chosen.accuracy, choice.chosen.negative_flip_rate) == (0.9, 0.0)
    assert choice.write(new)
    torch.testing.assert_close(new.weight.detach(), threshold(0.3)["weight"])
    page = choice.render(100)
    assert "strength 1, within 10 points of the best accuracy: 0.90." in page
    assert "strength 0.90, taken" in page
    assert "As given: 0.80." in chosen(tolerance=None, strengths=[0.8]).render(100)


@pytest.mark.parametrize(
    "data",
    [
        [(X[:3], Y[:3]), (X[3:], Y[3:])],
        DataLoader(TensorDataset(X, Y), 3, shuffle=True),
        [{"x": X, "y": Y}],
    ],
)
def test_any_batches_that_can_be_read_again_will_do(data):
    assert chosen(data) == chosen()


def pair() -> tuple[nn.Sequential, nn.Sequential, TensorSource]:
    """Two networks with batch norm and dropout, and data."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    return normed(), normed(), TensorSource(x, y, "train", batch_size=20)


def test_batch_norm_statistics_fit_the_weights_and_are_those_of_the_models_at_the_ends():
    old, new, data = pair()
    for model in (old, new):
        model.train()(data.inputs)
    state = interpolate(old, new, 0.5, data)
    model = normed()
    model.load_state_dict(state)
    hidden = model[0](data.inputs)
    torch.testing.assert_close(state["1.running_mean"], hidden.mean(0), rtol=1e-3, atol=1e-4)
    for strength, end in ((1, new), (0, old)):
        assert same(interpolate(old, new, strength, data), end.state_dict())


def test_the_choice_has_the_statistics_that_it_was_counted_with():
    old, new, data = pair()
    choice = choose_interpolation(old, new, data, data, strengths=[0.4], tolerance=None)
    assert same(choice.state, interpolate(old, new, 0.4, data))
    model = normed().eval()
    model.load_state_dict(choice.state)
    assert choice.chosen.counts.right == int((model(data.inputs).argmax(1) == data.targets).sum())


def test_ranks_choose_as_one():
    shares = ((X[::2], Y[::2]), (X[1::2], Y[1::2]))
    first, second = on_ranks(
        2, lambda rank: chosen([shares[rank.rank]], tolerance=0.1, collective=rank)
    )
    assert first == second == chosen(tolerance=0.1)


@pytest.mark.parametrize("strength", [1.1, float("nan"), True, "half"])
def test_what_is_no_strength_is_refused(strength):
    with pytest.raises(ConfigurationError, match=r"`strength=.*` is no strength"):
        interpolate(at(1.0), at(0.0), strength)
    with pytest.raises(ConfigurationError, match=r"`strengths=.*` is no strength"):
        chosen(strengths=[strength])
    with pytest.raises(ConfigurationError, match=r"`tolerance=.*` is no share"):
        chosen(tolerance=strength)


def test_batch_norm_needs_training_data():
    old, new, data = pair()
    with pytest.raises(
        ConfigurationError, match="`training` is missing, but the batch norm layer '1' needs new"
    ):
        choose_interpolation(old, new, data)
    assert choose_interpolation(old, new, data, strengths=[]).strength == 1


def once() -> Any:
    yield X, Y


def test_data_that_cannot_be_read_twice_are_refused():
    with pytest.raises(ConfigurationError, match="`data`: a second pass returned other samples"):
        chosen(once())
    with pytest.raises(ConfigurationError, match="`data` is empty"):
        chosen([])


def batch(*values: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(values)[:, None], torch.zeros(2)


# Means 2 and 7, unbiased variances 2 and 8.
BATCHES = [batch(1.0, 3.0), batch(5.0, 9.0)]


def norm() -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(1, momentum=0.3))


def source(values: Tensor, batch_size: int) -> TensorSource:
    return TensorSource(
        values[:, None], torch.zeros(len(values), dtype=torch.int64), "train", batch_size=batch_size
    )


@pytest.mark.parametrize("training", [True, False])
def test_every_batch_counts_alike_and_nothing_else_is_in_training_mode(training):
    model = norm().train(training)
    with left_alone(model):
        statistics = estimate_statistics(model, BATCHES)
    assert model[1].momentum == 0.3
    assert {name: value.tolist() for name, value in statistics.items()} == {
        "1.running_mean": [4.5],
        "1.running_var": [5.0],
        "1.num_batches_tracked": 2,
    }
    assert estimate_statistics(norm(), BATCHES, batches=1)["1.running_mean"].tolist() == [2.0]
    assert estimate_statistics(nn.BatchNorm1d(1), BATCHES)["running_var"].tolist() == [5.0]


def test_layers_that_are_frozen_or_track_nothing_are_left_alone():
    frozen, untracked = norm().train(), norm()
    frozen[1].eval()
    untracked[1].track_running_stats = False
    for model in (frozen, untracked, nn.BatchNorm1d(1, track_running_stats=False)):
        assert estimate_statistics(model, ["no batch"]) == {}  # data are not even read


def test_a_source_is_read_in_random_order():
    # In the order in which they come each batch of ten would be of one value, and no variance.
    values = torch.tensor([0.0, 10.0]).repeat_interleave(100)
    first, again, shuffled = (
        estimate_statistics(norm(), source(values, 10), seed=seed) for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first["1.running_var"], torch.tensor([25.0]), rtol=0.1, atol=0)
    assert same(first, again)
    assert not same(first, shuffled)


def test_no_batch_of_a_source_is_left_with_a_single_sample():
    # 3 and 2 of them, where 4 and 1 would be refused by the layer.
    statistics = estimate_statistics(norm(), source(torch.arange(5.0), 4))
    assert int(statistics["1.num_batches_tracked"]) == 2


def test_ranks_count_by_their_batches():
    shares = (BATCHES, [batch(8.0, 10.0)])
    first, second = on_ranks(
        2, lambda rank: estimate_statistics(Evaluator(norm(), collective=rank), shares[rank.rank])
    )
    assert same(first, second)
    assert first["1.running_mean"].tolist() == [6.0]  # of 2, 7 and 9
    assert first["1.running_var"].tolist() == [4.0]  # of 2, 8 and 2


def test_data_without_a_batch_are_refused():
    with pytest.raises(ConfigurationError, match="no batch for batch norm statistics"):
        estimate_statistics(norm(), [])
