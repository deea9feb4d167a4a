"""How far a sweep is, and how long the rest takes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol

from lightning_nrl._utils.timing import Observer
from lightning_nrl.analysis.sweep.batch_search import RunRequest
from lightning_nrl.search import SearchHistory

__all__ = ["SweepObserver", "SweepProgress"]


class SweepObserver(Observer, Protocol):
    """Is told how a sweep goes on."""

    def show(self, done: int, total: int, note: str) -> None:
        """How many runs of how many are done, and what is to be said of the rest."""
        ...


class SweepProgress:
    """Tells an observer how many runs of `total` are done, and how long the rest takes if it goes on as it did.

    `work` is what this process has to do, as `RunRequest.work` has it; `done` are the runs that it has not to make.
    """

    def __init__(self, observer: SweepObserver | None, total: int, done: int, work: int) -> None:
        self.observer, self.total, self.done, self.work = observer, total, done, work
        self.worked = 0.0
        self.began = time.perf_counter()

    def within(self, part: Sequence[RunRequest], done: int, histories: list[SearchHistory]) -> None:
        """In the middle of some runs of one swarm: so many iterations were made."""
        share = done / max(1, part[0].setting.method.iterations)
        self._show(self.worked + sum(request.work for request in part) * share)

    def finish(self, part: Sequence[RunRequest]) -> None:
        """Some runs are done, early or not."""
        self.worked += sum(request.work for request in part)
        self.done += len(part)
        self._show(self.worked)

    def _show(self, worked: float) -> None:
        if self.observer is not None and worked:
            left = (time.perf_counter() - self.began) / worked * (self.work - worked)
            self.observer.show(self.done, self.total, f"{_duration(left)} left")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"about {math.ceil(seconds)} s"
    return f"about {math.ceil(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
