"""Where the time of a repair goes, how much is left, and when work has to be over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import is_ending_early, poll

Clock = Callable[[], float]
"""Tells the time in seconds, from any beginning."""


class Observer(Protocol):
    """Follows how a repair goes on."""

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """Entered around a stage, such as `collect`, `fit`, `polish`, `localize`, `search` or `judge`."""
        ...

    def search(self, done: int, total: int, repaired: int | None = None, broken: int | None = None) -> None:
        """After some steps of a stage: how many of how many, and the best candidate's counts where there are any."""
        ...

    def announce(self, text: str) -> None:
        """Before something that takes longer than a few seconds: what will be done, and about how long it takes."""
        ...


@dataclass(frozen=True)
class Deadline:
    """When work has to be over, in seconds of the clock `now`; infinite where there is no limit.

    Ranks ask in step and all get one answer, so that none goes on alone; without a limit nothing is exchanged.
    """

    end: float = math.inf
    collective: Collective = field(default_factory=Collective)
    now: Clock = time.perf_counter

    @property
    def is_set(self) -> bool:
        """Whether there is a limit."""
        return math.isfinite(self.end) or is_ending_early()

    @property
    def seconds_left(self) -> float:
        """Until then on this rank: infinite without a limit, below 0 afterwards."""
        poll()
        return min(0.0, self.end - self.now()) if is_ending_early() else self.end - self.now()

    def agreed_seconds_left(self) -> float:
        """The first rank's answer, to plan by."""
        if not self.is_set or self.collective.world_size == 1:
            return self.seconds_left
        return float(self.collective.agreed(torch.tensor(self.seconds_left, dtype=torch.float64)))

    def leaves(self, seconds: float) -> bool:
        """Whether so many seconds are left on every rank."""
        poll()
        return not (self.is_set and self.collective.any(self.seconds_left < seconds))

    def is_over(self) -> bool:
        """Whether no time is left on some rank."""
        poll()
        return self.is_set and self.collective.any(self.seconds_left <= 0)

    def earlier(self, seconds: float) -> Deadline:
        """So many seconds before this one, which are kept for what comes after."""
        return replace(self, end=self.end - seconds)

    def within(self, seconds: float) -> Deadline:
        """In so many seconds from now, but no later than this one."""
        return replace(self, end=min(self.end, self.now() + seconds))


@dataclass(frozen=True)
class TimeMark:
    """How far a repair is: seconds since it began, and of each stage that is over."""

    elapsed: float
    seconds: Mapping[str, float]


class StageTimer:
    """Seconds spent in each stage, in the order of the stages; passes on to an observer what it should know.

    The whole repair may take `max_time` seconds from now on. A stage that is entered again adds to its own.
    """

    def __init__(
        self, observer: Observer | None = None, max_time: float | None = None, now: Clock | None = None
    ) -> None:
        self.observer = observer
        self.seconds: dict[str, float] = {}
        self._clock, self._ahead = now or time.perf_counter, 0.0
        self._began = self.now()
        self._max_time = math.inf if max_time is None else max_time

    def now(self) -> float:
        """The time in seconds, from any beginning; deadlines are in it."""
        return self._clock() + self._ahead

    @property
    def elapsed(self) -> float:
        """Seconds since the repair began."""
        return self.now() - self._began

    def deadline(self, collective: Collective | None = None) -> Deadline:
        """When the repair must be over."""
        return Deadline(self._began + self._max_time, collective or Collective(), self.now)

    @property
    def left(self) -> float:
        """Seconds until the repair must be over; infinite without a limit."""
        poll()
        return min(0.0, self._max_time - self.elapsed) if is_ending_early() else self._max_time - self.elapsed

    def mark(self) -> TimeMark:
        """How far the repair is."""
        return TimeMark(self.elapsed, dict(self.seconds))

    def set(self, mark: TimeMark) -> None:
        """Goes on as if the repair were as far as this: what another process spent on it counts, what came since not.

        Deadlines that were made before stay where they are in the time of the repair.
        """
        self._ahead += mark.elapsed - self.elapsed
        self.seconds.clear()
        self.seconds.update(mark.seconds)

    @property
    def one_pass(self) -> float:
        """Seconds of a forward pass over all known data, by the first one; methods keep time for further ones by it."""
        return self.seconds.get("collect", 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around a stage. Stages do not overlap: one inside another takes its time from the outer one."""
        poll()
        self.seconds.setdefault(name, 0.0)
        start, inside = self.now(), sum(self.seconds.values())
        try:
            with self.observer.stage(name) if self.observer else nullcontext():
                yield
        finally:
            inner = sum(self.seconds.values()) - inside
            self.seconds[name] = max(0.0, self.seconds.get(name, 0.0) + self.now() - start - inner)

    def tell(self, done: int, total: int, repaired: int | None = None, broken: int | None = None) -> None:
        """Inside a stage: how many steps of how many were made, and the best candidate's counts, if there are any."""
        poll()
        if self.observer:
            self.observer.search(done, total, repaired, broken)

    def announce(self, text: str) -> None:
        """What will be done, and about how long it takes, in a sentence for the screen."""
        if self.observer:
            self.observer.announce(text)


def in_milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of stages for a report, rounded to three decimals."""
    return {name: round(spent, 3) for name, spent in seconds.items()}
