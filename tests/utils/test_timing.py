from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from lightning_nrl._utils.timing import StageTimer


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("lightning_nrl._utils.timing.time.perf_counter", time)
    return time


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


def test_a_stage_takes_its_time_and_takes_more_when_it_is_entered_again(now: Time) -> None:
    clock = StageTimer()
    with clock.stage("collect"):
        now.now += 2
    now.now += 1
    for seconds in (3, 4):
        with clock.stage("fit"):
            now.now += seconds
    assert clock.seconds == {"collect": 2.0, "fit": 7.0}
    assert clock.elapsed == 10.0


def test_a_stage_inside_another_takes_its_time_from_it(now: Time) -> None:
    clock = StageTimer()
    with clock.stage("fit"):
        now.now += 1
        with clock.stage("polish"):
            now.now += 5
            with clock.stage("judge"):
                now.now += 7
        now.now += 2
    assert clock.seconds == {"fit": 3.0, "polish": 5.0, "judge": 7.0}


def test_a_stage_inside_itself_counts_once(now: Time) -> None:
    clock = StageTimer()
    with clock.stage("judge"):
        now.now += 1
        with clock.stage("judge"):
            now.now += 2
    assert clock.seconds == {"judge": 3.0}


def test_stages_are_in_the_order_in_which_they_began(now: Time) -> None:
    clock = StageTimer()
    with clock.stage("fit"), clock.stage("polish"):
        now.now += 1
    assert list(clock.seconds) == ["fit", "polish"]


def test_a_stage_that_raises_took_its_time(now: Time) -> None:
    clock = StageTimer()
    with suppress(ZeroDivisionError), clock.stage("fit"):
        now.now += 2
        raise ZeroDivisionError
    assert clock.seconds == {"fit": 2.0}


def test_what_is_left_falls_below_zero_and_is_infinite_without_a_limit(now: Time) -> None:
    clock = StageTimer(max_time=5.0)
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
