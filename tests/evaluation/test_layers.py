"""Layers by name, and their weights as one flat vector."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.layers import find_layers


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU())
        self.hidden = nn.Linear(8, 3)
        self.classifier = nn.Linear(3, 2)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.classifier(self.hidden(self.features(x).flatten(1)))


@pytest.fixture
def model() -> Network:
    network = Network().eval()
    n_weights = sum(parameter.numel() for parameter in network.parameters())
    vector_to_parameters(torch.arange(float(n_weights)), network.parameters())
    return network


def test_auto_is_the_last_linear(model):
    (site,) = find_layers(model).sites
    assert (site.name, site.module, site.offset) == ("classifier", model.classifier, 0)
    assert site.weight_shape == (2, 3)


def test_auto_leaves_a_frozen_layer_as_it_is_unless_all_are_frozen(model):
    model.classifier.weight.requires_grad_(False)
    assert find_layers(model).sites[0].name == "hidden"
    assert find_layers(model, "classifier").sites[0].name == "classifier"
    model.requires_grad_(False)
    assert find_layers(model).sites[0].name == "classifier"


def test_flat_vector_has_weights_row_by_row_then_bias(model):
    space = find_layers(model, ["hidden", "features.0", "classifier"], include_bias=True)
    expected = [
        model.hidden.weight.flatten(),
        model.hidden.bias,
        model.features[0].weight.flatten(),
        model.classifier.weight.flatten(),
        model.classifier.bias,
    ]
    assert torch.equal(space.flat(), torch.cat(expected))
    assert [site.offset for site in space.sites] == [0, 27, 35]
    assert (space.size, space.dtype, space.device) == (43, torch.float32, torch.device("cpu"))


def test_changed_sets_weights_by_flat_position_and_leaves_the_model(model):
    space = find_layers(model, ["features.0", "classifier"], include_bias=True)
    before = space.flat()
    changed = space.changed(
        torch.tensor([1, 8 + 5, 8 + 7]), torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    )
    assert list(changed) == ["features.0.weight", "classifier.weight", "classifier.bias"]
    assert changed["features.0.weight"].flatten()[:3].tolist() == [0.0, -1.0, 2.0]
    assert changed["classifier.weight"][1, 2] == -2
    assert changed["classifier.bias"][1] == -3
    assert torch.equal(space.flat(), before)


def test_memory_layout_does_not_matter(model):
    before = find_layers(model, "features.0").flat()
    model.to(memory_format=torch.channels_last)
    space = find_layers(model, "features.0")
    assert torch.equal(space.flat(), before)
    changed = space.changed(torch.tensor([3]), torch.tensor([9.0]))["features.0.weight"]
    assert changed.flatten()[3] == 9


def test_the_model_itself_may_be_the_layer():
    layer = nn.Linear(2, 2)
    space = find_layers(layer)
    assert space.sites[0].name == ""
    assert list(space.sites[0].parameters) == ["weight"]
    assert find_layers(layer, "").size == 4


def test_a_layer_may_be_called_by_any_of_its_names(model):
    model.alias = model.hidden
    assert find_layers(model, "alias").sites[0].module is model.hidden
    with pytest.raises(ConfigurationError, match="names a layer twice"):
        find_layers(model, ["hidden", "alias"])


@pytest.mark.parametrize(
    ("layer", "found", "hint"),
    [
        ("classifer", "`layer='classifer'` is not in the model", "'classifier'"),
        ("qqq", "`layer='qqq'` is not in the model", "'features.0', 'hidden', 'classifier'"),
        ("features", "`layer='features'` is a Sequential", "'features.0'"),
        ("drop", "`layer='drop'` is a Dropout", "name a Linear, Conv1d/2d/3d, LSTM, GRU or RNN."),
        (["hidden", "hidden"], "names a layer twice", "once"),
        ([], "names no layer", "auto"),
        (None, "`layer=None` names no layer", "auto"),
    ],
)
def test_names_that_cannot_be_repaired_are_refused_with_a_hint(model, layer, found, hint):
    with pytest.raises(ConfigurationError) as caught:
        find_layers(model, layer)
    problem, _, advice = str(caught.value).partition("\nHINT: ")
    assert found in problem
    assert hint in advice


def test_auto_without_a_linear_is_the_last_convolution(model):
    assert [site.name for site in find_layers(model.features).sites] == ["0"]


def test_auto_without_anything_to_repair_is_refused():
    with pytest.raises(
        ConfigurationError, match=r"found no Linear layer and no conv.*\nHINT: name a Linear, Conv"
    ):
        find_layers(nn.Sequential(nn.ReLU()))


def test_lazy_layer_is_refused():
    with pytest.raises(ConfigurationError, match=r"`layer='0'` is lazy.*\nHINT: run one batch"):
        find_layers(nn.Sequential(nn.LazyLinear(3)))


def test_parametrised_layer_is_refused():
    with pytest.raises(
        ConfigurationError, match="`layer='0'` has no floating-point weight of its own"
    ):
        find_layers(nn.Sequential(weight_norm(nn.Linear(3, 3))))


def test_looking_for_layers_leaves_the_power_iteration_of_a_spectral_norm():
    model = nn.Sequential(spectral_norm(nn.Linear(30, 40)), nn.Linear(40, 2)).train()
    before = copy.deepcopy(model.state_dict())
    assert [site.name for site in find_layers(model).sites] == ["1"]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ConfigurationError, match=r"`layer='1'` shares its weights"):
        find_layers(model)


def test_several_dtypes_are_refused(model):
    model.hidden.half()
    with pytest.raises(
        ConfigurationError, match=r"several dtypes.*torch.float16 on cpu.*torch.float32 on cpu"
    ):
        find_layers(model, ["hidden", "classifier"])
