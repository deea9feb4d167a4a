"""Progress bar of a repair, below the trainer's own bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress, TaskID

from lightning_nrl._trainer.lightning.packages import (
    RichProgressBar,
    TQDMProgressBar,
    Trainer,
    rank_zero_info,
)
from lightning_nrl._utils.formatting import rough_time
from lightning_nrl._utils.timing import Clock, Observer

STAGES = {
    "collect": "counting what is right and wrong",
    "unseen": "counting unseen data",
    "reference": "running the replaced model",
    "labels": "looking for wrong labels",
    "localize": "choosing weights to change",
    "search": "searching new values for them",
    "record": "recording the last layer",
    "solve": "solving the layer",
    "fit": "training with the failures",
    "polish": "polishing the weights",
    "sparse": "changing fewer weights",
    "strength": "choosing the strength",
    "judge": "counting the result",
    "sweep": "running the settings",
    "layers": "measuring what each layer can repair",
    "alone": "fixing each target alone",
    "held out": "trying fixes on held-out data",
    "neighbours": "comparing with the nearest samples",
    "tune": "fine-tuning",
    "checkpoints": "running the checkpoints",
    "move": "moving towards checkpoints",
    "merge": "merging repairs",
}
"""Descriptions of stages in the progress bar. A stage that is not listed is shown by its name."""
MOST_SHARE = 0.99  # largest share of the bar that is filled before the end
MIN_ANNOUNCED_SECONDS = 3.0  # shorter repairs are not announced
SLOWEST = 2.0  # repairs took up to 1.6 times as long as expected from a pass over the data


@dataclass
class _ActiveStage:
    name: str
    began: float
    done: int = 0
    total: int = 0
    note: str = ""


class RepairProgress(Observer):
    """Progress bar of a repair, with the current stage, and the time left if known."""

    clock: Clock = staticmethod(time.perf_counter)

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._line = _progress_line(trainer)
        self._open: list[_ActiveStage] = []
        self._expected: dict[str, float] = {}
        self._began = self.clock()
        self._end = math.inf
        self._share = 0.0

    def close(self) -> None:
        if self._line is not None:
            self._line.close()

    def expect(self, seconds: Mapping[str, float], most: float) -> None:
        """Stores the expected seconds of the coming stages; announces a range, at most `most`."""
        self._expected = dict(seconds)
        self._end = self.clock() + most
        total = min(sum(seconds.values()), most)
        if total >= MIN_ANNOUNCED_SECONDS:
            longest = rough_time(min(SLOWEST * total, most)).removeprefix("about ")
            hint = "" if math.isfinite(most) else "; `max_time` sets a limit"
            self.announce(f"Repair: {rough_time(total)} to {longest} from now on{hint}.")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows a stage while the block runs, in place of the stage around the block."""
        if name in self._expected and name != "judge":
            # Stages before it are over or were skipped.
            while next(iter(self._expected)) != name:
                del self._expected[next(iter(self._expected))]
        self._open.append(_ActiveStage(name, self.clock()))
        self._draw()
        try:
            yield
        finally:
            stage = self._open.pop()
            if name != "judge":  # this stage also occurs inside of methods
                spent, expected = self.clock() - stage.began, self._expected.pop(name, 0.0)
                # Later stages will be as slow as one that took longer than expected.
                if expected and spent > expected:
                    for later, seconds in self._expected.items():
                        self._expected[later] = seconds * spent / expected
            self._draw()

    def search(
        self, done: int, total: int, repaired: int | None = None, broken: int | None = None
    ) -> None:
        """Shows the progress of the current stage, and the flips by its best weights so far."""
        if not self._open:
            return
        counts = []
        if repaired is not None:
            counts.append(f"{repaired} repaired")
        if broken is not None:
            counts.append(f"{broken} broken")
        stage = self._open[-1]
        stage.done = done
        stage.total = total
        stage.note = f" ({', '.join(counts)})" if counts else ""
        self._draw()

    def announce(self, text: str) -> None:
        """Prints a sentence, above the progress bar if one is shown."""
        bar = self._trainer.progress_bar_callback
        if bar is not None and self._line is not None:
            bar.print(text)
        else:
            rank_zero_info(text)

    def _draw(self) -> None:
        if self._line is None or not self._open:
            return
        stage = self._open[-1]
        text = f"Repair: {STAGES.get(stage.name, stage.name)}{stage.note}"
        if not self._expected:
            self._line.show(text, stage.done / stage.total if stage.total else None)
            return
        left = self._seconds_left()
        if left is not None:
            elapsed = self.clock() - self._began
            self._share = max(self._share, min(elapsed / max(elapsed + left, 1e-9), MOST_SHARE))
            text += f", {rough_time(left)} left"
        self._line.show(text, self._share)

    def _seconds_left(self) -> float | None:
        active = [stage.name for stage in self._open]
        left = sum(seconds for name, seconds in self._expected.items() if name not in active)
        for stage in self._open:
            spent = self.clock() - stage.began
            if stage.done:
                left += spent * (stage.total - stage.done) / stage.done
            elif stage.name in self._expected:
                left += max(0.0, self._expected[stage.name] - spent)
            elif stage is self._open[-1]:
                return None
        return min(left, max(0.0, self._end - self.clock()))


def _progress_line(trainer: Trainer) -> _RichLine | _TqdmLine | None:
    bar = trainer.progress_bar_callback
    has_bar = isinstance(bar, (RichProgressBar, TQDMProgressBar)) and not bar.is_disabled
    if not trainer.is_global_zero or not has_bar:
        return None
    # Lightning starts its rich display only with its first loop.
    progress = bar.progress if isinstance(bar, RichProgressBar) else None
    if progress is not None and progress.live.is_started:
        return _RichLine(progress)
    return _TqdmLine()


class _TqdmLine:
    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, text: str, share: float | None) -> None:
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=100,
                desc=text,
                bar_format="{desc} ...",
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,  # like Lightning's bar, to be drawn in order
            )
        self._bar.bar_format = "{desc} ..."
        if share is not None:
            self._bar.bar_format = "{desc} {percentage:3.0f}%|{bar}|"
        self._bar.n = round(100 * (share or 0))
        self._bar.set_description_str(text)

    def close(self) -> None:
        if self._bar is None:
            return
        is_below_others = self._bar.pos != 0
        self._bar.close()
        if is_below_others:
            print()  # the cursor is still on the line of Lightning's bar


class _RichLine:
    def __init__(self, lightning: Progress) -> None:
        self._lightning = lightning
        self._task: TaskID | None = None

    def show(self, text: str, share: float | None) -> None:
        total = math.inf if share is None else 100
        if self._task is None:
            self._task = self._lightning.add_task(text, total=total)
        done = round(100 * (share or 0))
        self._lightning.update(self._task, completed=done, total=total, description=text)
        self._lightning.refresh()

    def close(self) -> None:
        if self._task is not None:
            self._lightning.remove_task(self._task)
            self._lightning.refresh()
