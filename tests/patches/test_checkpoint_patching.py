from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from lightning_nrl import ConfigurationError
from lightning_nrl.patches import Patch, patch_checkpoint

OLD = {"w": torch.zeros(6), "b": torch.ones(2)}
NEW = {"w": torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, -0.0]), "b": torch.ones(2)}
PATCH = Patch.between(OLD, NEW)


def test_all_else_in_a_checkpoint_stays(tmp_path: Path) -> None:
    whole = {"state_dict": OLD, "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(6)}}}]}
    torch.save(whole, tmp_path / "old.ckpt")
    patch_checkpoint(PATCH, tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    found = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert torch.equal(found["state_dict"]["w"].view(torch.int32), NEW["w"].view(torch.int32))
    assert found["epoch"] == 3
    assert torch.equal(found["optimizer_states"][0]["state"][0]["exp_avg"], torch.ones(6))
    assert torch.equal(torch.load(tmp_path / "old.ckpt")["state_dict"]["w"], OLD["w"])
    patch_checkpoint(PATCH, tmp_path / "new.ckpt", tmp_path / "new.ckpt", undo=True)
    found = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert torch.equal(found["state_dict"]["w"].view(torch.int32), OLD["w"].view(torch.int32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.ckpt", "old.ckpt"]


def test_a_file_with_a_state_dict_will_do(tmp_path: Path) -> None:
    torch.save(OLD, tmp_path / "old.pt")
    patch_checkpoint(PATCH, tmp_path / "old.pt", tmp_path / "new.pt")
    assert torch.equal(torch.load(tmp_path / "new.pt")["w"], NEW["w"])


def test_what_is_refused_writes_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": NEW}, tmp_path / "new.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"state_dict": OLD, "hyper_parameters": Namespace(a=1)}, tmp_path / "objects.ckpt")
    for name, problem in (
        ("new.ckpt", "these weights have it already"),
        ("list.ckpt", "holds a list"),
        (
            "objects.ckpt",
            r"(?s)UnpicklingError: it holds objects, such as a `argparse.Namespace`\).*weights_only=False",
        ),
        ("nowhere.ckpt", "cannot be read"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            patch_checkpoint(PATCH, tmp_path / name, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
    patch_checkpoint(PATCH, tmp_path / "objects.ckpt", tmp_path / "out.ckpt", weights_only=False)
    assert torch.load(tmp_path / "out.ckpt", weights_only=False)["hyper_parameters"].a == 1
