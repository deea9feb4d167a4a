from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_nrl._utils.state import between, changed, check_saved, holding, saved_names, snapshot, write
from lightning_nrl.errors import ConfigurationError


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


NAMES = [
    "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    "head.weight", "exit.weight",
]  # fmt: skip
NEW = torch.tensor([[2.0, 3.0]])


def test_a_snapshot_has_what_is_saved_and_does_not_move_with_the_model() -> None:
    model = Shared()
    state = snapshot(model)
    assert list(state) == NAMES
    assert not any(value.requires_grad for value in state.values())
    with torch.no_grad():
        model.head.weight.fill_(9.0)
    assert not (state["head.weight"] == 9.0).any()


@pytest.mark.parametrize("name", ["head.weight", "exit.weight"])
def test_a_model_runs_on_other_tensors_for_a_while(name: str) -> None:
    model = Shared().eval()
    own, mean = model.head.weight, model.norm.running_mean
    held = NEW.clone().requires_grad_()
    with holding(model, {name: held, "norm.running_mean": torch.ones(2)}):
        # ([2, 4] - 1) @ [2, 3]
        torch.testing.assert_close(model(torch.tensor([[2.0, 4.0]])), torch.tensor([[11.0]]), rtol=1e-4, atol=0)
        model(torch.tensor([[2.0, 4.0]])).sum().backward()
        assert model.exit.weight is model.head.weight is held
    assert model.exit.weight is model.head.weight is own
    assert model.norm.running_mean is mean
    assert own.grad is None
    torch.testing.assert_close(held.grad, torch.tensor([[1.0, 3.0]]), rtol=1e-4, atol=0)


def test_a_model_has_its_own_tensors_again_after_an_exception() -> None:
    model = Shared()
    own = model.head.weight
    with pytest.raises(ZeroDivisionError), holding(model, {"exit.weight": NEW}):
        raise ZeroDivisionError
    assert model.exit.weight is model.head.weight is own


def test_states_may_be_held_inside_each_other() -> None:
    model = Shared()
    with holding(model, {"head.weight": NEW}):
        with holding(model, {"head.weight": NEW + 1}):
            assert model.exit.weight.tolist() == [[3.0, 4.0]]
        assert model.exit.weight is NEW


@pytest.mark.parametrize("name", ["head.weight", "exit.weight"])
def test_a_state_is_written_in_place_under_any_of_its_names(name: str) -> None:
    model = Shared()
    own = model.head.weight
    write(model, {name: NEW, "norm.num_batches_tracked": torch.tensor(7)})
    assert model.exit.weight is own
    assert own.tolist() == NEW.tolist()
    assert own.requires_grad
    assert int(model.norm.num_batches_tracked) == 7


WRONG = {"nowhere.weight": NEW, "cache": torch.ones(1), "head.weight": torch.zeros(2, 2), "norm.bias": torch.zeros(1)}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("use", [write, changed, lambda model, state: holding(model, state).__enter__()])
def test_a_state_that_does_not_fit_changes_nothing(name: str, use: object) -> None:
    model = Shared()
    before = snapshot(model)
    found = r"is not there" if name in ("nowhere.weight", "cache") else r"has the shape \["
    with pytest.raises(ConfigurationError, match=rf"`model`: its tensor '{name}' {found}"):
        use(model, {"norm.weight": torch.zeros(2), name: WRONG[name]})  # type: ignore[operator]
    assert not changed(model, before)


def test_what_differs_comes_under_all_its_names() -> None:
    model = Shared()
    own = snapshot(model)
    assert changed(model, own) == {}
    found = changed(model, {**own, "norm.bias": torch.ones(2)})
    assert list(found) == ["norm.bias"]
    found = changed(model, {"exit.weight": NEW})
    assert list(found) == ["head.weight", "exit.weight"]
    assert found["head.weight"] is found["exit.weight"] is NEW


def test_a_whole_state_with_a_new_tensor_under_each_name_differs_once() -> None:
    model = Shared()
    new = {**snapshot(model), "head.weight": NEW, "exit.weight": NEW.clone()}
    assert list(changed(model, new)) == ["head.weight", "exit.weight"]


def test_half_of_the_way_is_the_mean() -> None:
    old = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3), "other": NEW}
    new = {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(5)}
    assert between(old, new, 0.5)["w"].tolist() == [0.5, 3.0]
    assert between(old, new, 1.5)["w"].tolist() == [1.5, 5.0]
    assert [int(between(old, new, t)["n"]) for t in (0, 0.4, 0.5, 1.5)] == [3, 3, 5, 5]
    assert list(between(old, new, 0.3)) == ["w", "n"]


def test_a_variance_stays_at_or_above_zero() -> None:
    old, new = {"norm.running_var": torch.tensor([1.0, 1.0])}, {"norm.running_var": torch.tensor([0.1, 3.0])}
    torch.testing.assert_close(between(old, new, 1.5)["norm.running_var"], torch.tensor([0.0, 4.0]))


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_both_ends_are_exact_in_every_precision(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, new = ({"w": torch.randn(5, generator=generator).to(dtype)} for _ in range(2))
    assert torch.equal(between(old, new, 0)["w"], old["w"])
    assert torch.equal(between(old, new, 1)["w"], new["w"])
    middle = between(old, new, 0.25)["w"]
    assert middle.dtype == dtype
    exact = old["w"].double() + 0.25 * (new["w"].double() - old["w"].double())
    assert torch.allclose(middle.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-7)


def test_a_recurrent_layer_runs_on_other_tensors_too() -> None:
    torch.manual_seed(0)
    model, other, x = nn.LSTM(2, 3, batch_first=True), nn.LSTM(2, 3, batch_first=True), torch.randn(1, 4, 2)
    own, expected = model(x)[0], other(x)[0]
    with holding(model, snapshot(other)):
        assert torch.equal(model(x)[0], expected)
    assert torch.equal(model(x)[0], own)
    write(model, snapshot(other))
    assert torch.equal(model(x)[0], expected)


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
        (dict, {"weight": "weight", "bias": "bias"}),
        (lambda state: {f"net.{name}": x for name, x in state.items()}, {"net.weight": "weight", "net.bias": "bias"}),
        (lambda state: {"bias": state["bias"]}, {"bias": "bias"}),
        (lambda state: {name: x.half().clone() for name, x in state.items()}, {"weight": "weight", "bias": "bias"}),
        (lambda state: {**state, "weight": torch.zeros(2, 2)}, {"bias": "bias"}),
    ],
)
def test_a_state_dict_says_which_tensors_it_saves(form: Any, names: dict[str, str]) -> None:
    model = Saves(form)
    before = {name: x.clone() for name, x in model.named_parameters()}
    assert saved_names(model) == names
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    check_saved(model, names.values())
    if "weight" not in names.values():
        with pytest.raises(ConfigurationError, match="does not save 'weight' as it is"):
            check_saved(model, ["bias", "weight"])
