from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_repairs import known, quick, trained

from lightning_nrl import ConfigurationError, repair_module
from lightning_nrl.pipeline import Patch, patch_checkpoint

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(raw(a[name]) == raw(b[name]) for name in a)


def of_bytes(content: bytes, dtype: torch.dtype) -> Tensor:
    """A vector whose values are these bytes, whatever they mean; bools are 0 and 1."""
    content = bytes(x & 1 for x in content) if dtype == torch.bool else content
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).clone().view(dtype)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(state: dict[str, Tensor], name: str, at: int, value: float) -> dict[str, Tensor]:
    new = {key: tensor.clone() for key, tensor in state.items()}
    new[name].view(-1)[at] = value
    return new


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.data())
def test_every_bit_of_every_dtype_goes_there_and_back(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    size = 24 * dtype.itemsize
    old = data.draw(st.binary(min_size=size, max_size=size))
    at, n = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    new = bytes(x ^ 1 if at <= i < at + n else x for i, x in enumerate(old))
    before, after = ({"w": of_bytes(content, dtype).view(4, 6)} for content in (old, new))
    patch = Patch.between(before, after)
    assert same(patch.apply(before), after)
    assert same(patch.revert(after), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 20])
def test_a_file_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    old = (
        torch.randint(0, 256, (24 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        .numpy()
        .tobytes()
    )
    new = bytes(x ^ 1 for x in old[: n * dtype.itemsize]) + old[n * dtype.itemsize :]
    empty = torch.zeros(0, 3, dtype=dtype)  # such as an unused embedding
    before, after = (
        {"a.b": of_bytes(content, dtype).view(2, 12), "none": empty.clone()}
        for content in (old, new)
    )
    Patch.between(before, after).save(tmp_path / "p.safetensors")
    patch = Patch.load(tmp_path / "p.safetensors")
    assert patch.n_changed == (1 if n == 1 else 24)
    assert (patch.changes["a.b"].index is None) == (n == 20)
    assert same(patch.apply(before), after)
    assert same(patch.revert(after), before)


def test_a_module_is_changed_in_place_and_a_state_dict_is_copied() -> None:
    model = network()
    parameters, old = list(model.parameters()), copied(model)
    new = changed(changed(old, "0.weight", 5, 7.0), "1.num_batches_tracked", 0, 3)
    patch = Patch.between(old, new)
    assert patch.apply(model) is model
    assert same(copied(model), new)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(copied(patch.revert(model)), old)
    given_state = model.state_dict()
    found = patch.apply(given_state)
    assert same(dict(given_state), old)
    assert found._metadata == given_state._metadata  # type: ignore[attr-defined]


def test_another_model_is_refused_and_stays() -> None:
    old = copied(network())
    patch = Patch.between(old, changed(old, "3.weight", 2, 1.0))
    other = network()
    nn.init.zeros_(other[0].bias)
    before = copied(other)
    for state, problem in (
        (other, "but other tensors of the model differ"),
        (
            changed(old, "3.weight", 3, 1.0),
            "1 of the 1 tensors that it changes have other values, such as `3.weight`",
        ),
        ({"w": torch.zeros(3)}, "the model has no tensor `3.weight`"),
        (
            {name: value.double() for name, value in old.items()},
            "is torch.float64 .3, 8. in the model and torch.f",
        ),
        (
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 4)),
            r"32 \[4, 8\] .*32 \[3, 8\] in",
        ),
    ):
        with pytest.raises(
            ConfigurationError, match=rf"(?s)`patch` cannot be applied: .*{problem}.*HINT"
        ):
            patch.apply(state)
    assert same(copied(other), before)
    with pytest.raises(ConfigurationError, match="found a str, not a module"):
        patch.apply("model.ckpt")  # type: ignore[call-overload]


def test_patches_stack_and_come_off_in_order() -> None:
    first = copied(network())
    second = changed(first, "3.weight", 2, 1.0)
    third = changed(second, "3.weight", 2, 2.0)
    one, two = Patch.between(first, second), Patch.between(second, third)
    assert one.result == two.base
    model = network()
    with pytest.raises(
        ConfigurationError, match=r"(?s)cannot be applied.*in the order they were made"
    ):
        two.apply(model)
    two.apply(one.apply(model))
    with pytest.raises(
        ConfigurationError, match=r"(?s)cannot be reverted.*revert the later patches first"
    ):
        one.revert(model)
    with pytest.raises(ConfigurationError, match="the weights already contain this change"):
        two.apply(model)
    assert same(copied(one.revert(two.revert(model))), first)
    with pytest.raises(ConfigurationError, match="the weights do not contain this change"):
        one.revert(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_parameters_stay_tied_and_are_kept_once(tmp_path: Path) -> None:
    model = Tied()
    torch.save(model.state_dict(), tmp_path / "old.pt")
    old = copied(model)
    nn.init.ones_(model.head.weight)
    patch = Patch.between(old, model)
    patch.revert(model)
    patch.save(tmp_path / "p.safetensors")
    patch = Patch.load(tmp_path / "p.safetensors")
    assert (patch.names, patch.n_changed) == (("embedding.weight", "head.weight"), 400)
    assert (tmp_path / "p.safetensors").stat().st_size < 2 * 400 * 4 + 3000
    assert patch.apply(model).head.weight is model.embedding.weight
    assert bool((model.embedding.weight == 1).all())
    patch_checkpoint(patch, tmp_path / "old.pt", tmp_path / "new.pt")
    state = torch.load(tmp_path / "new.pt", weights_only=True)
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()


def test_a_repair_is_a_patch_with_its_report(tmp_path: Path) -> None:
    model = trained()
    outcome = repair_module(model, known(), quick())
    assert outcome.parameters
    state = copied(model)
    patch = Patch.between(state, {**state, **outcome.parameters}, outcome.report)
    patch.save(tmp_path / "p.safetensors")
    patch = Patch.load(tmp_path / "p.safetensors")
    assert patch.report == outcome.report
    assert outcome.report.hashes is not None
    assert (patch.base, patch.result) == (
        outcome.report.hashes.model_before,
        outcome.report.hashes.model_after,
    )
    patch.apply(model)
    assert same(copied(model), {**state, **outcome.parameters})


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, "the same as `old`"),
        ({"w": torch.zeros(2)}, {"v": torch.zeros(2)}, "`v` is in only one of the states"),
        (
            {"w": torch.zeros(2)},
            {"w": torch.zeros(3)},
            r"`w` is torch.float32 \[2\] and torch.float32 \[3\]",
        ),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2).half()}, r"and torch.float16 \[2\]"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2).to_sparse()}, "no plain tensor"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2, device="meta")}, "no plain tensor"),
    ],
)
def test_states_that_make_no_patch_are_refused(old: Any, new: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        Patch.between(old, new)


class Saving(nn.Linear):
    """A module with a state dict of its own: copies under other names, and what is no tensor of it."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        own = super().state_dict(*args, **kwargs)
        return OrderedDict(
            saved=own["weight"], bias=own["bias"].clone(), mean=own["weight"].mean(0)
        )


def test_a_patch_has_the_names_of_the_state_dict() -> None:
    model = Saving(2, 2)
    old = copied(model)
    new = changed(changed(old, "saved", 0, 9.0), "bias", 1, 8.0)
    new["mean"] = old["mean"]
    Patch.between(old, new).apply(model)
    assert (model.weight[0, 0].item(), model.bias[1].item()) == (9, 8)
    with pytest.raises(
        ConfigurationError, match="`mean` in the state dict of Saving is none of the module's own"
    ):
        Patch.between(copied(model), changed(copied(model), "mean", 0, 0.5)).apply(model)


ZEROS = {"w": torch.zeros(6), "b": torch.ones(2)}
THREE = {"w": torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, -0.0]), "b": torch.ones(2)}
ONE_CHANGE = Patch.between(ZEROS, THREE)


def test_all_else_in_a_checkpoint_stays(tmp_path: Path) -> None:
    whole = {
        "state_dict": ZEROS,
        "epoch": 3,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(6)}}}],
    }
    torch.save(whole, tmp_path / "old.ckpt")
    patch_checkpoint(ONE_CHANGE, tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    found = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert torch.equal(found["state_dict"]["w"].view(torch.int32), THREE["w"].view(torch.int32))
    assert found["epoch"] == 3
    assert torch.equal(found["optimizer_states"][0]["state"][0]["exp_avg"], torch.ones(6))
    assert torch.equal(torch.load(tmp_path / "old.ckpt")["state_dict"]["w"], ZEROS["w"])
    patch_checkpoint(ONE_CHANGE, tmp_path / "new.ckpt", tmp_path / "new.ckpt", undo=True)
    found = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert torch.equal(found["state_dict"]["w"].view(torch.int32), ZEROS["w"].view(torch.int32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.ckpt", "old.ckpt"]


def test_what_is_refused_writes_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": THREE}, tmp_path / "new.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"state_dict": ZEROS, "hyper_parameters": Namespace(a=1)}, tmp_path / "objects.ckpt")
    for name, problem in (
        ("new.ckpt", "the weights already contain this change"),
        ("list.ckpt", "holds a list"),
        (
            "objects.ckpt",
            r"(?s)UnpicklingError: it holds objects, such as a `argparse.Namespace`\).*weights_only=False",
        ),
        ("nowhere.ckpt", "cannot be read"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            patch_checkpoint(ONE_CHANGE, tmp_path / name, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
    patch_checkpoint(
        ONE_CHANGE, tmp_path / "objects.ckpt", tmp_path / "out.ckpt", weights_only=False
    )
    assert torch.load(tmp_path / "out.ckpt", weights_only=False)["hyper_parameters"].a == 1
