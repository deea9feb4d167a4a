"""Ctrl-C and SIGTERM while work is done on a live model: heeded within seconds, at moments when nothing is half-done.

A signal is noted when it comes. Work asks often (`poll`), and there the exception is raised that ends it, so that
whatever holds other weights for a while puts them back. Who does not ask for `OVERDUE_SECONDS` is interrupted where it
is. What must not be torn apart is done inside `uninterrupted`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, ClassVar

OVERDUE_SECONDS = 5.0


class Interrupted(BaseException):
    """Ends the work; `interruptible` turns it into what the signal is known by."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class _Watch:
    """Signals of the work in progress; there is one at a time, in the main thread."""

    current: ClassVar[_Watch | None] = None
    may_end_early: bool
    say: Callable[[str], None]
    noted: int = 0  # the signal that ends the work
    ends_early: bool = False
    is_raised: bool = False
    depth: int = 0  # of `uninterrupted`
    overdue: float = 0.0
    timer: threading.Timer | None = None
    process: int = field(default_factory=os.getpid)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            _handle_in_worker(signum)
            return
        if self.noted:
            # Again, or by the timer: whoever works has not asked for long.
            if not self.is_raised and not self.depth and time.monotonic() >= self.overdue:
                self._raise()
            return
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        if self.may_end_early and signum == signal.SIGINT and not self.ends_early:
            self.ends_early = True
            self.say(f"{name}: the repair ends with the best that it has found so far. Once more: it ends without.")
            return
        self.noted, self.ends_early = signum, False
        self.say(f"{name}: the repair stops.")
        self.overdue = time.monotonic() + OVERDUE_SECONDS
        self.timer = threading.Timer(OVERDUE_SECONDS, _signal_main_thread, (signum,))
        self.timer.daemon = True
        self.timer.start()

    def poll(self) -> None:
        if self.noted and not self.depth and not self.is_raised:
            self._raise()

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def _raise(self) -> None:
        self.is_raised = True
        raise Interrupted(self.noted)


def poll() -> None:
    """Raises `Interrupted` if a signal came; to be called often, where an exception does no harm."""
    if _Watch.current is not None:
        _Watch.current.poll()


def is_ending_early() -> bool:
    """Whether the work should come to its end with what it has, as if its time were over."""
    return _Watch.current is not None and _Watch.current.ends_early


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, no signal ends the work; one that comes ends it afterwards."""
    watch = _Watch.current
    if watch is None:
        yield
        return
    watch.depth += 1
    try:
        yield
    finally:
        watch.depth -= 1
    watch.poll()


@contextmanager
def interruptible(
    *, terminated: Callable[[], BaseException], may_end_early: bool = False, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Inside, Ctrl-C is raised as KeyboardInterrupt and SIGTERM as what `terminated` gives, where work asks.

    Handlers are as found afterwards. A signal that is ignored stays so, and in another thread than the main one, where
    Python handles no signals, nothing is done.

    Args:
        terminated: makes what SIGTERM is known by.
        may_end_early: whether the first Ctrl-C only has the work end early, see `is_ending_early`.
        say: is told in a sentence what a signal does; None: standard error is.
    """
    if _Watch.current is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(may_end_early, say or _to_stderr)
    before: dict[signal.Signals, Any] = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        found = signal.getsignal(signum)
        if found is not signal.SIG_IGN:
            before[signum] = found
            signal.signal(signum, watch.handle)
    _Watch.current = watch
    try:
        yield
        watch.poll()
    except (Interrupted, SystemExit):
        # A trainer inside sees a SIGTERM too, and ends with the status of success.
        if not watch.noted:
            raise
        raise (KeyboardInterrupt() if watch.noted == signal.SIGINT else terminated()) from None
    finally:
        watch.close()
        _Watch.current = None
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _signal_main_thread(signum: int) -> None:
    """Wakes it from waiting, where the system lets a thread be named."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signum)
    else:
        signal.raise_signal(signum)


def _handle_in_worker(signum: int) -> None:
    """A process that loads data has these handlers by inheritance; it is ended by the one that works."""
    if signum == signal.SIGTERM:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
