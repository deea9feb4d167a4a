"""Freezes what the package gives, so that a change of its form can be shown to change nothing else.

    python -m tests.frozen before.json   # before the change, from the root of the repository
    python -m tests.frozen after.json   # after it
    python -m tests.frozen --compare before.json after.json

Each case of `cases.py` makes repairs or other calls with fixed seeds and keeps what comes of them:
reports, which samples broke or were repaired, and a hash of the weights, to the bit. Times,
versions and paths are left out. Both runs have to be on the same machine, with `OMP_NUM_THREADS=1`.

What differs on purpose goes into `renames.json`: words, such as the name of a class in the settings
of a report, old to new; keys that were added, with the value that says nothing; and patterns of
paths that were removed or may differ. A comparison prints every other difference and exits with 1
if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import seed_everything

from .plain import clean, differences, renamed, without

RENAMES = Path(__file__).parent / "renames.json"


def run(only: list[str], show: bool) -> tuple[dict[str, Any], list[str]]:
    """What each case gives, and the names of those that failed. A name chooses the cases that begin
    with it.
    """
    from . import cases

    names = [
        name for name in cases.CASES if not only or any(name.startswith(begin) for begin in only)
    ]
    results: dict[str, Any] = {}
    failed: list[str] = []
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as top:
        cases.prepare(Path(top).resolve() / "prepared")
        for name in names:
            folder = Path(top).resolve() / name
            folder.mkdir()
            began = time.perf_counter()
            os.chdir(folder)
            seed_everything(0, verbose=False)
            try:
                with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results[name] = clean(cases.CASES[name](folder), str(folder))
            except Exception as error:
                failed.append(name)
                results[name] = {
                    "exception": type(error).__name__,
                    "message": clean(str(error), str(folder)),
                }
                traceback.print_exc()
            finally:
                os.chdir(start)
            if show:
                print(f"{time.perf_counter() - began:6.1f} s  {name}", file=sys.stderr, flush=True)
    return results, failed


def compare(a: Path, b: Path, renames: Path) -> int:
    """Prints what differs; gives how much that is."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (a, b))
    intended = json.loads(renames.read_text(encoding="utf-8"))
    before, after = renamed(before, intended["renamed"]), without(after, intended["added"])
    removed = [f"/{pattern}" for pattern in intended["removed"]]
    found = [
        (path, old, new)
        for path, old, new in differences(before, after)
        if not any(fnmatch(path, pattern) for pattern in removed)
    ]
    for path, old, new in found:
        case, _, inside = path[1:].partition("/")
        print(f"{case}: {inside}\n    {old}\n    {new}")
    print(f"{len(found)} differences" if found else f"the same: {len(after)} cases")
    return len(found)


def main() -> int:
    """Runs or compares; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.frozen", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", nargs="?", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="cases that begin with this name",
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two files: before and after"
    )
    parser.add_argument(
        "--renames", type=Path, default=RENAMES, help="words that differ on purpose"
    )
    parser.add_argument("--quiet", action="store_true", help="do not say how long each case takes")
    given = parser.parse_args()
    if given.compare:
        return 1 if compare(*given.compare, given.renames) else 0
    if given.out is None:
        parser.error("name a file to write, or `--compare A B`")
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    results, failed = run(given.only, not given.quiet)
    given.out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
