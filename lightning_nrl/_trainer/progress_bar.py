"""A progress line for the repair beside Lightning's own bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich import get_console
from rich.progress import Progress

from lightning_nrl._trainer.lightning.packages import RichProgressBar, TQDMProgressBar, Trainer, rank_zero_info


class RepairProgress:
    """Shows the stage of a repair and its counts beside the trainer's progress bar: rich with rich, tqdm with tqdm."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._line: _RichLine | _TqdmLine | None = None
        self._open: list[str] = []

    def __enter__(self) -> RepairProgress:
        self._line = _line_beside(self._trainer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows a line while a stage lasts; a stage inside another takes its place."""
        line = self._line
        if line is None:
            yield
            return
        if self._open:
            line.end()
        self._open.append(f"Repair: {name}")
        line.begin(self._open[-1])
        try:
            yield
        finally:
            line.end()
            self._open.pop()
            if self._open:
                line.begin(self._open[-1])

    def search(self, done: int, total: int, repaired: int | None = None, broken: int | None = None) -> None:
        """Shows how far the search is, and its best candidate's counts."""
        counts = ((repaired, "repaired"), (broken, "broken"))
        self.show(done, total, ", ".join(f"{n} {what}" for n, what in counts if n is not None))

    def announce(self, text: str) -> None:
        """Prints a sentence, above the bar if there is one."""
        bar = self._trainer.progress_bar_callback
        if bar is not None and self._line is not None:
            bar.print(text)
        else:
            rank_zero_info(text)

    def show(self, done: int, total: int, note: str) -> None:
        if self._line is not None and self._open:
            self._line.show(done, total, note)


def _line_beside(trainer: Trainer) -> _RichLine | _TqdmLine | None:
    bar = trainer.progress_bar_callback
    if not trainer.is_global_zero or not isinstance(bar, (RichProgressBar, TQDMProgressBar)) or bar.is_disabled:
        return None
    return _RichLine(bar.progress) if isinstance(bar, RichProgressBar) else _TqdmLine()


class _TqdmLine:
    """A plain tqdm, which finds a free row below bars that are still open."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._below_others = False

    def begin(self, text: str) -> None:
        from tqdm.auto import tqdm

        # On stdout as Lightning's, so that both are drawn in step.
        self._bar = tqdm(bar_format="{desc} ...", desc=text, leave=False, dynamic_ncols=True, file=sys.stdout)
        self._below_others |= self._bar.pos != 0

    def show(self, done: int, total: int, note: str) -> None:
        self._bar.total, self._bar.bar_format = total, None
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def end(self) -> None:
        self._bar.close()

    def close(self) -> None:
        # Lightning's bar is still open, with the cursor on its line.
        if self._below_others:
            print()


class _RichLine:
    """A task in the display of Lightning's bar, or in its own where that is not running."""

    def __init__(self, lightning: Progress | None) -> None:
        # Lightning has none before its first loop, and a console shows only one at a time.
        self._lightning = lightning if lightning is not None and lightning.live.is_started else None
        self._progress: Any = self._lightning
        self._task: Any = None
        self._text = ""

    def begin(self, text: str) -> None:
        if self._lightning is None:
            self._progress = Progress(console=get_console(), transient=True)
            self._progress.start()
        self._text = text
        # An unknown total is infinity to Lightning's columns, None to rich's own.
        self._task = self._progress.add_task(text, total=float("inf") if self._lightning is not None else None)

    def show(self, done: int, total: int, note: str) -> None:
        description = f"{self._text} ({note})" if note else self._text
        self._progress.update(self._task, completed=done, total=total, description=description)
        # Lightning's display is drawn only on demand.
        self._progress.refresh()

    def end(self) -> None:
        self._progress.remove_task(self._task)
        self._progress.refresh()
        if self._lightning is None:
            self._progress.stop()

    def close(self) -> None:
        return None
