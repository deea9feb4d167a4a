"""Pieces of work that are saved: values to the bit, what is finished, what is under way, the time, and damage."""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.saved_values import DamagedValueError, UnsavableValueError, from_bytes, to_bytes
from lightning_nrl._utils.saved_work import Piece, SavedWork
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import FilesWarning


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any = None


class Point(NamedTuple):
    x: Tensor
    name: str


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
    found = from_bytes(to_bytes(value), [Pair])
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_to_the_bit(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.1, -0.0], [1.0, 3.0]]).to(dtype).T
    found = from_bytes(to_bytes(Point(x, "a")), [Point])
    assert type(found) is Point
    assert found.x.dtype == dtype
    assert torch.equal(found.x, x)
    assert torch.equal(from_bytes(to_bytes(torch.tensor([torch.nan]))).isnan(), torch.tensor([True]))


def test_a_part_of_a_tensor_is_written_without_the_rest() -> None:
    assert len(to_bytes(torch.zeros(100_000)[:5])) < 5_000


def test_what_is_no_plain_value_is_not_saved_and_no_kind_is_made_that_was_not_named() -> None:
    for value in (object(), {"a": [len]}, {1, 2}):
        with pytest.raises(UnsavableValueError):
            to_bytes(value)
    with pytest.raises(DamagedValueError, match="a Pair is not expected"):
        from_bytes(to_bytes(Pair(1)))


def test_damage_and_pickles_are_recognised(tmp_path: Path) -> None:
    data = to_bytes(Pair(torch.arange(5), "a"))
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 4
        with pytest.raises(DamagedValueError):
            from_bytes(bytes(damaged), [Pair])
    for cut in (0, 10, 40, len(data) - 1):
        with pytest.raises(DamagedValueError):
            from_bytes(data[:cut], [Pair])

    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "bad").touch, ()

    content = pickle.dumps(Evil(), protocol=2)
    start = data[: data.index(b"\n") + 1]
    with pytest.raises(DamagedValueError):
        from_bytes(start + hashlib.sha256(content).digest() + content)
    assert not (tmp_path / "bad").exists()


def begun(folder: Path, origin: str = "a", elsewhere: list[Path] | None = None, **rest: Any) -> SavedWork:
    work = SavedWork(folder, elsewhere or [], every=0)
    work.begin({"data": origin, "settings": "1"}, rest.get("clock", StageTimer()), Collective(), torch.device("cpu"))
    return work


def counting(to: int, made: list[int], dies_at: int = -1) -> Callable[[Piece], int]:
    """Counts to a number, and writes down what it counts."""

    def work(piece: Piece) -> int:
        for n in range(piece.left() or 0, to):
            piece.seam(partial(int, n))
            if n == dies_at:
                raise Death
            made.append(n + 1)
        return to

    return work


def two(work: SavedWork, made: list[int], dies_at: int = -1) -> int:
    """Counts to 3 and to 5, inside of another piece."""

    def inner(piece: Piece) -> int:
        return work.piece("count", counting(3, made)) + work.piece("count", counting(5, made, dies_at))

    return work.piece("both", inner)


def test_what_is_finished_is_not_done_again_and_what_is_under_way_goes_on(tmp_path: Path) -> None:
    made: list[int] = []
    with pytest.raises(Death):
        two(begun(tmp_path), made, dies_at=2)
    assert made == [1, 2, 3, 1, 2]
    work = begun(tmp_path)
    assert two(work, made) == 8
    assert made == [1, 2, 3, 1, 2, 3, 4, 5]
    assert two(begun(tmp_path), made) == 8
    assert len(made) == 8
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"origin.json", "under-way", "1-both.finished"}
    work.done()
    assert not list(tmp_path.iterdir())


def test_of_other_origin_nothing_is_used_and_that_is_said(tmp_path: Path) -> None:
    class Said:
        def __init__(self) -> None:
            self.text = ""

        def announce(self, text: str) -> None:
            self.text = text

    made: list[int] = []
    with pytest.raises(Death):
        two(begun(tmp_path), made, dies_at=2)
    said: Any = Said()
    assert two(begun(tmp_path, "b", clock=StageTimer(said)), made) == 8
    assert made[5:] == [1, 2, 3, 1, 2, 3, 4, 5]
    assert "with other data;" in said.text
    begun(tmp_path, "a", clock=StageTimer(said))
    assert "goes on where it was stopped, after 0 s" in said.text


def test_work_of_an_earlier_run_is_taken_over_and_removed_in_the_end(tmp_path: Path) -> None:
    made: list[int] = []
    with pytest.raises(Death):
        two(begun(tmp_path / "first"), made, dies_at=2)
    work = begun(tmp_path / "second", elsewhere=[tmp_path / "none", tmp_path / "first"])
    assert two(work, made) == 8
    assert made[5:] == [3, 4, 5]
    work.done()
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[], []]


@pytest.mark.parametrize("name", ["under-way", "1-both.1-count.finished", "origin.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "other"])
def test_damaged_files_are_not_used(tmp_path: Path, name: str, how: str) -> None:
    with pytest.raises(Death):
        two(begun(tmp_path), [], dies_at=2)
    (path,) = tmp_path.glob(f"*/{name}")
    data = path.read_bytes()
    flipped = bytes([*data[:-20], data[-20] ^ 1, *data[-19:]])
    path.write_bytes({"flipped": flipped, "cut": data[:-9], "empty": b"", "other": b"PK" * 400}[how])
    made: list[int] = []
    if name == "origin.json" or how == "empty":
        assert two(begun(tmp_path), made) == 8
    else:
        with pytest.warns(FilesWarning, match="is not used, the checksum is wrong"):
            assert two(begun(tmp_path), made) == 8
    assert len(made) >= 3


Steps = tuple[list[str], list[float]]


def stepping(folder: Path, collective: Collective, dies_at: int | None = None) -> Steps:
    """Four steps on weights that all ranks have and on a number of each rank's own; says what it began with."""
    saved, said = SavedWork(folder, every=0), []
    saved.begin({"data": "a"}, StageTimer(), collective, torch.device("cpu"))

    def work(piece: Piece) -> list[float]:
        weights, own, start = torch.zeros(1000), torch.tensor([float(collective.rank)]), 0
        left = piece.left()
        if left is not None:
            weights, own, start = left["weights"], left["own"], left["step"]
            said.append(f"from {start}")
        for step in range(start, 4):
            piece.seam(partial(dict, weights=weights, own=own, step=step))
            if step == dies_at:
                raise Death
            weights, own = weights + 1, own * 2 + collective.rank
        return [float(weights[0]), float(own)]

    try:
        return said, saved.piece("steps", work)
    except Death:
        return said, []


def test_each_rank_goes_on_from_its_own_state_and_what_all_have_is_saved_once(tmp_path: Path) -> None:
    assert on_ranks(3, lambda one: stepping(tmp_path, one, 2)) == [([], [])] * 3
    (path,) = tmp_path.glob("*/under-way")
    assert 4_000 < path.stat().st_size < 12_000
    found = on_ranks(3, lambda one: stepping(tmp_path, one))
    assert found == [(["from 2"], [4.0, 31.0 * rank]) for rank in range(3)]


def test_where_one_rank_cannot_read_what_was_saved_all_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ranks(2, lambda one: stepping(tmp_path, one, 2))

    def starved(data: Any, *args: Any, like: Any = None) -> Any:
        if like is not None:  # the second rank
            raise DamagedValueError("MemoryError: no memory for it")
        return from_bytes(data, *args, like=like)

    monkeypatch.setattr("lightning_nrl._utils.saved_work.from_bytes", starved)
    with pytest.warns(FilesWarning, match="'under-way' is not used, MemoryError: no memory for it"):
        found = on_ranks(2, lambda one: stepping(tmp_path, one))
    assert found == [([], [4.0, 31.0 * rank]) for rank in range(2)]


def test_where_one_rank_cannot_save_none_waits(tmp_path: Path) -> None:
    def work(collective: Collective) -> int:
        saved = SavedWork(tmp_path, every=0)
        saved.begin({"data": "a"}, StageTimer(), collective, torch.device("cpu"))

        def state() -> int:
            if collective.rank:
                raise MemoryError
            return 1

        def inner(piece: Piece) -> int:
            piece.seam(state)
            return int(collective.sum(torch.tensor(1)))

        return saved.piece("work", inner)

    with pytest.warns(FilesWarning, match="another rank has nothing to save"):
        assert on_ranks(2, work) == [2, 2]


def test_a_disk_that_is_full_costs_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, made = begun(tmp_path), []

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_nrl._utils.saved_work.replacing", full)
    with pytest.warns(FilesWarning, match="No space left on device") as warned:
        assert two(work, made) == 8
    assert len(warned) == 1


def test_what_cannot_be_saved_is_done_again(tmp_path: Path) -> None:
    def odd(piece: Piece) -> Any:
        piece.seam(object)
        piece.seam(lambda: pytest.fail("asked again"))
        return len

    assert begun(tmp_path).piece("odd", odd) is len
    assert begun(tmp_path).piece("odd", odd) is len


def test_time_that_was_spent_before_counts(tmp_path: Path) -> None:
    now = [100.0]

    def work(clock: StageTimer, saved: SavedWork, dies: bool) -> float:
        def inner(piece: Piece) -> float:
            end = clock.deadline().within(50)
            piece.left()
            with clock.stage("steps"):
                now[0] += 20
            piece.seam(lambda: 1)
            if dies:
                raise Death
            return end.seconds_left

        return saved.piece("work", inner)

    clock = StageTimer(max_time=100, now=lambda: now[0])
    now[0] += 10
    with pytest.raises(Death):
        work(clock, begun(tmp_path, clock=clock), True)
    now[0] += 1_000
    again = StageTimer(max_time=100, now=lambda: now[0])
    now[0] += 3  # the same beginning, in less time
    saved = begun(tmp_path, clock=again)
    assert work(again, saved, False) == pytest.approx(10)
    assert again.elapsed == pytest.approx(10 + 20 + 20)
    assert again.left == pytest.approx(50)
    assert again.seconds == {"steps": 40}


def test_saving_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = SavedWork(tmp_path, every=0.01)
    work.begin({"data": "a"}, StageTimer(), Collective(), torch.device("cpu"))
    saved = []

    def state() -> int:
        saved.append(time.perf_counter())
        time.sleep(0.005)
        return 1

    def many(piece: Piece) -> None:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            piece.seam(state)

    work.piece("many", many)
    assert 1 <= len(saved) <= 3
