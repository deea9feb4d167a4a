"""Stages, deadlines and progress of a repair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import poll

Clock = Callable[[], float]  # returns seconds since some fixed moment


def seconds_now() -> float:
    """Returns `time.perf_counter()`, looked up at each call, so that tests can replace it."""
    return time.perf_counter()


class Observer:
    """Receiver of a repair's progress. The base class ignores it."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Returns a context manager in which a stage runs, such as `fit`, `search` or `judge`."""
        return nullcontext()

    def search(
        self, done: int, total: int, repaired: int | None = None, broken: int | None = None
    ) -> None:
        """Receives the counts of finished and of all steps, and the best weights' flips."""

    def expect(self, seconds: Mapping[str, float], most: float) -> None:
        """Receives the expected seconds of the coming stages, and `most` until the time limit."""

    def announce(self, text: str) -> None:
        """Shows a sentence to the user, before work that takes more than a few seconds."""


@dataclass(frozen=True)
class Deadline:
    """Moment `end` at which work must end, in seconds of `clock`; infinite if unlimited.

    All ranks must call `agreed_seconds_left`, `leaves` and `is_over` together; each returns the
    same on all ranks. Without a limit, the ranks exchange nothing.
    """

    end: float = math.inf
    collective: Collective = field(default_factory=Collective)
    clock: Clock = seconds_now

    @property
    def is_set(self) -> bool:
        return math.isfinite(self.end)

    @property
    def seconds_left(self) -> float:
        """Seconds left on this rank, negative after the end."""
        poll()
        return self.end - self.clock()

    def agreed_seconds_left(self) -> float:
        """Returns, on every rank, the seconds left on the first rank."""
        if not self.is_set:
            return self.seconds_left
        return self.collective.of_first(self.seconds_left)

    def leaves(self, seconds: float) -> bool:
        """True if at least `seconds` are left on every rank."""
        poll()
        return not (self.is_set and self.collective.any(self.seconds_left < seconds))

    def is_over(self) -> bool:
        """True if no time is left on at least one rank."""
        poll()
        return self.is_set and self.collective.any(self.seconds_left <= 0)

    def earlier(self, seconds: float) -> Deadline:
        return replace(self, end=self.end - seconds)

    def within(self, seconds: float) -> Deadline:
        """Returns a deadline in `seconds` from now, but no later than this deadline."""
        return replace(self, end=min(self.end, self.clock() + seconds))


class StageTimer:
    """Times the stages of a repair, counts forward passes, and passes progress on to an observer.

    `seconds` has the time by stage, and `visits` the number of samples in forward passes without
    gradients. `max_time` is the time limit in seconds from `began`, a moment of the clock `now`;
    None: from now. The time since `began` is the stage `load`.
    """

    def __init__(
        self,
        observer: Observer | None = None,
        max_time: float | None = None,
        now: Clock = seconds_now,
        began: float | None = None,
    ) -> None:
        self.observer = observer or Observer()
        self.seconds: dict[str, float] = {}
        self.visits: dict[str, int] = {}
        self._stage = "checks"
        self._clock = now
        self._ahead = 0.0
        self._began = self.now()
        if began is not None:
            self.seconds["load"] = self._began - began
            self._began = began
        self._max_time = math.inf if max_time is None else max_time

    def now(self) -> float:
        return self._clock() + self._ahead

    @property
    def elapsed(self) -> float:
        return self.now() - self._began

    def deadline(self, collective: Collective | None = None) -> Deadline:
        return Deadline(self._began + self._max_time, collective or Collective(), self.now)

    @property
    def left(self) -> float:
        """Seconds until the end of `max_time`, or infinity without a limit."""
        return self.deadline().seconds_left

    def visit(self, n: int) -> None:
        """Counts a forward pass of `n` samples in the present stage."""
        self.visits[self._stage] = self.visits.get(self._stage, 0) + n

    def resume(
        self, elapsed: float, seconds: Mapping[str, float], visits: Mapping[str, int]
    ) -> None:
        """Continues from the `elapsed`, `seconds` and `visits` of an earlier process.

        `max_time` limits both times together.
        """
        self._ahead += elapsed - self.elapsed
        self.seconds.clear()  # in place, since others hold the dict
        self.seconds.update(seconds)
        self.visits = dict(visits)

    @property
    def one_pass(self) -> float:
        """Seconds of the first forward pass over all known data, an estimate for further passes."""
        return self.seconds.get("collect", 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a stage, without the time of other stages inside."""
        poll()
        self.seconds.setdefault(name, 0.0)
        start = self.now()
        seconds_before = sum(self.seconds.values())
        outer, self._stage = self._stage, name
        try:
            with self.observer.stage(name):
                yield
        finally:
            self._stage = outer
            inner = sum(self.seconds.values()) - seconds_before
            self.seconds[name] = max(0.0, self.seconds.get(name, 0.0) + self.now() - start - inner)

    def tell(
        self, done: int, total: int, repaired: int | None = None, broken: int | None = None
    ) -> None:
        poll()
        self.observer.search(done, total, repaired, broken)

    def expect(self, seconds: Mapping[str, float]) -> None:
        self.observer.expect(seconds, self.left)


def rounded_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(spent, 3) for name, spent in seconds.items()}
