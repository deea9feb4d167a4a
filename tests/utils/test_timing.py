from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
from ranks import on_ranks

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.timing import Deadline, StageTimer, in_milliseconds


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now() -> Time:
    return Time()


class Listener:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.heard.append(name)
        yield
        self.heard.append(f"{name} done")

    def search(self, *progress: int) -> None:
        self.heard.append(progress)


@pytest.mark.parametrize(
    ("stages", "seconds"),
    [
        ([("collect", 2), (None, 1), ("fit", 3), ("fit", 4)], {"collect": 2, "fit": 7}),
        ([("fit", 1, ("polish", 5, ("judge", 7)))], {"fit": 1, "polish": 5, "judge": 7}),
        ([("judge", 1, ("judge", 2))], {"judge": 3}),
        ([("fit", 0, ("polish", 1))], {"fit": 0, "polish": 1}),
    ],
)
def test_stages_take_their_own_time_in_the_order_in_which_they_began(
    stages: list[Any], seconds: dict[str, float], now: Time
) -> None:
    clock = StageTimer(now=now)

    def spend(name: str | None, own: float, *inside: Any) -> None:
        with clock.stage(name) if name else nullcontext():
            for one in inside:
                spend(*one)
            now.now += own

    for one in stages:
        spend(*one)
    assert list(clock.seconds.items()) == list(seconds.items())
    assert clock.elapsed == sum(seconds.values()) + (1 if len(stages) == 4 else 0)


def test_a_pass_of_less_than_a_millisecond_is_not_nothing(now: Time) -> None:
    clock = StageTimer(now=now)
    with clock.stage("collect"):
        now.now += 2**-12
    assert clock.one_pass == 2**-12
    assert in_milliseconds({**clock.seconds, "fit": 1.23456}) == {"collect": 0.0, "fit": 1.235}


def test_a_stage_that_raises_took_its_time(now: Time) -> None:
    clock = StageTimer(now=now)
    with suppress(ZeroDivisionError), clock.stage("fit"):
        now.now += 2
        raise ZeroDivisionError
    assert clock.seconds == {"fit": 2.0}


def test_what_is_left_falls_below_zero_and_is_infinite_without_a_limit(now: Time) -> None:
    clock = StageTimer(max_time=5.0, now=now)
    now.now += 3
    assert clock.left == 2.0
    now.now += 3
    assert clock.left == -1.0
    assert StageTimer().left == math.inf


def test_an_observer_hears_of_stages_and_progress() -> None:
    listener = Listener()
    clock = StageTimer(listener)
    with clock.stage("fit"):
        clock.tell(1, 2, 3, 4)
    assert listener.heard == ["fit", (1, 2, 3, 4), "fit done"]
    StageTimer().tell(1, 2, 3, 4)


def test_a_deadline_knows_what_is_left_and_what_it_leaves(now: Time) -> None:
    deadline = StageTimer(max_time=5.0, now=now).deadline()
    now.now += 3
    assert deadline.seconds_left == deadline.agreed_seconds_left() == 2.0
    assert deadline.leaves(2.0)
    assert not deadline.leaves(2.5)
    assert not deadline.is_over()
    now.now += 2
    assert deadline.is_over()
    now.now += 1
    assert deadline.seconds_left == -1.0


def test_a_deadline_may_come_earlier_but_never_later(now: Time) -> None:
    deadline = Deadline(110.0, now=now)
    assert deadline.earlier(4.0).seconds_left == 6.0
    assert deadline.within(3.0).seconds_left == 3.0
    assert deadline.within(30.0) == deadline


def test_without_a_limit_nothing_ends_and_nothing_is_exchanged(now: Time) -> None:
    class Deaf(Collective):
        def any(self, flag: bool) -> bool:
            raise AssertionError("nothing is to be exchanged")

    deadline = Deadline(collective=Deaf(world_size=2), now=now)
    assert deadline.seconds_left == deadline.agreed_seconds_left() == math.inf
    assert deadline.leaves(1e9)
    assert not deadline.is_over()
    assert not deadline.earlier(5.0).is_set


def test_time_is_over_on_all_ranks_when_it_is_on_one() -> None:
    def run(collective: Collective) -> tuple[float, bool, bool, bool]:
        own = Deadline(10.0, collective, now=lambda: 9.0 if collective.rank else 3.0)
        late = Deadline(10.0, collective, now=lambda: 11.0 if collective.rank else 3.0)
        return own.agreed_seconds_left(), own.leaves(2.0), own.is_over(), late.is_over()

    assert on_ranks(2, run) == [(7.0, False, False, True)] * 2
