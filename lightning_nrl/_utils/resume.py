"""Saved results of the finished steps of a repair, reused if the process is killed.

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
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch.serialization import add_safe_globals, default_restore_location
from torch.types import Storage

from lightning_nrl._utils.atomic_files import replacing, write_text
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.json_records import Hint
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import FilesWarning, first_line

MAGIC = b"lightning_nrl saved value 2\n"
HEADER_SIZE = len(MAGIC) + hashlib.sha256().digest_size


def to_bytes(value: object) -> memoryview:
    """Serialises a value with a checksum."""
    stream = io.BytesIO(bytes(HEADER_SIZE))
    stream.seek(HEADER_SIZE)
    torch.save(value, stream)
    data = stream.getbuffer()
    # In place, since large results would not fit twice.
    data[:HEADER_SIZE] = MAGIC + hashlib.sha256(data[HEADER_SIZE:]).digest()
    return data


def from_bytes(data: bytes, hint: Hint = None, device: torch.device | None = None) -> Any:
    """Deserialises the result of `to_bytes`.

    `hint` is the type of the value. A dataclass or named tuple in the value is refused unless its
    class is in `hint` or in the type of a field of such a class. Tensors that were on another
    device than the CPU are put on `device`.

    Raises:
        ValueError: the data are damaged or hold an unexpected object, or memory runs out.
    """
    content = memoryview(data)[HEADER_SIZE:]
    if data[:HEADER_SIZE] != MAGIC + hashlib.sha256(content).digest():
        raise ValueError("the checksum is wrong")

    def place(storage: Storage, location: str) -> Any:
        if location != "cpu":
            location = str(device or "cpu")
        return default_restore_location(storage, location)

    try:
        add_safe_globals(list(_records(hint, set())))
        return torch.load(io.BytesIO(content), map_location=place, weights_only=True)
    except UnpicklingError as error:
        raise ValueError("it holds an unexpected object") from error
    except Exception as error:
        raise ValueError(first_line(f"{type(error).__name__}: {error}")) from error


def _records(hint: Hint, kinds: set[type]) -> set[type]:
    """Adds to `kinds` the dataclasses and named tuples in a type hint, and in their fields."""
    for part in get_args(hint):
        _records(part, kinds)
    is_record = isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields"))
    if is_record and hint not in kinds:
        kinds.add(hint)
        for inner in get_type_hints(hint).values():
            _records(inner, kinds)
    return kinds


Result = TypeVar("Result")

SAVE_EVERY = 5.0  # seconds; a shorter step is not worth a file
PREFIX = ".resume-"  # of the folder
ORIGIN = "origin.json"
FINISHED = ".finished"  # end of a step's file


class SavedStep(NamedTuple):
    """The content of a step's file: the result, and fields of the clock at the end of the step."""

    result: Any
    elapsed: float
    seconds: dict[str, float]
    visits: dict[str, int]


class ResumeStore:
    """Store for the results of steps that take at least `every` seconds.

    The files are in a subfolder of `parent`. With `parent=None`, nothing is saved. Results of
    earlier runs are also sought in the folders `elsewhere`, in order.
    """

    def __init__(
        self, parent: Path | None = None, elsewhere: Sequence[Path] = (), every: float = SAVE_EVERY
    ) -> None:
        self._parent = parent
        self._elsewhere = elsewhere
        self._every = every
        self._origin = ""
        self._folder: Path | None = None  # set on the first rank, and None after a write has failed
        self._folders: list[Path] = []  # all folders used
        self._is_active = self._resumes = False
        self._path = ""  # of the current step
        self._number = 0  # of steps begun inside it

    def begin(
        self,
        origin: Mapping[str, str],
        clock: StageTimer,
        collective: Collective,
        device: torch.device,
    ) -> None:
        """Looks for results saved with the same `origin`.

        All ranks must call it; only the first rank uses files. `origin` has hashes of everything
        that affects the results. Its keys name these things in messages.
        """
        if self._parent is None:
            return
        self._clock = clock
        self._collective = collective
        self._device = device
        self._is_active = True
        self._number = 0
        has_results = False
        if collective.rank == 0:
            self._origin = json.dumps(dict(origin), indent=2)
            digest = hashlib.sha256(self._origin.encode()).hexdigest()
            self._folder = self._parent / f"{PREFIX}{digest[:16]}"
            self._folders.append(self._folder)
            has_results = self._find(self._folder, origin)
        self._resumes = collective.any(has_results)
        if self._resumes:
            clock.observer.announce(f"Repair: resumes after the finished steps ({self._folder}).")

    def once(self, name: str, work: Callable[[], Result], hint: Hint = None) -> Result:
        """Returns a step's saved result, or runs `work` and saves its result if it was slow.

        All ranks must call it.
        """
        if not self._is_active:
            return work()
        outer = self._path
        number = self._number + 1
        began = self._clock.elapsed
        self._path = f"{outer}{number}-{name.replace(' ', '-')}."
        self._number = 0
        try:
            saved = self._read(hint) if self._resumes else None
            if saved is not None:
                result: Result = saved.result
                self._clock.resume(saved.elapsed, saved.seconds, saved.visits)
                return result
            result = work()
            if self._folder is not None and self._clock.elapsed - began >= self._every:
                self._write(self._folder, result)
            return result
        finally:
            self._path = outer
            self._number = number

    @property
    def place(self) -> Path | None:
        if self._folder is None or not self._folder.is_dir():
            return None
        return self._folder

    def done(self) -> None:
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._folder = None
        self._folders = []
        self._is_active = False

    @property
    def _file_name(self) -> str:
        return f"{self._path[:-1]}{FINISHED}"

    def _write(self, folder: Path, result: object) -> None:
        try:
            clock = self._clock
            data = to_bytes((result, clock.elapsed, clock.seconds, clock.visits))
        except Exception:  # results of custom methods may not be serialisable
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / ORIGIN).exists():
                write_text(folder / ORIGIN, self._origin)
            replacing(folder / self._file_name, lambda part: part.write_bytes(data))
            for file in folder.glob(f"{self._path}*{FINISHED}"):
                file.unlink(missing_ok=True)
        except Exception as error:
            warnings.warn(
                FilesWarning(
                    f"finished steps cannot be saved in {folder} "
                    f"({type(error).__name__}: {error}).",
                    "make room; otherwise a stopped repair starts over.",
                ),
                stacklevel=3,
            )
            self._folder = None

    def _read(self, hint: Hint) -> SavedStep | None:
        """Reads the file of the current step.

        Returns None on all ranks if the first rank has no such file, or if one rank cannot read
        the content.
        """
        data = b""
        if self._folder is not None:
            with suppress(OSError, MemoryError):
                data = (self._folder / self._file_name).read_bytes()
        data = self._collective.of_first(data)
        if not data:
            return None
        saved = None
        problem = ""
        try:
            saved = SavedStep(*from_bytes(data, hint, self._device))
        except ValueError as error:
            problem = str(error)
        problem = self._collective.first_text(problem)
        if not problem:
            return saved
        if self._collective.rank == 0:
            warnings.warn(
                FilesWarning(
                    f"{self._folder}: {self._file_name!r} is not used: {problem}.",
                    "that part of the repair runs again.",
                ),
                stacklevel=3,
            )
        return None

    def _find(self, folder: Path, origin: Mapping[str, str]) -> bool:
        """Looks for the results; moves results in the folder of an earlier run to `folder`."""
        parents = dict.fromkeys((folder.parent, *self._elsewhere))
        for parent in parents:
            earlier = parent / folder.name
            with suppress(OSError):
                if (earlier / ORIGIN).read_text(encoding="utf-8") != self._origin:
                    continue
                if earlier != folder:
                    # If the earlier run is still alive, it makes a new folder for itself.
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(earlier, folder)
                return True
        with suppress(OSError, ValueError):
            files = [file for parent in parents for file in parent.glob(f"{PREFIX}*/{ORIGIN}")]
            newest = max(files, key=lambda file: file.stat().st_mtime)
            earlier_origin = dict(json.loads(newest.read_text(encoding="utf-8")))
            differing = [name for name in origin if earlier_origin.get(name) != origin[name]]
            self._clock.observer.announce(
                f"Repair: starts again, since {newest.parent} is from a repair with other "
                f"{' and '.join(differing)}; delete it if you do not need it."
            )
        return False
