"""A text from a process that a strategy has started, for the process that waits for it: its attributes do not come."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from lightning_nrl._utils.whole_files import remove_stale, write_text

FILE_PREFIX = "lightning_nrl-"


class ResultBox:
    """Goes with its owner into other processes, and brings a text back to the one in which it was made."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._path = Path(tempfile.gettempdir()) / f"{FILE_PREFIX}{uuid4().hex}.json"
        weakref.finalize(self, _remove, self._path, self._process)

    def put(self, text: Callable[[], str]) -> None:
        """Leaves a text for the other process, in place of an earlier one; in the same process does not ask for it."""
        if os.getpid() != self._process:
            with suppress(OSError):
                remove_stale(self._path.parent, f"{FILE_PREFIX}*.json", f".{FILE_PREFIX}*.json.*")
                write_text(self._path, text())

    def take(self) -> str:
        """The text that another process has left since the last time; empty if none has."""
        if os.getpid() != self._process:
            return ""
        try:
            text = self._path.read_text(encoding="utf-8")
        except OSError:
            return ""
        _remove(self._path, self._process)
        return text


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:
        path.unlink(missing_ok=True)
