"""Files that are there as a whole or not at all: one by one, or those of a folder together."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

UNFINISHED = ".unfinished-"
"""How the folder begins in which files are written before they are put in their place."""
STALE_SECONDS = 24 * 3600.0
"""What is as old as this was left by a process that was killed."""
EARLIER = "earlier-"


def replacing(path: str | Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside its place and put there when it is complete, so that no half of one is ever there."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        _make_durable(part)
        _make_readable(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8, whole or not at all."""
    replacing(path, lambda part: part.write_text(text, encoding="utf-8"))


def remove_stale(folder: Path, *patterns: str) -> None:
    """Removes files and folders of such names that are so old that processes left them that were killed."""
    for pattern in patterns:
        for left in folder.glob(pattern):
            with suppress(OSError):  # of another user
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


class StagedFiles:
    """Files of one folder that are written beside their places and put there together.

    `commit` takes the old marks away first, then puts the new files in their places and the new marks last. So a folder
    with a mark holds files of one run, whenever the process is killed. A mark is what says what the others are, such as
    a report; the last of `marks` is put there last.

    Args:
        folder: where the files belong; it is there. Files are written in a hidden folder inside, on the same disk.
        names: all that a run may put there, the marks included.
        marks: see above.
    """

    def __init__(self, folder: Path, names: Sequence[str], marks: Sequence[str]) -> None:
        self.folder = folder
        self._others = [name for name in names if name not in marks]
        self._marks = [name for name in names if name in marks]
        self._stage: Path | None = None
        self.placed: list[str] = []
        """The files that `commit` has put in their places."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stage is not None:
            shutil.rmtree(self._stage, ignore_errors=True)

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Has one file written, to the disk itself; an exception leaves nothing of it."""
        path = self.place(name)
        try:
            write(path)
            if path.is_file():
                _make_durable(path)
                _make_readable(path)
        except BaseException:
            with suppress(OSError):
                _remove(path)
            raise

    def place(self, name: str) -> Path:
        """Where a file is until `commit`."""
        if self._stage is None:
            remove_stale(self.folder, f"{UNFINISHED}*")
            self._stage = Path(tempfile.mkdtemp(dir=self.folder, prefix=UNFINISHED))
        return self._stage / name

    def is_written(self, name: str) -> bool:
        """Whether a file waits for `commit`."""
        return self._stage is not None and (self._stage / name).exists()

    def drop(self, name: str) -> None:
        """Takes back a file that waits for `commit`."""
        _remove(self.place(name))

    def commit(self, there: Container[str] = ()) -> list[Path]:
        """Puts all that was written in its place, and gives where earlier files of these names went.

        What is `there` was put in its place by others, for this run.

        Of those that were not written, an earlier mark goes, and any other earlier file is kept under another name,
        since it may be the only copy of a model. Where nothing was written, all stays as it is.
        """
        if self._stage is None or not any(self._stage.iterdir()):
            return []
        for name in reversed(self._marks):
            _remove(self.folder / name)
        kept = []
        for name in self._others:
            path = self.folder / name
            if not self.is_written(name) and name not in there and path.exists():
                kept.append(self.folder / f"{EARLIER}{name}")
                _move(path, kept[-1])
        for name in (*self._others, *self._marks):
            if self.is_written(name):
                _move(self._stage / name, self.folder / name)
                self.placed.append(name)
        _make_durable(self.folder)
        return kept


def _move(path: Path, to: Path) -> None:
    if to.is_dir():  # a checkpoint of several files; nothing can be put in the place of a folder
        shutil.rmtree(to)
    path.replace(to)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_readable(path: Path) -> None:
    """Permissions as `open` gives them; temporary files are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _make_durable(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # not every system lets a folder be opened
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
