import pytest
import torch
from torch import nn

from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search.searcher import WeightStats


def numbers(stats):
    return torch.stack([stats.mean, stats.std, stats.lowest, stats.highest])


def test_one_weight_has_no_deviation_rather_than_nan():
    assert numbers(WeightStats.of(torch.tensor([2.0]))).tolist() == [2.0, 0.0, 2.0, 2.0]


def test_each_weight_has_the_stats_of_its_own_layer():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 3.0]]))
        model[1].weight.fill_(10.0)
    stats = WeightStats.around(find_layers(model, ["0", "1"]), torch.tensor([1, 2]))
    expected = torch.tensor([[2.0, 10.0], [1.0, 0.0], [1.0, 10.0], [3.0, 10.0]])
    torch.testing.assert_close(numbers(stats), expected)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_of_the_user_s_makes_no_difference(device):
    space = find_layers(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), ["0", "1"])
    where = torch.tensor([1, 2])
    expected = numbers(WeightStats.around(space, where))
    with torch.device(device):
        assert torch.equal(numbers(WeightStats.around(space, where)), expected)
