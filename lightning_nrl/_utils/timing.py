"""Where the time of a repair goes, and how much is left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

__all__ = ["Observer", "StageTimer"]


class Observer(Protocol):
    """Is told how a repair goes on."""

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """Entered around a stage, such as `collect`, `fit`, `polish`, `localize`, `search` or `judge`."""
        ...

    def search(self, done: int, total: int, repaired: int, broken: int) -> None:
        """After some steps of a stage: how many of how many, and the best candidate's counts."""
        ...


class StageTimer:
    """Seconds spent in each stage, in the order of the stages; passes on to an observer what it should know.

    Args:
        observer: is told how it goes.
        max_time: seconds that the whole repair may take from now on; None: as long as it takes.

    Attributes:
        seconds: wall time by stage; a stage that is entered again adds to its own.
    """

    def __init__(self, observer: Observer | None = None, max_time: float | None = None) -> None:
        self.observer = observer
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()
        self._max_time = math.inf if max_time is None else max_time

    @property
    def elapsed(self) -> float:
        """Seconds since the repair began."""
        return time.perf_counter() - self._began

    @property
    def left(self) -> float:
        """Seconds until the repair must be over; infinite without a limit."""
        return self._max_time - self.elapsed

    @property
    def one_pass(self) -> float:
        """Seconds of a forward pass over all known data, by the first one; methods keep time for further ones by it."""
        return self.seconds.get("collect", 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around a stage. Stages do not overlap: one inside another takes its time from the outer one."""
        self.seconds.setdefault(name, 0.0)
        start, inside = time.perf_counter(), sum(self.seconds.values())
        try:
            with self.observer.stage(name) if self.observer else nullcontext():
                yield
        finally:
            inner = sum(self.seconds.values()) - inside
            spent = self.seconds[name] + time.perf_counter() - start - inner
            self.seconds[name] = round(spent, 3)

    def tell(self, done: int, total: int, repaired: int, broken: int) -> None:
        """Inside a stage: how many steps of how many were made, and the best candidate's counts."""
        if self.observer:
            self.observer.search(done, total, repaired, broken)
