"""Files that are no patch, or no longer one."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.pipeline import Patch
from lightning_nrl.records import hash_tensors

OLD = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(4), "c": torch.zeros(2)}
NEW = {"a": OLD["a"] + torch.eye(3, 4), "b": torch.tensor(5), "c": torch.zeros(2)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Patch.between(OLD, NEW).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_other_tools_can_read_it(path):
    tensors = load_file(path)
    assert tensors["index/a"].tolist() == [0, 5, 10]
    assert tensors["old/a"].tolist() == [0, 5, 10]
    assert tensors["new/a"].tolist() == [1, 6, 11]
    assert (int(tensors["old/b"]), int(tensors["new/b"])) == (4, 5)
    assert len(tensors) == 5


def test_a_truncated_file_is_refused(path):
    content = path.read_bytes()
    for n in range(0, len(content), 11):
        path.write_bytes(content[:n])
        with pytest.raises(ConfigurationError, match=r"(?s)cannot be read|damaged.*HINT"):
            Patch.load(path)


def test_a_flipped_byte_is_refused_or_means_the_same(path):
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with contextlib.suppress(ConfigurationError):
            assert torch.equal(Patch.load(path).apply(OLD)["a"], NEW["a"])


def rewrite(path: Path, tensors: dict[str, Any], header: Any = None, report: str = "") -> None:
    """Gives the file other content, with the hash that fits it."""
    with safe_open(path, "pt") as file:
        texts = dict(file.metadata())
    texts["patch"] = json.dumps({**json.loads(texts["patch"]), **(header or {})})
    texts["report"] = report
    content = {**load_file(path), **tensors}
    parts = (texts["patch"], report, hash_tensors(content))
    texts["sha256"] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    save_file(content, path, texts)


def record(**changes: Any) -> dict[str, Any]:
    """Returns the header of one change."""
    hashes = {"sha256_old": "", "sha256_new": ""}
    header = {"shape": [3, 4], "dtype": "float32", "sparse": True, "values_of": "a", **hashes}
    return {"tensors": {"a": {**header, **changes}}}


@pytest.mark.parametrize(
    ("tensors", "header", "report"),
    [
        ({"index/a": torch.tensor([0, 5, 12])}, None, ""),
        ({"index/a": torch.tensor([0, 0, 10])}, None, ""),
        ({"index/a": torch.tensor([0, 5])}, None, ""),
        ({"new/a": torch.zeros(3).double()}, None, ""),
        ({"new/a": torch.tensor([1.0, 6.0, 12.0])}, None, ""),
        ({}, {"tensors": {}}, ""),
        ({}, record(), ""),
        ({}, record(values_of="z"), ""),
        ({}, record(shape=[10**9, 10**9]), ""),
        ({}, record(shape=[-3, -4]), ""),
        ({}, record(shape="3, 4"), ""),
        ({}, {"more": 3}, ""),
        ({}, None, "{"),
    ],
)
def test_an_inconsistent_file_is_refused(path, tensors, header, report):
    rewrite(path, tensors, header, report)
    with pytest.raises(ConfigurationError, match=r"p.safetensors'` is damaged: |`patch` "):
        Patch.load(path).apply(OLD)


def test_files_of_something_else_are_refused(tmp_path):
    file = tmp_path / "model"
    for metadata, problem in (
        ({}, "has the format 'none'"),
        ({"format": "lightning_nrl.patch.9"}, "the version of the package that wrote it"),
    ):
        save_file({"w": torch.zeros(2)}, file, metadata)
        with pytest.raises(ConfigurationError, match=problem):
            Patch.load(file)
    torch.save(OLD, file)
    for path in (file, tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigurationError, match=r"(?s)cannot be read.*HINT"):
            Patch.load(path)
