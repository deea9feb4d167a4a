"""What one method did to one trained network, as a record and as a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Seconds:
    """How long something took.

    Attributes:
        wall: by the clock.
        processor: of this process; on a machine that others use too it is nearer to what a quiet core takes.
    """

    wall: float
    processor: float


@dataclass(frozen=True)
class Run:
    """What one method did to a trained network. All counts are recounted, none is from the report.

    Attributes:
        name: of the problem.
        seed: of data, training and method.
        method: what was done.
        status: of the repair's report; empty if it was none.
        targeted: failures of the repair data in the target.
        repaired: those of them that are right now.
        known_broken: samples of training and repair data that were right and are wrong now.
        unseen_repaired: test samples that were wrong and are right now.
        unseen_broken: test samples that were right and are wrong now.
        unseen: all test samples.
        train_accuracy: on the training data, before.
        accuracy_before: on the test data.
        accuracy_after: on the test data.
        seconds: of the method.
        fit: of the fit before it.
        same_start: whether it began at the weights of the training without a callback.
        held_out: what the rung that was taken did to held-out samples: how many it repaired, of how many failures,
            and how many it broke, of how many that passed.
    """

    name: str
    seed: int
    method: str
    status: str
    targeted: int
    repaired: int
    known_broken: int
    unseen_repaired: int
    unseen_broken: int
    unseen: int
    train_accuracy: float
    accuracy_before: float
    accuracy_after: float
    seconds: Seconds
    fit: Seconds
    same_start: bool = True
    held_out: tuple[int, int, int, int] | None = None

    @property
    def points(self) -> float:
        """By how much the accuracy on test data grew, in percentage points."""
        return 100 * (self.accuracy_after - self.accuracy_before)


def read_or_run(path: Path, run: Callable[[], Run]) -> Run:
    """A run from its file; it is run first if there is none."""
    if not path.exists():
        found = run()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found), indent=1))
    saved = json.loads(path.read_text())
    for name in ("seconds", "fit"):
        saved[name] = Seconds(**saved[name])
    saved["held_out"] = saved["held_out"] and tuple(saved["held_out"])
    return Run(**saved)


def now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def since(began: Seconds) -> Seconds:
    ended = now()
    return Seconds(ended.wall - began.wall, ended.processor - began.processor)
