"""Finds repairs below a log folder. Reads no file outside the folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPORT_NAME = "report.json"
MAX_FOLDERS, MAX_DEPTH = 50_000, 12
FIRST_KEYS = re.compile(rb'\s*\{\s*("schema":\s*\d+,\s*)?"status":\s*"[^"]*",\s*"reason":')
"""Start of the report of a repair. Other reports have the same file name."""


@dataclass(frozen=True)
class RepairFolder:
    """A folder with the report of a repair. The report has `size` bytes and was `modified` at a
    time
    in nanoseconds.

    A browser asks for the folder by `name`: its path below the log folder `root`, with slashes.
    """

    name: str
    root: Path
    path: Path
    modified: int
    size: int

    @property
    def report(self) -> Path:
        return self.path / REPORT_NAME


def log_roots(logdir: str | None, flags: Any = None) -> dict[str, Path]:
    """Returns TensorBoard's log folders by name. `--logdir_spec` gives the names; the name of
    `--logdir` is empty.
    """
    spec = getattr(flags, "logdir_spec", None) if not getattr(flags, "logdir", None) else None
    if not spec:
        return {"": Path(logdir)} if logdir else {}
    roots = {}
    for part in spec.split(","):
        # A name has no slash, as in TensorBoard.
        name, colon, path = part.partition(":")
        named = bool(colon) and "/" not in name
        roots[name if named else Path(part).name] = Path(path if named else part)
    return roots


def find_repairs(roots: Mapping[str, Path]) -> list[RepairFolder]:
    """Finds folders with the report of a repair, latest first. Ignores links that lead out of a
    root.
    """
    found = [folder for name, root in roots.items() for folder in _below(name, root)]
    return sorted(found, key=lambda folder: (-folder.modified, folder.name))


def is_below(path: Path, root: Path) -> bool:
    """True if a path leads to a file below the root after all links are resolved."""
    try:
        return (
            path.resolve(strict=True).is_relative_to(root.resolve(strict=True)) and path.is_file()
        )
    except OSError:
        return False


def _below(name: str, root: Path) -> Iterator[RepairFolder]:
    for n, (place, folders, files) in enumerate(os.walk(root)):
        here = Path(place)
        depth = len(here.relative_to(root).parts)
        folders[:] = (
            sorted(one for one in folders if not one.startswith(".")) if depth < MAX_DEPTH else []
        )
        if n >= MAX_FOLDERS:
            return
        if (
            REPORT_NAME in files
            and is_below(here / REPORT_NAME, root)
            and _is_repair_report(here / REPORT_NAME)
        ):
            stat = (here / REPORT_NAME).stat()
            below = "/".join(
                filter(None, (name, here.relative_to(root).as_posix().removeprefix(".")))
            )
            yield RepairFolder(
                below or here.resolve().name, root, here, stat.st_mtime_ns, stat.st_size
            )


def _is_repair_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return FIRST_KEYS.match(file.read(4096)) is not None
    except OSError:
        return False
