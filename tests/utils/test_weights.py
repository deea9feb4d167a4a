"""Weights of a live model: read, replaced for a while, written, hashed, and given back as they
were.
"""

from __future__ import annotations

import copy
import random
import tempfile
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_repairs import known, quick, trained, unseen

from lightning_nrl import Target, repair_module
from lightning_nrl._utils.preserve import eval_mode, preserve_state, random_state
from lightning_nrl._utils.state import (
    between,
    changed,
    check_saved,
    hash_tensors,
    parked,
    saved_names,
    snapshot,
    temporary_weights,
    write,
)
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.localization import AllWeights


class Shared(nn.Module):
    """One head under two names, a batch norm, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 1, bias=False)
        self.exit = self.head
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.norm(x))


NEW = torch.tensor([[2.0, 3.0]])


@pytest.mark.parametrize("name", ["head.weight", "exit.weight"])
def test_a_model_runs_on_other_tensors_for_a_while(name):
    model = Shared().eval()
    weight, mean = model.head.weight, model.norm.running_mean
    new_weight = NEW.clone().requires_grad_()
    with temporary_weights(model, {name: new_weight, "norm.running_mean": torch.ones(2)}):
        output = model(torch.tensor([[2.0, 4.0]]))
        assert output.item() == pytest.approx((2 - 1) * 2 + (4 - 1) * 3, rel=1e-4)
        output.backward()
        assert model.exit.weight is model.head.weight is new_weight
    assert model.exit.weight is model.head.weight is weight
    assert model.norm.running_mean is mean
    assert weight.grad is None
    torch.testing.assert_close(new_weight.grad, torch.tensor([[1.0, 3.0]]), rtol=1e-4, atol=0)


WRONG = {
    "nowhere.weight": NEW,
    "cache": torch.ones(1),
    "head.weight": torch.zeros(2, 2),
    "norm.bias": torch.zeros(1),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    "use", [write, changed, lambda model, state: temporary_weights(model, state).__enter__()]
)
def test_a_state_that_does_not_fit_changes_nothing(name, use):
    model = Shared()
    before = snapshot(model)
    message = rf"`model`: its tensor '{name}' (is missing|has the shape \[)"
    with pytest.raises(ConfigurationError, match=message):
        use(model, {"norm.weight": torch.zeros(2), name: WRONG[name]})
    assert not changed(model, before)


def test_half_of_the_way_is_the_mean():
    old = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3), "other": NEW}
    new = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(5)}
    assert between(old, new, 0.5)["w"].tolist() == [0.5, 3.0]
    assert between(old, new, 1.5)["w"].tolist() == [-0.5, 5.0]
    assert [int(between(old, new, t)["n"]) for t in (0, 0.4, 0.5, 1.5)] == [3, 3, 5, 5]
    assert list(between(old, new, 0.3)) == ["w", "n"]
    variances = between({"x.running_var": old["w"]}, {"x.running_var": new["w"]}, 1.5)
    assert variances["x.running_var"].tolist() == [0.0, 5.0]


class Saves(nn.Linear):
    """Gives its state dict in another form."""

    def __init__(self, form: Any) -> None:
        super().__init__(2, 2)
        self.form = form

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.form(super().state_dict(*args, **kwargs))


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (
            lambda state: {f"net.{name}": x for name, x in state.items()},
            {"net.weight": "weight", "net.bias": "bias"},
        ),
        (
            lambda state: {name: x.half().clone() for name, x in state.items()},
            {"weight": "weight", "bias": "bias"},
        ),
        (lambda state: {**state, "weight": torch.zeros(2, 2)}, {"bias": "bias"}),
    ],
)
def test_a_state_dict_says_which_tensors_it_saves(form, names):
    model = Saves(form)
    before = {name: x.clone() for name, x in model.named_parameters()}
    assert saved_names(model) == names
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    check_saved(model, names.values())
    if "weight" not in names.values():
        with pytest.raises(ConfigurationError, match="does not save 'weight' as it is"):
            check_saved(model, ["bias", "weight"])


def test_hash_tells_names_shapes_and_dtypes_apart():
    x = torch.zeros(2, 2)
    states = [{"w": x}, {"v": x}, {"w": x.flatten()}, {"w": x.int()}, {"w": x, "v": x}, {"w": -x}]
    assert len(set(map(hash_tensors, states))) == len(states)
    assert hash_tensors({"w": x, "v": -x}) == hash_tensors({"v": (-x).T, "w": nn.Parameter(x)})


@pytest.mark.filterwarnings("ignore:Sparse")
def test_hash_takes_sparse_tensors_and_sees_values_and_places():
    rows = ([1.0, 0.0, 2.0], [1.0, 0.0, 3.0], [1.0, 2.0, 0.0])
    hashes = [hash_tensors({"w": torch.tensor([row]).to_sparse_csr()}) for row in (*rows, rows[0])]
    assert len(set(hashes)) == 3


class Counting(nn.Module):
    """Counts its calls in one buffer in place, replaces another, and draws a random number, in
    evaluation mode too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().sum()[None]
        torch.rand(2)
        return x


def network() -> nn.Sequential:
    """Everything that a careless look would change: norms, dropout, own counters, frozen parts,
    modes and gradients.
    """
    model = nn.Sequential(
        trained()[0], nn.BatchNorm1d(12), nn.ReLU(), Counting(), nn.Dropout(0.5), trained()[2]
    )
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(3)
    return model


def picture(model: nn.Module) -> list[Any]:
    """All that a user may notice, by identity and by value."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return [
        [(name, id(x), x.detach().clone(), x.requires_grad) for name, x in tensors],
        [copy.deepcopy(p.grad) for p in model.parameters()],
        [(module.training, sorted(vars(module))) for module in model.modules()],
        str(hooks),
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("layer", ["auto", ["0", "5"]])
def test_a_repair_leaves_no_trace(layer):
    model = network()
    before = picture(model)
    outcome = repair_module(
        model, known(), quick(layer=layer, localizer=AllWeights()), unseen=unseen()
    )
    assert outcome.report.search is not None
    assert same(picture(model), before)


class OutOfMemory(Exception):
    pass


class FailingLocalizer(AllWeights):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise OutOfMemory


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"localizer": FailingLocalizer()}, OutOfMemory),
        ({"target": Target.where(lambda batch: batch[7])}, ValueError),
    ],
)
def test_a_repair_that_raises_leaves_no_trace(part, error):
    model = network()
    before = picture(model)
    with pytest.raises(error):
        repair_module(model, known(), quick(**part))
    assert same(picture(model), before)


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_random_state_is_as_found(error):
    with random_state():
        expected = draw()
    with nullcontext() if error is None else pytest.raises(error), random_state():
        draw()
        torch.manual_seed(0)
        if error is not None:
            raise error
    assert draw() == expected


class Rewritten(nn.Module):
    """Does to its weights all that a module can do in evaluation mode, and undoes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.swapped, self.lost, self.zero = (
            nn.Parameter(torch.zeros(2)) for _ in range(4)
        )
        self.zero.data.copy_(torch.tensor([-0.0, torch.nan]))
        self.merged = False

    def train(self, mode: bool = True) -> Rewritten:
        if not mode:
            with torch.no_grad():
                self.written.add_(1)
            self.swapped.data = torch.ones(3, dtype=torch.float64)
            lost, self.merged = self._parameters.pop("lost"), True
            self.register_parameter("other", nn.Parameter(torch.ones(1)))
            self.register_parameter("lost", nn.Parameter(lost.detach() + 1))
            self.zero.data.abs_()
        return super().train(mode)


def test_parameters_are_given_back_to_the_bit_as_the_same_objects_in_the_same_memory():
    model = Rewritten()
    parameters = dict(model.named_parameters())
    memory = {name: value.data_ptr() for name, value in parameters.items()}
    with preserve_state(model):
        assert model.merged
        assert torch.equal(model.written, torch.ones(2))
        assert model.swapped.shape == (3,)
    assert [name for name, _ in model.named_parameters()] == [
        "written",
        "swapped",
        "lost",
        "zero",
        "other",
    ]
    for name, value in parameters.items():
        assert getattr(model, name) is value
        assert value.data_ptr() == memory[name]
        assert value.requires_grad
    assert torch.equal(torch.stack([model.written, model.swapped, model.lost]), torch.zeros(3, 2))
    assert model.zero.signbit()[0]
    assert model.zero.isnan()[1]
    assert not model.merged


def test_what_an_inner_use_writes_is_undone_by_the_outer_one():
    model = nn.Embedding(3, 2, max_norm=0.1)
    before = model.weight.detach().clone()
    with eval_mode(model), eval_mode(model):
        model(torch.arange(3))
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_a_large_tensor_is_in_a_file(dtype):
    x = torch.randn(600, 1000).to(dtype).T
    copy = parked(x)
    assert torch.equal(copy, x)
    assert copy.untyped_storage().is_shared()
    copy.zero_()  # does not change the file of another copy
    assert torch.equal(parked(x), x)
    assert not parked(x[:10]).untyped_storage().is_shared()


def test_without_a_disk_a_copy_is_in_memory(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/does/not/exist")
    x = torch.randn(600, 1000)
    copy = parked(x)
    assert torch.equal(copy, x)
    assert not copy.untyped_storage().is_shared()
