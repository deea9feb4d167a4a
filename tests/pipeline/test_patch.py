from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_repairs import known, quick, trained

from lightning_nrl import ConfigurationError, repair_module
from lightning_nrl.pipeline import Patch, patch_checkpoint
from lightning_nrl.records import hash_tensors

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


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return hash_tensors(a) == hash_tensors(b)


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


@pytest.mark.parametrize(("n_changed", "n_stored"), [(1, 1), (20, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_keeps_every_bit(tmp_path, dtype, n_changed, n_stored):
    old = bytes(torch.arange(24 * dtype.itemsize).mul(37).remainder(256).tolist())
    n_bytes = n_changed * dtype.itemsize
    new = bytes(x ^ 1 for x in old[:n_bytes]) + old[n_bytes:]
    empty = torch.zeros(0, 3, dtype=dtype)  # such as an unused embedding
    before = {"a.b": of_bytes(old, dtype).view(2, 12), "none": empty}
    after = {"a.b": of_bytes(new, dtype).view(2, 12), "none": empty.clone()}
    Patch.between(before, after).save(tmp_path / "p.safetensors")
    patch = Patch.load(tmp_path / "p.safetensors")
    assert patch.n_changed == n_stored
    assert same(patch.apply(before), after)
    assert same(patch.revert(after), before)


def test_a_module_is_changed_in_place_and_a_state_dict_is_copied():
    model = network()
    parameters, old = list(model.parameters()), copied(model)
    new = changed(changed(old, "0.weight", 5, 7.0), "1.num_batches_tracked", 0, 3)
    patch = Patch.between(old, new)
    assert patch.apply(model) is model
    assert same(copied(model), new)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(copied(patch.revert(model)), old)
    state = model.state_dict()
    assert patch.apply(state)._metadata == state._metadata
    assert same(state, old)


def test_another_model_is_refused_and_stays():
    old = copied(network())
    patch = Patch.between(old, changed(old, "3.weight", 2, 1.0))
    other = network()
    nn.init.zeros_(other[0].bias)
    before = copied(other)
    smaller = {**old, "3.weight": torch.zeros(2, 8)}
    for state, problem in (
        (other, "but other tensors of the model differ"),
        (changed(old, "3.weight", 3, 1.0), "1 of the 1 tensors .* have other values, such as `3.w"),
        ({"w": torch.zeros(3)}, "the model has no tensor `3.weight`"),
        (
            smaller,
            r"is torch.float32 \[2, 8\] in the model and torch.float32 \[3, 8\] in the patch",
        ),
    ):
        with pytest.raises(ConfigurationError, match=rf"`patch` cannot be applied: .*{problem}"):
            patch.apply(state)
    assert same(copied(other), before)
    with pytest.raises(ConfigurationError, match="found a str, not a module"):
        patch.apply("model.ckpt")


def test_patches_stack_and_come_off_in_order():
    first = copied(network())
    second = changed(first, "3.weight", 2, 1.0)
    third = changed(second, "3.weight", 2, 2.0)
    early, late = Patch.between(first, second), Patch.between(second, third)
    model = network()
    with pytest.raises(ConfigurationError, match=r"(?s)be applied.*in the order they were made"):
        late.apply(model)
    late.apply(early.apply(model))
    with pytest.raises(
        ConfigurationError, match=r"(?s)be reverted.*revert the later patches first"
    ):
        early.revert(model)
    with pytest.raises(ConfigurationError, match="the weights already contain this change"):
        late.apply(model)
    assert same(copied(early.revert(late.revert(model))), first)
    with pytest.raises(ConfigurationError, match="the weights do not contain this change"):
        early.revert(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_parameters_stay_tied_and_are_kept_once(tmp_path):
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


def test_a_repair_is_a_patch_with_its_report(tmp_path):
    model = trained()
    outcome = repair_module(model, known(), quick())
    state = copied(model)
    outcome.write(model)
    Patch.between(state, model, outcome.report).save(tmp_path / "p.safetensors")
    patch = Patch.load(tmp_path / "p.safetensors")
    assert patch.report == outcome.report
    hashes = outcome.report.hashes
    assert (patch.base, patch.result) == (hashes.model_before, hashes.model_after)


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
def test_states_that_make_no_patch_are_refused(old, new, problem):
    with pytest.raises(ConfigurationError, match=problem):
        Patch.between(old, new)


class Saving(nn.Linear):
    """A layer whose state dict renames, copies and adds tensors."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        weight, bias = state["weight"], state["bias"]
        return OrderedDict(saved=weight, bias=bias.clone(), mean=weight.mean(0))


def test_a_patch_has_the_names_of_the_state_dict():
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


def test_all_else_in_a_checkpoint_stays(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": ZEROS, "epoch": 3}, path)
    for undo, state in ((False, THREE), (True, ZEROS)):
        patch_checkpoint(ONE_CHANGE, path, path, undo=undo)
        content = torch.load(path, weights_only=True)
        assert same(content["state_dict"], state)
        assert content["epoch"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_checkpoint_writes_nothing(tmp_path):
    out, objects = tmp_path / "out.ckpt", tmp_path / "objects.ckpt"
    torch.save({"state_dict": THREE}, tmp_path / "new.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"state_dict": ZEROS, "hyper_parameters": Namespace(a=1)}, objects)
    for name, problem in (
        ("new.ckpt", "the weights already contain this change"),
        ("list.ckpt", "holds a list"),
        ("objects.ckpt", r"(?s)holds objects, such as a `argparse.Namespace`.*weights_only=False"),
        ("nowhere.ckpt", "cannot be read"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            patch_checkpoint(ONE_CHANGE, tmp_path / name, out)
    assert not out.exists()
    patch_checkpoint(ONE_CHANGE, objects, out, weights_only=False)
    assert torch.load(out, weights_only=False)["hyper_parameters"].a == 1
