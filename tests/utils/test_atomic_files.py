"""Files that are truncated, bit-flipped, swapped or foreign, and results of finished steps that are
saved.

NRL_FUZZ says how many damages are tried of each reader.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import nn
from toy_problems import on_a_line, resume_store, threshold

from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.resume import ResumeStore, from_bytes, to_bytes
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.entrypoints.command_line import read_report
from lightning_nrl.errors import ConfigurationError, DataWarning, FilesWarning
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.pipeline import Patch
from lightning_nrl.published import TrainingRecord
from lightning_nrl.published.training_record import write_point
from lightning_nrl.release import RegressionSuite
from lightning_nrl.study.run_store import Run, RunStore, StoredRun
from lightning_nrl.updates.predictions import Predictions, read_slices

STATE = {
    "layer.weight": torch.arange(12.0).view(3, 4),
    "layer.bias": torch.ones(3),
    "n": torch.tensor(4),
}


NEW = {**STATE, "layer.bias": torch.arange(3.0)}


RUN = Run(
    "a",
    "eq1",
    4.0,
    False,
    None,
    30,
    20,
    0,
    "head",
    2,
    9,
    1.5,
    2,
    30,
    True,
    TargetCounts(51, 0, 3, 6, 4, 2),
)


PREDICTIONS = Predictions(
    {"val": {i: (i % 3, i % 2 == 0) for i in range(6)}, "test": {0: (1, None)}}, "abc"
)


@dataclass(frozen=True)
class Reader:
    """A kind of file: how it is written, its name, and what a reader makes of it, as something that
    can be compared.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    finds_changes: bool = (
        False  # whether whatever is not refused or warned of must be what was written
    )


def write_record(path: Path) -> None:
    problem = on_a_line()
    for step, at in enumerate((0.45, 0.65), 1):
        write_point(path.parent, step, 0, problem.evaluate(threshold(at)), threshold(at))


def read_record(path: Path) -> Any:
    record = TrainingRecord.read(path.parent)
    return [hash_tensors(point.weights) for point in record.points], record.splits[
        "all"
    ].forgotten.tolist()


def read_runs(path: Path) -> Any:
    runs = RunStore(path.parent).read(["first"])
    return [(stored.run, stored.where.tolist(), stored.values.tolist()) for stored in runs.values()]


def write_runs(path: Path) -> None:
    RunStore(path.parent).write(
        {"first": StoredRun(RUN, torch.tensor([1, 3]), torch.tensor([0.5, -0.25]))}
    )
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
        "p.safetensors",
        lambda path: Patch.between(STATE, NEW).save(path),
        lambda p: Patch.load(p).apply(STATE),
        True,
    ),
    "checkpoint": Reader(
        "a.ckpt", lambda path: torch.save({"state_dict": STATE}, path), read_checkpoint, True
    ),
    "sweep": Reader("runs-0.pt", write_runs, read_runs, True),
    "training, a point": Reader("point-00000002.pt", write_record, read_record, True),
    "training, samples": Reader("samples.pt", write_record, read_record, True),
    "predictions": Reader("p.csv", PREDICTIONS.save, Predictions.read),
    "suite": Reader(
        "suite.csv",
        lambda path: path.write_text("split,id\nval,3\ntest,12\n"),
        lambda path: RegressionSuite.read(path).samples,
    ),
    "slices": Reader(
        "s.csv", lambda path: path.write_text("split,id,slice\nval,3,a\nval,4,b\n"), read_slices
    ),
    "report": Reader(
        "report.json", lambda path: path.write_text('{"status": "repaired"}'), read_report
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole file of each kind, in a folder of its own."""
    paths = {}
    for kind, reader in READERS.items():
        paths[kind] = tmp_path_factory.mktemp("files") / reader.name
        reader.write(paths[kind])
    return paths


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes, bytes], bytes]:
    """What makes of the bytes of a file, and those of a file of another kind, something else."""
    kind = draw(st.integers(0, 6))
    a, b, byte = draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.integers(0, 255))

    def apply(data: bytes, foreign: bytes) -> bytes:
        i, j = sorted((int(a * len(data)), int(b * len(data))))
        set_byte = data[:i] + bytes([byte]) + data[i + 1 :]
        zeros = data[:i] + bytes(j - i) + data[j:]
        spliced = data[:i] + foreign[int(a * len(foreign)) :]
        damaged = set_byte, zeros, spliced, data[:i], data[:i] + data[j:], data[:j] + data[i:]
        return (*damaged, foreign)[kind]

    return apply


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.mark.parametrize("kind", READERS)
@settings(
    max_examples=int(os.environ.get("NRL_FUZZ", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(apply=damage(), foreign=st.sampled_from(sorted(READERS)))
def test_a_damaged_file_is_refused_warned_of_or_read_as_it_was(folders, kind, apply, foreign):
    reader, path = READERS[kind], folders[kind]
    content = path.read_bytes()
    expected = None if kind == "report" else reader.read(path)
    path.write_bytes(apply(content, folders[foreign].read_bytes()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            value = reader.read(path)
    except (ConfigurationError, DataWarning):
        return
    finally:
        path.write_bytes(content)
    if reader.finds_changes:
        assert value == [] or same(expected, value)


@pytest.mark.parametrize("flag", [153, 156])
def test_a_checkpoint_with_another_name_in_a_header_is_not_read_in_silence(folders, flag):
    """Found by fuzzing: torch reads other values then."""
    path, data = (
        folders["checkpoint"].with_name("flag.ckpt"),
        bytearray(folders["checkpoint"].read_bytes()),
    )
    data[data.index(b"a/data/0") - 4] = flag  # the length of the name
    path.write_bytes(data)
    with pytest.warns(DataWarning, match=r"is damaged: the checksum of .* is wrong"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    [
        "3",
        '{"splits": [{"broken_ids": 3}]}',
        "\ufeff{}",
        "",
        "[" * 100_000,
        '{"settings":' * 900 + "1" + "}" * 900,
    ],
    ids=["number", "ids", "mark", "empty", "brackets", "deep"],
)
def test_json_that_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError):
        read_report(tmp_path / "report.json")


class Death(BaseException):
    pass


def test_damage_pickles_and_unexpected_objects_are_recognised(tmp_path):
    data = bytes(to_bytes(torch.arange(5)))
    for i in range(0, len(data), 7):
        for damaged in (data[:i], data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :]):
            with pytest.raises(ValueError, match=r"\w"):
                from_bytes(damaged)
    with pytest.raises(ValueError, match="unexpected object"):
        from_bytes(to_bytes(tmp_path))

    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "bad").touch, ()

    content = pickle.dumps(Evil(), protocol=2)
    start = data[: data.index(b"\n") + 1]
    with pytest.raises(ValueError, match=r"\w"):
        from_bytes(start + hashlib.sha256(content).digest() + content)
    assert not (tmp_path / "bad").exists()


def begun(
    folder: Path,
    every: float = 0,
    ranks: Collective = Collective(),  # noqa: B008, has no state
    clock: StageTimer | None = None,
) -> ResumeStore:
    work = resume_store(folder, every)
    work.begin({"data": "a"}, clock or StageTimer(), ranks, torch.device("cpu"))
    return work


def counted(work: ResumeStore, steps: list[int], dies_at: int = -1) -> int:
    """Counts to 3 in three steps, in a step, and to 4."""

    def step(n: int) -> Callable[[], int]:
        def count() -> int:
            if n == dies_at:
                raise Death
            steps.append(n)
            return n

        return count

    return work.once(
        "all", lambda: max(work.once("a step", step(n)) for n in (1, 2, 3))
    ) + work.once("last", step(4))


@pytest.mark.parametrize("dies_at", [2, 4])
def test_finished_steps_are_not_run_again(tmp_path, dies_at):
    steps = []
    with pytest.raises(Death):
        counted(begun(tmp_path), steps, dies_at)
    work = begun(tmp_path)
    assert counted(work, steps) == 7
    assert steps == [1, 2, 3, 4]
    files = {path.name for path in tmp_path.rglob("*.*") if path.is_file()}
    assert files == {"origin.json", "1-all.finished", "2-last.finished"}
    work.done()
    assert not list(tmp_path.iterdir())


def test_all_ranks_read_a_result_or_none_does(tmp_path, monkeypatch):
    def work(ranks: Collective) -> list[int]:
        steps = []
        assert counted(begun(tmp_path, ranks=ranks), steps) == 7
        return steps

    assert on_ranks(3, work) == [[1, 2, 3, 4]] * 3
    assert on_ranks(3, work) == [[]] * 3
    calls = itertools.count()

    def reading(data: Any, *args: Any) -> Any:
        if next(calls) == 1:  # one of the ranks
            raise ValueError("MemoryError: no memory for it")
        return from_bytes(data, *args)

    monkeypatch.setattr("lightning_nrl._utils.resume.from_bytes", reading)
    with pytest.warns(
        FilesWarning, match=r"'1-all\.finished' is not used: MemoryError: no memory for it"
    ):
        assert on_ranks(3, work) == [[1, 2, 3]] * 3


def test_a_folder_that_cannot_be_made_costs_a_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(FilesWarning, match="finished steps cannot be saved in") as warned:
        assert counted(begun(tmp_path / "file"), []) == 7
    assert len(warned) == 1


def test_short_steps_and_results_that_cannot_be_saved_leave_no_file(tmp_path):
    assert counted(begun(tmp_path, every=60), []) == 7
    assert callable(begun(tmp_path).once("odd", lambda: lambda: 1))
    assert not list(tmp_path.iterdir())


def test_time_that_was_spent_on_finished_steps_counts(tmp_path):
    seconds = [100.0]

    def work(clock: StageTimer, saved: ResumeStore, dies: bool) -> None:
        def spend() -> None:
            with clock.stage("steps"):
                seconds[0] += 20

        saved.once("first", spend)
        if dies:
            raise Death
        saved.once("second", spend)

    clock = StageTimer(max_time=100, now=lambda: seconds[0])
    seconds[0] += 10
    with pytest.raises(Death):
        work(clock, begun(tmp_path, clock=clock), True)
    seconds[0] += 1_000
    again = StageTimer(max_time=100, now=lambda: seconds[0])
    seconds[0] += 3  # the same beginning, in less time
    work(again, begun(tmp_path, clock=again), False)
    assert again.elapsed == pytest.approx(10 + 20 + 20)
    assert again.left == pytest.approx(50)
    assert again.seconds == {"steps": 40}
