"""Handling of Ctrl-C and SIGTERM during work on a live model.

A signal is only noted, and the next call of `poll` raises an exception, so that no write of weights
is cut short. If `poll` is not called within `OVERDUE_SECONDS`, the exception is raised anywhere
except inside of `defer_signals`.
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
from typing import ClassVar

OVERDUE_SECONDS = 5.0  # a user then takes the process for hung


class Interrupted(BaseException):
    """Raised by `poll` to end the work.

    `interruptible` replaces it by the exception for Ctrl-C or for SIGTERM.
    """


@dataclass
class _SignalWatch:
    current: ClassVar[_SignalWatch | None] = None
    say: Callable[[str], None]
    noted: int = 0  # the first signal, or 0
    is_raised: bool = False
    depth: int = 0  # number of nested `defer_signals` blocks
    overdue: float = 0.0  # time from which the exception may be raised anywhere
    timer: threading.Timer | None = None
    process: int = field(default_factory=os.getpid)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            _handle_in_worker(signum)
            return
        if self.noted:
            # A second signal, from the user or the timer.
            if not self.is_raised and not self.depth and time.monotonic() >= self.overdue:
                self._raise()
            return
        self.noted = signum
        name = signal.Signals(signum).name.replace("SIGINT", "Ctrl-C")
        self.say(f"{name}: the repair stops.")
        self.overdue = time.monotonic() + OVERDUE_SECONDS
        self.timer = threading.Timer(OVERDUE_SECONDS, _signal_main_thread, (signum,))
        self.timer.daemon = True
        self.timer.start()

    def poll(self) -> None:
        if self.noted and not self.depth and not self.is_raised:
            self._raise()

    def _raise(self) -> None:
        self.is_raised = True
        raise Interrupted(signal.Signals(self.noted).name)


def poll() -> None:
    """Raises `Interrupted` after a signal. Call it often, where an exception does no harm."""
    if _SignalWatch.current is not None:
        _SignalWatch.current.poll()


@contextmanager
def defer_signals() -> Iterator[None]:
    watch = _SignalWatch.current
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
    *, terminated: Callable[[], BaseException], say: Callable[[str], None]
) -> Iterator[None]:
    """Raises KeyboardInterrupt after Ctrl-C, and `terminated()` after SIGTERM, in a block.

    The exception comes from the next call of `poll`; `say` prints a message at once. The earlier
    handlers are restored on exit. Ignored signals stay ignored. Outside of the main thread, which
    alone handles signals, nothing changes.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if _SignalWatch.current is not None or not is_main_thread:
        yield
        return
    watch = _SignalWatch(say)
    handlers = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            handlers[signum] = signal.signal(signum, watch.handle)
    _SignalWatch.current = watch
    try:
        yield
        watch.poll()
    except (Interrupted, SystemExit):
        # An inner trainer that sees the SIGTERM exits with status 0.
        if not watch.noted:
            raise
        if watch.noted == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise terminated() from None
    finally:
        if watch.timer is not None:
            watch.timer.cancel()
        _SignalWatch.current = None
        for signum, handler in handlers.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _signal_main_thread(signum: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(signum)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signum)


def _handle_in_worker(signum: int) -> None:
    # Data loader workers inherit the handlers. They ignore Ctrl-C, which their parent handles.
    if signum == signal.SIGTERM:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
