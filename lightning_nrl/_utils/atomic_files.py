"""Atomic writing of one file, or of several files of one folder together."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from typing_extensions import Self

from lightning_nrl.errors import UnwritableFolderError

UNFINISHED = ".unfinished-"  # prefix of the staging folder
EARLIER = "earlier-"  # prefix of files of an earlier run
STALE_SECONDS = 24 * 3600.0  # age at which files left by a killed process are removed


def replacing(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically: `write` fills a temporary file, which then replaces `path`."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        _finish(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(argument: str, path: str | Path) -> None:
    """Raises an `UnwritableFolderError` if a file cannot be written, before any work."""
    path = Path(path).absolute()
    if path.is_dir() or obstacle_of(path.parent):
        raise UnwritableFolderError(
            f"`{argument}`: {path} cannot be written.", f"name a file in a folder as `{argument}`."
        )


@contextmanager
def must_be_written(argument: str, path: str | Path) -> Iterator[None]:
    """Raises an `UnwritableFolderError` that names an argument, for an `OSError` of the block."""
    try:
        yield
    except OSError as error:
        raise UnwritableFolderError(
            f"`{argument}`: {path} cannot be written ({error}).",
            f"make room, or name another place as `{argument}`.",
        ) from error


def obstacle_of(folder: Path) -> str:
    """Returns what keeps files from being written to a folder, or nothing."""
    paths = (folder.absolute(), *folder.absolute().parents)
    nearest = next(path for path in paths if os.path.exists(path))
    for name in folder.parts:
        try:
            os.lstat(nearest / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # a name that is too long or has a NUL
            return str(error)
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # `os.access` permits all to root
    except OSError:
        return str(nearest)
    return ""


def write_text(path: str | Path, text: str) -> None:
    replacing(path, lambda part: part.write_text(text, encoding="utf-8"))


def remove_stale(folder: Path, *patterns: str) -> None:
    """Removes files and folders that match a pattern and are older than `STALE_SECONDS`."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            with suppress(OSError):  # the file may belong to another user
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    _remove(path)


class StagedFiles:
    """Files that are first staged in a hidden subfolder, and then moved to `folder` together.

    `names` are files that a run may write; `marks` are further files, such as the report. `commit`
    removes the marks of an earlier run first and moves new marks last. So a folder with a mark
    holds the files of one run only, even after a kill. Files for which `is_ours` is false are
    those of the user, which are renamed instead of removed or replaced.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        marks: Sequence[str],
        is_ours: Callable[[Path], bool] = lambda path: True,
    ) -> None:
        self.folder = folder
        self._names = [name for name in dict.fromkeys(names) if name not in marks]
        self._marks = marks
        self._is_ours = is_ours
        self._stage: Path | None = None
        self.placed: list[str] = []  # files moved by `commit`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stage is not None:
            shutil.rmtree(self._stage, ignore_errors=True)

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Calls `write` with the staging path of a file; removes the file if `write` raises."""
        path = self.place(name)
        try:
            write(path)
            if path.is_file():
                _finish(path)
        except BaseException:
            with suppress(OSError):
                _remove(path)
            raise

    def place(self, name: str) -> Path:
        """Returns the path at which a file is staged."""
        if self._stage is None:
            remove_stale(self.folder, f"{UNFINISHED}*")
            self._stage = Path(tempfile.mkdtemp(dir=self.folder, prefix=UNFINISHED))
        return self._stage / name

    def is_written(self, name: str) -> bool:
        """True while the staged file `name` awaits `commit`."""
        return self._stage is not None and (self._stage / name).exists()

    def commit(self, there: Collection[str] = ()) -> list[Path]:
        """Moves the staged files to the folder; returns new paths of renamed files of earlier runs.

        Marks of an earlier run are removed. Another file of that run is replaced if a file of the
        same name is staged. Otherwise it gets the prefix `earlier-`, since it may be the only copy
        of a model. Files in `there`, which this run has written directly, stay.
        """
        if self._stage is None or not any(self._stage.iterdir()):
            return []
        renamed = []
        for name in (*self._names, *self._marks):
            if name not in there and not self._is_ours(self.folder / name):
                renamed.append(name)
        for name in reversed(self._marks):
            if name not in renamed:
                _remove(self.folder / name)
        for name in self._names:
            is_kept = self.is_written(name) or name in (*there, *renamed)
            if not is_kept and (self.folder / name).exists():
                renamed.append(name)
        kept = list(map(self._earlier_path, renamed))
        for name, path in zip(renamed, kept, strict=True):
            _move(self.folder / name, path)
        for name in (*self._names, *self._marks):
            if self.is_written(name):
                _move(self._stage / name, self.folder / name)
                self.placed.append(name)
        _make_durable(self.folder)
        return kept

    def _earlier_path(self, name: str) -> Path:
        path = self.folder / f"{EARLIER}{name}"
        return path if self._is_ours(path) else self._earlier_path(path.name)


def _move(path: Path, to: Path) -> None:
    if to.is_dir():  # such as a sharded checkpoint, which `replace` cannot overwrite
        shutil.rmtree(to)
    path.replace(to)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _finish(path: Path) -> None:
    _make_durable(path)
    # `mkstemp` makes a private file. Give it the permissions that `open` would give.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _make_durable(path: Path) -> None:
    # For a folder, `fsync` writes the names of its files to the disk.
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # some systems cannot open a folder
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
