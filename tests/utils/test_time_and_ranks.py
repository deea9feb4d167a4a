"""Time, signals, memory and ranks."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor
from two_processes import in_two_processes

from lightning_nrl._utils import interrupts
from lightning_nrl._utils.device import twice_if_out_of_memory
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import defer_signals, interruptible, poll
from lightning_nrl._utils.timing import Deadline, StageTimer
from lightning_nrl.errors import (
    DeviceMemoryError,
    EvaluationError,
    OtherRankError,
    ReplayError,
)


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now() -> Time:
    return Time()


@pytest.mark.parametrize(
    ("stages", "seconds"),
    [
        ([("collect", 2), ("fit", 3), ("fit", 4)], {"collect": 2, "fit": 7}),
        ([("fit", 1, ("polish", 5, ("judge", 7)))], {"fit": 1, "polish": 5, "judge": 7}),
        ([("judge", 1, ("judge", 2))], {"judge": 3}),
    ],
)
def test_stages_take_their_own_time_in_the_order_in_which_they_began(stages, seconds, now):
    clock = StageTimer(now=now)

    def spend(name: str, duration: float, *inner_stages: Any) -> None:
        with clock.stage(name):
            for stage in inner_stages:
                spend(*stage)
            now.now += duration

    for stage in stages:
        spend(*stage)
    now.now += 1
    assert list(clock.seconds.items()) == list(seconds.items())
    assert clock.elapsed == sum(seconds.values()) + 1


def test_without_a_limit_nothing_ends_and_nothing_is_exchanged(now):
    class Deaf(Collective):
        def any(self, flag: bool) -> bool:
            raise AssertionError("nothing is to be exchanged")

    deadline = Deadline(collective=Deaf(world_size=2), clock=now)
    assert deadline.seconds_left == deadline.agreed_seconds_left() == math.inf
    assert deadline.leaves(1e9)
    assert not deadline.is_over()
    assert not deadline.earlier(5.0).is_set


def test_time_is_over_on_all_ranks_when_it_is_on_one():
    def run(collective: Collective) -> tuple[float, bool, bool, bool]:
        soon = Deadline(10.0, collective, clock=lambda: 3.0 + 6 * collective.rank)
        late = Deadline(10.0, collective, clock=lambda: 3.0 + 8 * collective.rank)
        return soon.agreed_seconds_left(), soon.leaves(2.0), soon.is_over(), late.is_over()

    assert on_ranks(2, run) == [(7.0, False, False, True)] * 2


class Terminated(BaseException):
    pass


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    poll()


@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_is_raised_where_work_asks(signum, raised):
    reached, said = [], list[str]()

    @interruptible(terminated=Terminated, say=said.append)
    def work() -> None:
        signal.raise_signal(signum)
        reached.append("after the signal")
        poll()
        reached.append("after the question")

    with pytest.raises(raised):
        work()
    assert reached == ["after the signal"]
    assert [text.rpartition(": ")[2] for text in said] == ["the repair stops."]


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, Terminated), (0, SystemExit)])
def test_a_trainer_inside_that_heeds_the_signal_first_does_not_end_with_success(signum, raised):
    @interruptible(terminated=Terminated, say=str)
    def work() -> None:
        if signum:
            signal.raise_signal(signum)
        raise SystemExit

    with pytest.raises(raised):
        work()


def test_work_that_does_not_ask_for_long_is_interrupted_where_it_is(monkeypatch):
    monkeypatch.setattr(interrupts, "OVERDUE_SECONDS", 0.05)
    began = time.monotonic()

    @interruptible(terminated=Terminated, say=str)
    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(30)

    with pytest.raises(Terminated):
        work()
    assert time.monotonic() - began < 10


def test_what_must_not_be_torn_apart_is_finished_first():
    done = []

    @interruptible(terminated=Terminated, say=str)
    def work() -> None:
        with defer_signals():
            signal.raise_signal(signal.SIGTERM)
            poll()
            done.append("inside")
        done.append("outside")

    with pytest.raises(Terminated):
        work()
    assert done == ["inside"]


def failing(times: int, error: Exception) -> Callable[[], int]:
    attempts = itertools.count(1)

    def work() -> int:
        if next(attempts) <= times:
            raise error
        return 7

    return work


def test_work_is_tried_once_more_and_then_memory_is_the_reason():
    out = torch.OutOfMemoryError("CUDA out of memory.\nA long story.")
    assert twice_if_out_of_memory(failing(1, out), "it ran") == 7
    with pytest.raises(
        DeviceMemoryError, match=r"^memory ran out while it ran: CUDA out of memory\.\nHINT"
    ):
        twice_if_out_of_memory(failing(2, out), "it ran")
    with pytest.raises(DeviceMemoryError):
        twice_if_out_of_memory(failing(1, out), "it ran", alone=False)
    with pytest.raises(RuntimeError, match="another"):
        twice_if_out_of_memory(failing(1, RuntimeError("another one")), "it ran")


CPU = torch.device("cpu")


def work(folder: str) -> None:
    """Each of two ranks compares what it gets; the second one dies, and the first writes what it
    then hears.
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    ranks = Collective.current(CPU)
    assert (ranks.rank, ranks.world_size) == (rank, 2)
    assert Collective.current(torch.device("cuda")).device == CPU
    values = torch.tensor([1.0, 2.0])
    sums = [
        (values, values * 2),
        (torch.tensor([True, rank == 1]), torch.tensor([2, 1])),
        (values.bfloat16(), values.bfloat16() * 2),
    ]
    for summand, expected in sums:
        assert same([ranks.sum(summand)], [expected])
    tables = [
        [torch.zeros(0), torch.tensor([0.1]).double()],
        [torch.tensor([True, False]), torch.tensor([True])],
        [torch.arange(6.0).view(2, 3).T, torch.arange(3).bfloat16()],
    ]
    for table in tables:
        assert same(ranks.gather(table[rank]), table)
    assert ranks.any(rank == 1)
    assert not ranks.any(False)
    assert ranks.of_first(b"one" if rank == 0 else b"other") == b"one"
    if rank == 1:
        os._exit(3)  # as a rank that is killed
    began = time.monotonic()
    try:
        ranks.sum(values)
    except OtherRankError as error:
        torch.save([str(error), time.monotonic() - began], f"{folder}/alone.pt")
    os._exit(0)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


def test_two_processes_exchange_tensors_and_a_death_ends_with_a_message(tmp_path):
    with pytest.raises(RuntimeError, match=re.escape("[0, 3]")):
        in_two_processes(work, str(tmp_path))
    message, seconds = torch.load(tmp_path / "alone.pt")
    assert message.startswith("another rank has ended or does not answer: ")
    assert "HINT: look at the error of that rank" in message
    assert seconds < 30


ELSEWHERE = "OtherRankError: it failed elsewhere. OSError: b\nHINT: look at the error of that rank."


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({}, ["done", "done", "done"]),
        ({1: ReplayError("a", "b")}, ["ReplayError: a\nHINT: b"] * 3),
        ({1: ReplayError("b"), 2: EvaluationError("c")}, ["ReplayError: b"] * 3),
        (
            {1: OSError("b"), 2: ReplayError("c")},
            [ELSEWHERE, "OSError: b", ELSEWHERE],
        ),
    ],
)
def test_where_one_rank_fails_all_fail_in_one_way(errors, expected):
    def outcome(collective: Collective) -> str:
        def task() -> str:
            if collective.rank in errors:
                raise errors[collective.rank]
            return "done"

        try:
            return collective.all_or_none(task, "it failed elsewhere.")
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    assert on_ranks(3, outcome) == expected
