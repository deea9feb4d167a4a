"""Saved results of the finished steps of a repair. If the process is killed, the same call reuses
them.

A repair takes the same steps in the same order each time. So the file of a step is named by the
number of the step, after the numbers of the steps that contain it. The folder is named by a hash of
everything that affects the results.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch.serialization import add_safe_globals, default_restore_location

from lightning_nrl._utils.atomic_files import replacing, write_text
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import FilesWarning, first_line

MAGIC = b"lightning_nrl saved value 2\n"


def to_bytes(value: Any) -> bytes:
    """Serialises a value with a checksum."""
    stream = io.BytesIO()
    torch.save(value, stream)
    content = stream.getbuffer()
    return b"".join((MAGIC, hashlib.sha256(content).digest(), content))


def from_bytes(data: bytes, hint: Any = None, device: torch.device | None = None) -> Any:
    """Deserialises the result of `to_bytes`.

    `hint` is the type of the value. A dataclass or named tuple in the value is refused unless its
    class is in `hint` or in the type of a field of such a class. Tensors that were on another
    device than the CPU are put on `device`.

    Raises:
        ValueError: the data are damaged or hold an unexpected object, or memory runs out.
    """
    start, target = len(MAGIC), str(device or "cpu")
    view = memoryview(data)
    digest, content = view[start : start + 32], view[start + 32 :]
    if view[:start] != MAGIC or hashlib.sha256(content).digest() != digest:
        raise ValueError("the checksum is wrong")

    def place(storage: Any, location: str) -> Any:
        return default_restore_location(storage, location if location == "cpu" else target)

    try:
        add_safe_globals(list(_records(hint, {})))
        return torch.load(io.BytesIO(content), map_location=place, weights_only=True)
    except UnpicklingError as error:
        raise ValueError("it holds an unexpected object") from error
    except Exception as error:
        raise ValueError(first_line(f"{type(error).__name__}: {error}")) from error


def _records(hint: Any, found: dict[type, None]) -> dict[type, None]:
    for part in get_args(hint):
        _records(part, found)
    is_record = isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields"))
    if is_record and hint not in found:
        found[hint] = None
        for inner in get_type_hints(hint).values():
            _records(inner, found)
    return found


Result = TypeVar("Result")

SAVE_EVERY = 5.0  # seconds
PREFIX, ORIGIN, FINISHED = ".resume-", "origin.json", ".finished"


class ResumeStore:
    """Store for the results of steps that take at least `every` seconds, in a subfolder of
    `parent`.

    With `parent=None`, nothing is saved. Results of earlier runs are also sought in the folders
    `elsewhere`, in order.
    """

    def __init__(
        self, parent: Path | None = None, elsewhere: Sequence[Path] = (), every: float = SAVE_EVERY
    ) -> None:
        self._parent, self._elsewhere, self._every = parent, elsewhere, every
        self._clock, self._collective, self._device = (
            StageTimer(),
            Collective(),
            torch.device("cpu"),
        )
        self._origin = ""
        self._folder: Path | None = None  # set on the first rank, and None after a write has failed
        self._made: list[Path] = []
        self._is_active = self._resumes = False
        self._path, self._number = (
            "",
            0,
        )  # path of the current step, and number of steps begun inside it

    def begin(
        self,
        origin: Mapping[str, str],
        clock: StageTimer,
        collective: Collective,
        device: torch.device,
    ) -> None:
        """Looks for results saved with the same `origin`. All ranks must call it; only the first
        rank
        uses files.

        `origin` has hashes of everything that affects the results. Its keys name these things in
        messages.
        """
        if self._parent is None:
            return
        self._clock, self._collective, self._device = clock, collective, device
        self._is_active, self._path, self._number = True, "", 0
        found = False
        if collective.rank == 0:
            self._origin = json.dumps(dict(origin), indent=2)
            self._folder = (
                self._parent / f"{PREFIX}{hashlib.sha256(self._origin.encode()).hexdigest()[:16]}"
            )
            self._made.append(self._folder)
            found = self._find(self._folder, origin)
        self._resumes = collective.any(found)
        if self._resumes:
            clock.announce(f"Repair: resumes after the finished steps ({self._folder}).")

    def once(self, name: str, work: Callable[[], Result], hint: Any = None) -> Result:
        """Returns a step's saved result, or runs `work` and saves its result if it was slow. All
        ranks must call it.
        """
        if not self._is_active:
            return work()
        outer, number, began = self._path, self._number + 1, self._clock.elapsed
        self._path, self._number = f"{outer}{number}-{name.replace(' ', '-')}.", 0
        try:
            saved = self._read(hint) if self._resumes else None
            if saved is not None:
                result: Result = saved[0]
                self._clock.resume(*saved[1:])
                return result
            result = work()
            if self._folder is not None and self._clock.elapsed - began >= self._every:
                self._write(self._folder, result)
            return result
        finally:
            self._path, self._number = outer, number

    @property
    def place(self) -> Path | None:
        return self._folder if self._folder is not None and self._folder.is_dir() else None

    def done(self) -> None:
        for folder in self._made:
            shutil.rmtree(folder, ignore_errors=True)
        self._folder, self._made, self._is_active = None, [], False

    def _write(self, folder: Path, result: Any) -> None:
        try:
            data = to_bytes((result, self._clock.elapsed, self._clock.seconds))
        except Exception:  # results of custom methods may not be serialisable
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / ORIGIN).exists():
                write_text(folder / ORIGIN, self._origin)
            replacing(folder / f"{self._path[:-1]}{FINISHED}", lambda part: part.write_bytes(data))
            for file in folder.glob(f"{self._path}*{FINISHED}"):
                file.unlink(missing_ok=True)
        except Exception as error:
            problem = (
                f"finished steps cannot be saved in {folder} ({type(error).__name__}: {error})."
            )
            warnings.warn(
                FilesWarning(problem, "make room; otherwise a stopped repair starts over."),
                stacklevel=3,
            )
            self._folder = None

    def _read(self, hint: Any) -> tuple[Any, float, dict[str, float]] | None:
        data, name = b"", f"{self._path[:-1]}{FINISHED}"
        if self._folder is not None:
            with suppress(OSError, MemoryError):
                data = (self._folder / name).read_bytes()
        received = self._collective.first_bytes(data)
        if not received:
            return None
        result, problem = None, ""
        try:
            result = from_bytes(received, hint, self._device)
        except ValueError as error:
            problem = str(error)
        if not self._collective.any(bool(problem)):
            return result
        problem = self._collective.first_text(problem)
        if self._collective.rank == 0:
            message = f"{self._folder}: {name!r} is not used: {problem}."
            warnings.warn(
                FilesWarning(message, "that part of the repair runs again."), stacklevel=3
            )
        return None

    def _find(self, folder: Path, origin: Mapping[str, str]) -> bool:
        # Results in the folder of an earlier run are moved to the folder of this run.
        for place in (folder, *(place / folder.name for place in self._elsewhere)):
            with suppress(OSError):
                if (place / ORIGIN).read_text(encoding="utf-8") == self._origin:
                    if place != folder:
                        # If the earlier run is still alive, it makes a new folder for itself.
                        shutil.rmtree(folder, ignore_errors=True)
                        folder.parent.mkdir(parents=True, exist_ok=True)
                        shutil.move(place, folder)
                    return True
        places = dict.fromkeys((folder.parent, *self._elsewhere))
        with suppress(OSError, ValueError):
            others = [path for place in places for path in place.glob(f"{PREFIX}*/{ORIGIN}")]
            newest = max(others, key=lambda path: path.stat().st_mtime)
            other = dict(json.loads(newest.read_text(encoding="utf-8")))
            differ = " and ".join(name for name in origin if other.get(name) != origin[name])
            why = f"{newest.parent} is from a repair with other {differ}; delete it if you do not need it"
            self._clock.announce(f"Repair: starts again, since {why}.")
        return False
