"""Finds repairs below a log folder. Reads no file outside the folder."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPORT_NAME = "report.json"
MAX_FOLDERS, MAX_DEPTH = 50_000, 12  # a log folder may be a home folder
FIRST_KEYS = re.compile(rb'\s*\{\s*("schema":\s*\d+,\s*)?"status":\s*"[^"]*",\s*"reason":')
"""Start of the report of a repair. Other reports have the same file name."""


@dataclass(frozen=True)
class RepairFolder:
    """A folder with the report of a repair.

    The report has `size` bytes and was `modified` at a time in nanoseconds. A browser asks for the
    folder by `name`: its path below the log folder `root`, with slashes.
    """

    name: str
    root: Path
    path: Path
    modified: int
    size: int

    @property
    def report(self) -> Path:
        return self.path / REPORT_NAME


def log_roots(logdir: str | None, flags: Namespace | None = None) -> dict[str, Path]:
    """Returns TensorBoard's log folders by name.

    `--logdir_spec` gives the names; the name of `--logdir` is empty.
    """
    options = vars(flags) if flags else {}
    spec = options.get("logdir_spec")
    if options.get("logdir") or not spec:
        return {"": Path(logdir)} if logdir else {}
    roots = {}
    for part in spec.split(","):
        name, colon, path = part.partition(":")
        # A name has no slash, as in TensorBoard.
        if colon and "/" not in name:
            roots[name] = Path(path)
        else:
            roots[Path(part).name] = Path(part)
    return roots


def find_repairs(roots: Mapping[str, Path]) -> list[RepairFolder]:
    """Finds folders with the report of a repair, latest first.

    Ignores links that lead out of a root.
    """
    folders = [folder for name, root in roots.items() for folder in _below(name, root)]
    return sorted(folders, key=lambda folder: (-folder.modified, folder.name))


def is_below(path: Path, root: Path) -> bool:
    """True if a path leads to a file below the root after all links are resolved."""
    try:
        resolved = path.resolve(strict=True)
        return resolved.is_relative_to(root.resolve(strict=True)) and path.is_file()
    except OSError:
        return False


def _below(name: str, root: Path) -> Iterator[RepairFolder]:
    for n, (path, subfolders, files) in enumerate(os.walk(root)):
        folder = Path(path)
        steps = folder.relative_to(root).parts
        visible = sorted(name for name in subfolders if not name.startswith("."))
        # `os.walk` descends into the subfolders that are left.
        subfolders[:] = visible if len(steps) < MAX_DEPTH else []
        if n >= MAX_FOLDERS:
            return
        report = folder / REPORT_NAME
        if REPORT_NAME in files and is_below(report, root) and _is_repair_report(report):
            stat = report.stat()
            full_name = "/".join((name, *steps)).strip("/") or folder.resolve().name
            yield RepairFolder(full_name, root, folder, stat.st_mtime_ns, stat.st_size)


def _is_repair_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return FIRST_KEYS.match(file.read(4096)) is not None
    except OSError:
        return False
