"""Files that are truncated, bit-flipped, swapped or foreign: one kind of error, and no wrong result in silence.

NRL_FUZZ says how many damages are tried of each reader.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from toy_problems import on_a_line, threshold

from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.analysis.sweep.run_store import Run, RunStore, StoredRun
from lightning_nrl.entrypoints.commands import read_report
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.localization import TrainingRecord
from lightning_nrl.localization.training_record import write_point
from lightning_nrl.pipeline import Patch
from lightning_nrl.updates.predictions import Predictions, read_ids, read_slices

STATE = {"layer.weight": torch.arange(12.0).view(3, 4), "layer.bias": torch.ones(3), "n": torch.tensor(4)}
NEW = {**STATE, "layer.bias": torch.arange(3.0)}
RUN = Run("a", "eq1", 4.0, False, None, 30, 20, 0, "head", 2, 9, 1.5, 2, 30, True, TargetCounts(51, 0, 3, 6, 4, 2))
PREDICTIONS = Predictions({"val": {i: (i % 3, i % 2 == 0) for i in range(6)}, "test": {0: (1, None)}}, "abc")


@dataclass(frozen=True)
class Reader:
    """A kind of file: how it is written, its name, and what a reader makes of it, as something that can be compared."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    finds_changes: bool = False  # whether whatever is not refused or warned of must be what was written


def write_record(path: Path) -> None:
    problem = on_a_line()
    for step, at in enumerate((0.45, 0.65), 1):
        write_point(path.parent, step, 0, problem.evaluate(threshold(at)), threshold(at))


def read_record(path: Path) -> Any:
    record = TrainingRecord.read(path.parent)
    return [hash_tensors(point.weights) for point in record.points], record.splits["all"].forgotten.tolist()


def read_runs(path: Path) -> Any:
    found = RunStore(path.parent).read(["first"])
    return {key: (one.run, one.where.tolist(), one.values.tolist()) for key, one in found.items()}


def write_runs(path: Path) -> None:
    RunStore(path.parent).write({"first": StoredRun(RUN, torch.tensor([1, 3]), torch.tensor([0.5, -0.25]))})
    next(path.parent.glob("runs-*.pt")).replace(path)


class Net(nn.Module):
    """What the checkpoint is of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("n", torch.tensor(0))


def read_checkpoint(path: Path) -> Any:
    return fitting("reference", read_state("reference", path), Net())


READERS = {
    "patch": Reader(
        "p.safetensors", lambda path: Patch.between(STATE, NEW).save(path), lambda p: Patch.load(p).apply(STATE), True
    ),
    "checkpoint": Reader("a.ckpt", lambda path: torch.save({"state_dict": STATE}, path), read_checkpoint, True),
    "sweep": Reader("runs-0.pt", write_runs, read_runs, True),
    "training, a point": Reader("point-00000002.pt", write_record, read_record, True),
    "training, samples": Reader("samples.pt", write_record, read_record, True),
    "predictions": Reader("p.csv", PREDICTIONS.save, Predictions.read),
    "ids": Reader("ids.csv", lambda path: path.write_text("split,id\nval,3\ntest,12\n"), read_ids),
    "slices": Reader("s.csv", lambda path: path.write_text("split,id,slice\nval,3,a\nval,4,b\n"), read_slices),
    "report": Reader("report.json", lambda path: path.write_text('{"status": "repaired"}'), read_report),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole file of each kind, in a folder of its own."""
    found = {}
    for kind, reader in READERS.items():
        found[kind] = tmp_path_factory.mktemp("files") / reader.name
        reader.write(found[kind])
    return found


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes, bytes], bytes]:
    """What makes of the bytes of a file, and those of a file of another kind, something else."""
    how = draw(st.sampled_from(["flip", "cut", "drop", "repeat", "splice", "set", "nulls", "foreign"]))
    a, b, bit = draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.integers(0, 255))

    def apply(data: bytes, other: bytes) -> bytes:
        i, j = sorted((int(a * len(data)), int(b * len(data))))
        k = min(i, len(data) - 1)
        made = {
            "flip": data[:k] + bytes([data[k] ^ (bit or 1)]) + data[k + 1 :],
            "cut": data[:i],
            "drop": data[:i] + data[j:],
            "repeat": data[:j] + data[i:],
            "splice": data[:i] + other[int(a * len(other)) :],
            "set": data[:k] + bytes([bit]) + data[k + 1 :],
            "nulls": data[:i] + bytes(j - i) + data[j:],
            "foreign": other,
        }
        return made[how]

    return apply


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize("kind", READERS)
@settings(
    max_examples=int(os.environ.get("NRL_FUZZ", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(how=damage(), other=st.sampled_from(sorted(READERS)))
def test_a_damaged_file_is_refused_warned_of_or_read_as_it_was(
    folders: dict[str, Path], kind: str, how: Callable[[bytes, bytes], bytes], other: str
) -> None:
    reader, path = READERS[kind], folders[kind]
    whole = path.read_bytes()
    expected = None if kind == "report" else reader.read(path)
    path.write_bytes(how(whole, folders[other].read_bytes()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            found = reader.read(path)
    except (ConfigurationError, DataWarning):
        return
    finally:
        path.write_bytes(whole)
    if reader.finds_changes:
        assert same(expected, found) or found == {}


@pytest.mark.parametrize("flag", [153, 156])
def test_a_checkpoint_with_another_name_in_a_header_is_not_read_in_silence(folders: dict[str, Path], flag: int) -> None:
    """Found by fuzzing: torch reads other values then."""
    path, data = folders["checkpoint"].with_name("flag.ckpt"), bytearray(folders["checkpoint"].read_bytes())
    length = data.index(b"a/data/0") - 4  # of that name, in front of it
    assert data[length] == 8
    data[length] = flag
    path.write_bytes(data)
    with pytest.warns(DataWarning, match=r"is damaged, its checksum of .* does not fit"):
        read_checkpoint(path)


@pytest.mark.parametrize("depth", [50, 400, 900, 100_000])
def test_a_report_of_brackets_is_refused(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "report.json"
    for text in ("[" * depth, '{"settings":' * depth + "1" + "}" * depth):
        path.write_text(text)
        with pytest.raises(ConfigurationError):
            read_report(path)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "3", '"a"', "null", '{"findings": 1}', '{"splits": [{"broken_ids": 3}]}', "\ufeff{}", ""]
)
def test_json_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError):
        read_report(tmp_path / "report.json")
