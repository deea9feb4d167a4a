"""`ResultBox`, which brings a text back from a process that a strategy has started."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from lightning_nrl._utils.atomic_files import remove_stale, write_text

FILE_PREFIX = "lightning_nrl-"


class ResultBox:
    """Box in which a process, as of `ddp_spawn`, leaves a text for the process that made it."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._path = Path(tempfile.gettempdir()) / f"{FILE_PREFIX}{uuid4().hex}.json"
        weakref.finalize(self, _remove, self._path, self._process)

    def put(self, text: Callable[[], str]) -> None:
        """Leaves a text for the process that made the box; does nothing in that process."""
        if os.getpid() != self._process:
            with suppress(OSError):
                remove_stale(self._path.parent, f"{FILE_PREFIX}*.json", f".{FILE_PREFIX}*.json.*")
                write_text(self._path, text())

    def take(self) -> str:
        """Returns the text that another process left since the last call, or an empty text."""
        if os.getpid() != self._process:
            return ""
        try:
            text = self._path.read_text(encoding="utf-8")
        except OSError:
            return ""
        self._path.unlink(missing_ok=True)
        return text


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:
        path.unlink(missing_ok=True)
