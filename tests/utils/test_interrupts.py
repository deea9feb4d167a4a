from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_nrl._utils import interrupts
from lightning_nrl._utils.interrupts import interruptible, poll, uninterrupted


class Terminated(BaseException):
    pass


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
    poll()


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_is_raised_where_work_asks(signum: int, raised: type[BaseException]) -> None:
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


def test_work_that_never_asks_ends_when_it_is_over() -> None:
    with pytest.raises(Terminated), interruptible(terminated=Terminated, say=str):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, Terminated), (0, SystemExit)])
def test_a_trainer_inside_that_heeds_the_signal_first_does_not_end_with_success(signum: int, raised: Any) -> None:
    @interruptible(terminated=Terminated, say=str)
    def work() -> None:
        if signum:
            signal.raise_signal(signum)
        raise SystemExit

    with pytest.raises(raised):
        work()


def test_work_that_does_not_ask_for_long_is_interrupted_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "OVERDUE_SECONDS", 0.05)
    began = time.monotonic()

    @interruptible(terminated=Terminated, say=str)
    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(30)

    with pytest.raises(Terminated):
        work()
    assert time.monotonic() - began < 10


def test_what_must_not_be_torn_apart_is_finished_first() -> None:
    done = []

    @interruptible(terminated=Terminated, say=str)
    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            poll()
            done.append("inside")
        done.append("outside")

    with pytest.raises(Terminated):
        work()
    assert done == ["inside"]


def test_another_thread_has_no_signals() -> None:
    seen = []

    def work() -> None:
        with interruptible(terminated=Terminated, say=str):
            seen.append(interrupts._Watch.current)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible(terminated=Terminated, say=str):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
