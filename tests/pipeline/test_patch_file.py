"""Files that are no patch, or no longer one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.pipeline import Patch
from lightning_nrl.pipeline.patch_file import _digest

OLD = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(4), "c": torch.zeros(2)}
NEW = {"a": OLD["a"] + torch.eye(3, 4), "b": torch.tensor(5), "c": torch.zeros(2)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Patch.between(OLD, NEW).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_other_tools_can_read_it(path: Path) -> None:
    tensors = load_file(path)
    assert tensors["index/a"].tolist() == [0, 5, 10]
    assert tensors["old/a"].tolist() == [0, 5, 10]
    assert tensors["new/a"].tolist() == [1, 6, 11]
    assert (int(tensors["old/b"]), int(tensors["new/b"])) == (4, 5)
    assert len(tensors) == 5


def test_every_truncation_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ConfigurationError, match=r"(?s)cannot be read|damaged.*HINT"):
            Patch.load(path)


def test_every_flipped_byte_is_refused_or_means_the_same(path: Path) -> None:
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with contextlib.suppress(ConfigurationError):
            found = Patch.load(path)
            assert torch.equal(found.apply(OLD)["a"], NEW["a"])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)
@given(st.binary(max_size=200))
def test_any_bytes_give_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"(?s)x'` cannot be read.*HINT"):
        Patch.load(tmp_path / "x")


def rewritten(
    path: Path, tensors: dict[str, Any], header: dict[str, Any] | None = None, report: str = ""
) -> None:
    """The file with other content, and the hash that fits it."""
    with safe_open(path, "pt") as file:
        texts = dict(file.metadata())
    texts["patch"] = json.dumps({**json.loads(texts["patch"]), **(header or {})})
    texts["report"] = report
    kept = {
        name: value for name, value in {**load_file(path), **tensors}.items() if value is not None
    }
    texts["sha256"] = _digest(texts["patch"], report, kept)
    save_file(kept, path, texts)


def record(**changes: Any) -> dict[str, Any]:
    own = {
        "shape": [3, 4],
        "dtype": "float32",
        "sparse": True,
        "sha256_old": "",
        "sha256_new": "",
        "values_of": "a",
    }
    return {**own, **changes}


@pytest.mark.parametrize(
    ("tensors", "header", "report"),
    [
        ({"index/a": torch.tensor([0, 5, 12])}, None, ""),
        ({"index/a": torch.tensor([-1, 5, 10])}, None, ""),
        ({"index/a": torch.tensor([0, 0, 10])}, None, ""),
        ({"index/a": torch.tensor([0, 5])}, None, ""),
        (
            {
                "index/a": torch.zeros(0, dtype=torch.int64),
                "old/a": torch.zeros(0),
                "new/a": torch.zeros(0),
            },
            None,
            "",
        ),
        ({"new/a": torch.zeros(3, 1)}, None, ""),
        ({"new/a": torch.zeros(3).double()}, None, ""),
        ({"new/a": None}, None, ""),
        ({}, {"tensors": {}}, ""),
        ({}, {"tensors": {"a": record()}}, ""),
        ({}, {"tensors": {"a": record(values_of="z")}}, ""),
        ({"old/b": None, "new/b": None}, {"tensors": {"a": record(shape=[10**30, 4])}}, ""),
        ({"old/b": None, "new/b": None}, {"tensors": {"a": record(shape=[-3, -4])}}, ""),
        ({"old/b": None, "new/b": None}, {"tensors": {"a": record(shape="3, 4")}}, ""),
        ({"old/b": None, "new/b": None}, {"tensors": {"a": record(), "d": record(shape=[2])}}, ""),
        ({}, {"base": 3}, ""),
        ({}, {"more": 3}, ""),
        ({}, None, "{"),
        ({}, None, "[" * 100_000),
    ],
)
def test_what_contradicts_itself_is_refused(
    path: Path, tensors: Any, header: Any, report: str
) -> None:
    rewritten(path, tensors, header, report)
    with pytest.raises(
        ConfigurationError, match=r"(?s)(p.safetensors'` is damaged: |`patch` ).*HINT"
    ):
        Patch.load(path).apply(OLD)


def test_values_that_do_not_give_the_result_are_refused(path: Path) -> None:
    rewritten(path, {"new/a": torch.tensor([1.0, 6.0, 12.0])})
    with pytest.raises(ConfigurationError, match="yields other weights than its hash"):
        Patch.load(path).apply(OLD)


def test_a_large_shape_takes_no_memory(path: Path) -> None:
    rewritten(
        path, {"old/b": None, "new/b": None}, {"tensors": {"a": record(shape=[10**9, 10**9])}}
    )
    with pytest.raises(ConfigurationError, match=r"in the patch"):
        Patch.load(path).apply({**OLD})


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="has the format 'none'"):
        Patch.load(tmp_path / "model.safetensors")
    save_file(
        {"w": torch.zeros(2)}, tmp_path / "later.safetensors", {"format": "lightning_nrl.patch.9"}
    )
    with pytest.raises(ConfigurationError, match="the version of the package that wrote it"):
        Patch.load(tmp_path / "later.safetensors")
    torch.save(OLD, tmp_path / "model.ckpt")
    for name in ("model.ckpt", "nowhere", "."):
        with pytest.raises(ConfigurationError, match=r"(?s)cannot be read.*HINT"):
            Patch.load(tmp_path / name)
