"""One module alone touches what is private in Lightning."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_package import DistributedSamplerWrapper, LightningModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

import lightning_nrl
from lightning_nrl._trainer.lightning import private_parts

PACKAGE = Path(lightning_nrl.__file__).parent
LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning.", "lightning_nrl._trainer.lightning")
OF_TORCH = {"_parameters", "_buffers", "_conv_forward", "_version"}
"""Private parts of torch, which other modules may touch."""


def private_uses(source: str) -> list[str]:
    """Private attributes of other objects, and private names of Lightning's packages, in a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIGHTNING):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            found += [node.attr] if node.attr.startswith("_") and not node.attr.startswith("__") else []
    return [name for name in found if name not in OF_TORCH]


def test_the_search_for_private_uses_finds_them() -> None:
    source = "from pytorch_lightning.core import _x\nself._mine\nmodule._trainer\nself.trainer.fit_loop._data_source"
    assert sorted(private_uses(source)) == ["_data_source", "_trainer", "_x"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_touches_private_parts_of_lightning(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    uses = private_uses(source) if any(name in source for name in LIGHTNING) else []
    if path == PACKAGE / "_trainer" / "lightning" / "private_parts.py":
        assert {"_trainer", "_data_source", "_combined_loader", "_on_before_batch_transfer"} < set(uses)
    elif path == PACKAGE / "_trainer" / "lightning" / "packages.py":
        assert uses == ["_load", "_WrappingCheckpointIO"]
    else:
        assert uses == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_module_alone_imports_lightning(path: Path) -> None:
    modules = {"lightning", "lightning_fabric", "pytorch_lightning"}
    imported = [
        name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.split(".")[0] in modules
    ]
    assert bool(imported) == (path == PACKAGE / "_trainer" / "lightning" / "packages.py")


def test_a_module_without_a_trainer_has_none() -> None:
    assert private_parts.trainer_of(LightningModule()) is None


def test_a_wrapped_sampler_is_given_with_its_wrapper() -> None:
    data = TensorDataset(torch.arange(6))
    plain = DataLoader(data, shuffle=True)
    outer, inner = private_parts.sampler_of(plain)
    assert isinstance(outer, RandomSampler)
    assert inner is outer
    wrapped = DistributedSamplerWrapper(RandomSampler(data), num_replicas=2, rank=0)
    outer, inner = private_parts.sampler_of(DataLoader(data, sampler=wrapped))
    assert isinstance(outer, DistributedSampler)
    assert isinstance(inner, RandomSampler)


def test_a_compiled_module_is_told_from_a_plain_one() -> None:
    plain, compiled = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    compiled.compile(backend="eager")
    assert (private_parts.is_compiled(plain), private_parts.is_compiled(compiled)) == (False, True)
    whole = torch.compile(plain, backend="eager")
    assert private_parts.original_module(whole) is plain


def test_the_batch_limit_is_that_of_a_fast_dev_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    assert private_parts.batch_limit(Trainer(**settings)) is None
    assert private_parts.batch_limit(Trainer(**settings, fast_dev_run=2)) == 2
