from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from lightning_nrl._trainer.repair_files import ResultBox


def test_a_text_of_another_process_is_taken_once_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    box, own = ResultBox(), os.getpid()
    box.put(lambda: pytest.fail("nobody waits for it"))
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        box.put(lambda: "of another")
        assert box.take() == ""
        monkeypatch.setattr(os, "getpid", lambda: own)
    assert (box.take(), box.take()) == ("of another", "")
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("lightning_nrl-a.json", ".lightning_nrl-b.json.xyz", "lightning_nrl-young.json", "other.json"):
        (tmp_path / name).touch()
        if "young" not in name:
            os.utime(tmp_path / name, (time.time() - 2 * 24 * 3600,) * 2)
    box, own = ResultBox(), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: own + 1)
    box.put(lambda: "of another")
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {box._path.name, "lightning_nrl-young.json", "other.json"}
    assert box.take() == "of another"
