"""Results of finished steps that are saved: values to the bit, other work, time, ranks, damage and full disks."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.resume import DamagedValueError, ResumeStore, from_bytes, to_bytes
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import FilesWarning


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any = None


class Point(NamedTuple):
    x: Tensor
    pairs: tuple[Pair, ...] | None = None


class Death(BaseException):
    pass


plain = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.lists(inside, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inside, max_size=3)
        | st.builds(Pair, inside, inside)
    ),
    max_leaves=6,
)


@settings(max_examples=30)
@given(values)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    found = from_bytes(to_bytes(value), Pair)
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_to_the_bit_and_records_by_the_hints_of_their_fields(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.1, -0.0], [1.0, 3.0]]).to(dtype).T
    found = from_bytes(to_bytes(Point(x, (Pair("a"),))), Point)
    assert type(found) is Point
    assert found.pairs == (Pair("a"),)
    assert found.x.dtype == dtype
    assert torch.equal(found.x, x)


def test_damage_pickles_and_unexpected_objects_are_recognised(tmp_path: Path) -> None:
    data = to_bytes(torch.arange(5))
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 4
        with pytest.raises(DamagedValueError):
            from_bytes(bytes(damaged))
    for cut in (0, 10, 40, len(data) - 1):
        with pytest.raises(DamagedValueError):
            from_bytes(data[:cut])
    with pytest.raises(DamagedValueError, match="unexpected object"):
        from_bytes(to_bytes(tmp_path))

    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "bad").touch, ()

    content = pickle.dumps(Evil(), protocol=2)
    start = data[: data.index(b"\n") + 1]
    with pytest.raises(DamagedValueError):
        from_bytes(start + hashlib.sha256(content).digest() + content)
    assert not (tmp_path / "bad").exists()


def begun(folder: Path, origin: str = "a", elsewhere: list[Path] | None = None, **rest: Any) -> ResumeStore:
    work = ResumeStore(folder, elsewhere or [], every=rest.get("every", 0))
    ranks, clock = rest.get("ranks", Collective()), rest.get("clock", StageTimer())
    work.begin({"data": origin, "settings": "1"}, clock, ranks, torch.device("cpu"))
    return work


def counted(work: ResumeStore, made: list[int], dies_at: int = -1) -> int:
    """Counts to 3 in three steps, in a step, and to 4."""

    def step(n: int) -> Callable[[], int]:
        def count() -> int:
            if n == dies_at:
                raise Death
            made.append(n)
            return n

        return count

    return work.once("all", lambda: max(work.once("a step", step(n)) for n in (1, 2, 3))) + work.once("last", step(4))


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_finished_steps_are_not_run_again(tmp_path: Path, dies_at: int) -> None:
    made: list[int] = []
    with pytest.raises(Death):
        counted(begun(tmp_path), made, dies_at)
    work = begun(tmp_path)
    assert counted(work, made) == 7
    assert made == [1, 2, 3, 4]
    assert work.place is not None
    assert {path.name for path in work.place.iterdir()} == {"origin.json", "1-all.finished", "2-last.finished"}
    work.done()
    assert not list(tmp_path.iterdir())


def test_results_of_another_origin_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    class Said:
        text = ""

        def announce(self, text: str) -> None:
            self.text = text

    made: list[int] = []
    with pytest.raises(Death):
        counted(begun(tmp_path), made, 3)
    said: Any = Said()
    assert counted(begun(tmp_path, "b", clock=StageTimer(said)), made) == 7
    assert made == [1, 2, 1, 2, 3, 4]
    assert "with other data;" in said.text
    begun(tmp_path, "a", clock=StageTimer(said))
    assert "resumes with the steps finished before" in said.text


def test_results_of_an_earlier_run_are_taken_over_and_removed_in_the_end(tmp_path: Path) -> None:
    with pytest.raises(Death):
        counted(begun(tmp_path / "first"), [], 3)
    work, made = begun(tmp_path / "second", elsewhere=[tmp_path / "none", tmp_path / "first"]), list[int]()
    assert counted(work, made) == 7
    assert made == [3, 4]
    work.done()
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[], []]


@pytest.mark.parametrize("name", ["1-all.1-a-step.finished", "origin.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "other"])
def test_damaged_files_are_not_used(tmp_path: Path, name: str, how: str) -> None:
    with pytest.raises(Death):
        counted(begun(tmp_path), [], 3)
    (path,) = tmp_path.glob(f"*/{name}")
    data = path.read_bytes()
    flipped = bytes([*data[:-20], data[-20] ^ 1, *data[-19:]])
    path.write_bytes({"flipped": flipped, "cut": data[:-9], "empty": b"", "other": b"PK" * 400}[how])
    made: list[int] = []
    if name == "origin.json" or how == "empty":
        assert counted(begun(tmp_path), made) == 7
    else:
        with pytest.warns(FilesWarning, match="is not used, the checksum is wrong"):
            assert counted(begun(tmp_path), made) == 7
    assert made[0] == 1


@pytest.mark.parametrize("starved", [False, True])
def test_all_ranks_read_a_result_or_none_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starved: bool) -> None:
    def work(ranks: Collective) -> list[int]:
        made: list[int] = []
        assert counted(begun(tmp_path, ranks=ranks), made) == 7
        return made

    assert on_ranks(3, work) == [[1, 2, 3, 4]] * 3
    if not starved:
        assert on_ranks(3, work) == [[]] * 3
        return
    calls: list[int] = []

    def reading(data: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # one of the ranks
            raise DamagedValueError("MemoryError: no memory for it")
        return from_bytes(data, *args)

    monkeypatch.setattr("lightning_nrl._utils.resume.from_bytes", reading)
    with pytest.warns(FilesWarning, match=r"'1-all\.finished' is not used, MemoryError: no memory for it"):
        assert on_ranks(3, work) == [[1, 2, 3]] * 3


def test_a_disk_that_is_full_costs_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_nrl._utils.resume.replacing", full)
    with pytest.warns(FilesWarning, match="No space left on device") as warned:
        assert counted(begun(tmp_path), []) == 7
    assert len(warned) == 1


def test_short_steps_and_results_that_cannot_be_saved_leave_no_file(tmp_path: Path) -> None:
    assert counted(begun(tmp_path, every=60), []) == 7
    assert callable(begun(tmp_path).once("odd", lambda: lambda: 1))
    assert not list(tmp_path.iterdir())


def test_time_that_was_spent_on_finished_steps_counts(tmp_path: Path) -> None:
    now = [100.0]

    def work(clock: StageTimer, saved: ResumeStore, dies: bool) -> None:
        def spend() -> None:
            with clock.stage("steps"):
                now[0] += 20

        saved.once("first", spend)
        if dies:
            raise Death
        saved.once("second", spend)

    clock = StageTimer(max_time=100, now=lambda: now[0])
    now[0] += 10
    with pytest.raises(Death):
        work(clock, begun(tmp_path, clock=clock), True)
    now[0] += 1_000
    again = StageTimer(max_time=100, now=lambda: now[0])
    now[0] += 3  # the same beginning, in less time
    work(again, begun(tmp_path, clock=again), False)
    assert again.elapsed == pytest.approx(10 + 20 + 20)
    assert again.left == pytest.approx(50)
    assert again.seconds == {"steps": 40}
