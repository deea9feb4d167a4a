from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.analysis.sweep.run_store import Run, RunStore, StoredRun, exchanged
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation.sample_results import TargetCounts


def stored(seed: int) -> StoredRun:
    known = TargetCounts(51, 0, 3, 6, 4, 2)
    run = Run("a", "eq1", 4.0, False, None, 30, 20, seed, "head", 2, 9, 1.5, 2, 30, True, known, seconds=0.5)
    return StoredRun(run, torch.tensor([1, 3]), torch.tensor([0.5, -0.25]))


RUNS = {"first": stored(0), "second": stored(1)}


def same(a: StoredRun, b: StoredRun) -> bool:
    return a.run == b.run and torch.equal(a.where, b.where) and torch.equal(a.values, b.values)


def test_runs_come_back_by_their_keys(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "sweep")
    assert store.read(["first"]) == {}
    store.write(RUNS)
    found = store.read(["second", "third"])
    assert list(found) == ["second"]
    assert same(found["second"], RUNS["second"])
    assert [path.suffix for path in (tmp_path / "sweep").iterdir()] == [".pt"]


def test_without_a_folder_nothing_is_kept() -> None:
    RunStore(None).write(RUNS)
    assert RunStore(None).read(RUNS) == {}


@pytest.mark.parametrize("part", range(20))
def test_a_file_with_a_flipped_bit_is_not_used_and_said(tmp_path: Path, part: int) -> None:
    store = RunStore(tmp_path)
    store.write(RUNS)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[part * len(data) // 20] ^= 1 << part % 8
    path.write_bytes(data)
    with pytest.warns(DataWarning, match=r"does not fit its checksum.*made again"):
        assert store.read(RUNS) == {}


@pytest.mark.parametrize("length", [0, 10, 65, 500])
def test_a_file_that_was_cut_short_is_not_used_and_the_others_are(tmp_path: Path, length: int) -> None:
    store = RunStore(tmp_path)
    store.write({"first": RUNS["first"]})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:length])
    store.write({"second": RUNS["second"]})
    with pytest.warns(DataWarning, match="its runs are made again"):
        assert list(store.read(RUNS)) == ["second"]


def test_a_file_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs-0.pt").mkdir()
    with pytest.warns(DataWarning, match=r"runs-0\.pt cannot be used"):
        assert RunStore(tmp_path).read(RUNS) == {}


def test_a_row_of_another_version_is_said(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    other = StoredRun({"setting": "a"}, torch.tensor([1]), torch.tensor([0.5]))  # type: ignore[arg-type]
    store.write({"first": other})
    with pytest.warns(DataWarning, match=r"fitness: this is missing.*made again"):
        assert store.read(RUNS) == {}


def test_a_foreign_file_is_not_used_and_said(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write(RUNS)
    (path,) = tmp_path.iterdir()
    data = b"no runs, and written by someone who knows how to make a checksum"
    path.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    with pytest.warns(DataWarning, match=r"holds no runs \(UnpicklingError: .*made again"):
        assert store.read(RUNS) == {}


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        RunStore(tmp_path / "file").read(RUNS)


def test_one_rank_exchanges_with_nobody() -> None:
    assert exchanged(RUNS, Collective()) == RUNS
