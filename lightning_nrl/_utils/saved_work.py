"""Work that is saved every few seconds, so that a process that is called again goes on where another one was killed.

Work consists of pieces, one after another and one inside another. It is the same each time that it is done, so pieces
come in the same order and are known by their numbers. What a finished piece gave is a file; what is under way is one
more. Who does the work again gets finished pieces from their files, and the one under way as it was left.

The folder is named after a hash of all that the work depends on: other data, weights or settings have another one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import is_ending_early
from lightning_nrl._utils.saved_values import (
    Bytes,
    DamagedValueError,
    UnsavableValueError,
    from_bytes,
    tensor_hashes,
    to_bytes,
)
from lightning_nrl._utils.timing import StageTimer, TimeMark
from lightning_nrl._utils.whole_files import replacing, write_text
from lightning_nrl.errors import FilesWarning, OtherRankError

__all__ = ["SAVE_EVERY", "Piece", "SavedWork"]

Result = TypeVar("Result")

SAVE_EVERY = 5.0
"""Seconds between two times that work is saved."""

MAX_SHARE = 0.02
"""Of the time, what saving may take: after one that took long the next one comes later."""

PREFIX = ".resume-"
"""How the name of the folder begins."""

ORIGIN, UNDER_WAY, FINISHED = "origin.json", "under-way", ".finished"


class _UnderWay(NamedTuple):
    """Of the file of that name: the innermost piece, when it and those around it began, when it was saved.

    `states` has what each rank goes on from, or one state for all of them.
    """

    path: str
    began: Mapping[str, TimeMark]
    now: TimeMark
    states: Sequence[Bytes]


class Piece:
    """A piece of work in progress."""

    def __init__(
        self, save: Callable[[Callable[[], Any], bool], None] | None = None, left: Callable[[], Any] | None = None
    ) -> None:
        self._save, self._left = save, left

    def left(self) -> Any:
        """What an earlier process had when it saved this piece for the last time; None: begin at the beginning.

        To be called once, on all ranks; either each has what it had, or none has anything. The time of the work is then
        what it was, so deadlines are to be made before.
        """
        return None if self._left is None else self._left()

    def seam(self, state: Callable[[], Any], *, same: bool = False) -> None:
        """A place to go on from: `state` gives what is needed for that, and is called if it is time to save it.

        All ranks come here together. Where each has the `same` state they exchange nothing, and that of the first one
        is saved. `state` may exchange nothing either.
        """
        if self._save is not None:
            self._save(state, same)


@dataclass
class _Begun:
    """A piece that was begun and is not finished."""

    path: str
    began: TimeMark
    n_inside: int = 0
    has_seams: bool = True


class SavedWork:
    """Saves pieces of work in a folder, and gives back what is saved; without a folder it just has them done.

    Args:
        parent: where the folder is made, once there is something to save; None: nothing is saved.
        elsewhere: other such places, of earlier runs, the newest first.
        every: seconds between two times that it saves; 0: at every opportunity.
    """

    def __init__(self, parent: Path | None = None, elsewhere: Sequence[Path] = (), every: float = SAVE_EVERY) -> None:
        self._parent, self._elsewhere, self._every = parent, elsewhere, every
        self._clock, self._collective, self._device = StageTimer(), Collective(), torch.device("cpu")
        self._origin = ""
        self._folder: Path | None = None  # of the first rank, as long as it can be written
        self._made: list[Path] = []
        self._is_active = self._resumes = False
        self._reset()

    def _reset(self) -> None:
        self._begun = [_Begun("", self._clock.mark())]
        self._finished: dict[str, tuple[Any, TimeMark]] = {}  # and not written yet
        self._under_way: _UnderWay | None = None
        self._due = time.perf_counter() + self._every

    def begin(self, origin: Mapping[str, str], clock: StageTimer, collective: Collective, device: torch.device) -> None:
        """Looks for what an earlier process has saved of the same work. To be called on all ranks, with the same.

        Args:
            origin: hashes of all that the work depends on, by what it is called in messages.
            clock: the time of the work.
            collective: the ranks that do it; the first one reads and writes.
            device: where tensors go that were not on the CPU.
        """
        if self._parent is None:
            return
        self._clock, self._collective, self._device = clock, collective, device
        self._is_active = True
        self._reset()
        found = False
        if collective.rank == 0:
            self._origin = json.dumps(dict(origin), indent=2)
            self._folder = self._parent / f"{PREFIX}{hashlib.sha256(self._origin.encode()).hexdigest()[:16]}"
            self._made.append(self._folder)
            found = self._find(self._folder, origin)
        self._resumes = collective.any(found)
        if self._resumes:
            self._under_way = self._read_under_way()
            after = "" if self._under_way is None else f", after {self._under_way.now.elapsed:,.0f} s"
            clock.announce(f"Repair: goes on where it was stopped{after} ({self._folder}).")

    def piece(self, name: str, work: Callable[[Piece], Result], kinds: Collection[type] = ()) -> Result:
        """What a piece of work gives: from its file if it was finished before, else by doing it.

        Args:
            name: a word or two, for the name of the file.
            work: is given the piece, which may have been begun before. If it raises, nothing is kept of it.
            kinds: of the records in what it gives and leaves.
        """
        if not self._is_active:
            return work(Piece())
        with self._numbered(name) as own:
            found = self._read_finished(own.path, kinds) if self._resumes else None
            if found is not None:
                result: Result = found[0]
                self._clock.set(found[1])
                return result
            left = self._left(own, kinds)
            result = work(Piece(partial(self._at_seam, own), left))
            self._finish(own, result)
            return result

    @property
    def place(self) -> Path | None:
        """The folder, if there is something in it from which the work can go on."""
        return self._folder if self._folder is not None and self._folder.is_dir() else None

    def done(self) -> None:
        """Removes what was saved of this work: it is not needed any more."""
        for folder in self._made:
            shutil.rmtree(folder, ignore_errors=True)
        self._folder, self._made, self._is_active = None, [], False

    @contextmanager
    def _numbered(self, name: str) -> Iterator[_Begun]:
        outer = self._begun[-1]
        outer.n_inside += 1
        own = _Begun(f"{outer.path}{outer.n_inside}-{name.replace(' ', '-')}.", self._clock.mark())
        self._begun.append(own)
        try:
            yield own
        finally:
            self._begun.pop()

    def _left(self, own: _Begun, kinds: Collection[type]) -> Callable[[], Any] | None:
        """Sets the clock to when the piece was begun before; gives how to get what was left of it."""
        saved = self._under_way
        if saved is None or own.path not in saved.began:
            return None
        self._clock.set(saved.began[own.path])
        own.began = saved.began[own.path]
        if saved.path != own.path:
            return None

        def decode() -> tuple[Any]:
            first, *others = saved.states
            if not others or not self._collective.rank:
                return (from_bytes(first, kinds, self._device),)
            return (from_bytes(others[self._collective.rank - 1], kinds, self._device, like=first),)

        def left() -> Any:
            self._under_way = None
            found = self._decoded(UNDER_WAY, decode)
            if found is None:
                return None
            self._clock.set(saved.now)
            return found[0]

        return left

    def _at_seam(self, own: _Begun, state: Callable[[], Any], same: bool) -> None:
        due = own.has_seams and self._is_due()
        if same or self._collective.world_size == 1:
            if due:
                self._save(own, lambda: [to_bytes(state())])
        elif self._collective.any(due):
            began, states = time.perf_counter(), self._of_ranks(own, state)
            if due and states is not None:
                self._save(own, lambda: states, began)

    def _of_ranks(self, own: _Begun, state: Callable[[], Any]) -> list[bytes] | None:
        """What each rank has as bytes, of others than the first what differs from it; None where one cannot say it.

        To be called on all ranks. Most of it is the same: weights, optimizers, margins.
        """
        ranks = self._collective
        value = self._on_all_ranks(own, state)
        hashes = None if value is None else self._on_all_ranks(own, lambda: b"".join(tensor_hashes(value)))
        if hashes is None:
            return None
        first = ranks.first_bytes(hashes)
        like = [bytes(first[at : at + 32]) for at in range(0, len(first), 32)] if ranks.rank else []
        data = self._on_all_ranks(own, lambda: torch.frombuffer(bytearray(to_bytes(value, like)), dtype=torch.uint8))
        return None if data is None else [part.numpy().tobytes() for part in ranks.gather(data)]

    def _on_all_ranks(self, own: _Begun, work: Callable[[], Result]) -> Result | None:
        """What work gives, which is not None; None on all ranks where one cannot do it, and then less is saved."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if not self._collective.any(error is not None):
            return result
        if isinstance(error, UnsavableValueError):
            own.has_seams = False
        else:
            self._give_up(error or OtherRankError("another rank has nothing to save.", "look at its own error."))
        return None

    def _finish(self, own: _Begun, result: Any) -> None:
        for path in [path for path in self._finished if path.startswith(own.path)]:
            del self._finished[path]
        if self._folder is not None and not is_ending_early():
            self._finished[own.path] = (result, self._clock.mark())
        if self._is_due():
            self._save()

    def _is_due(self) -> bool:
        # What was ended early is not what would have come of it.
        return self._folder is not None and not is_ending_early() and time.perf_counter() >= self._due

    def _save(
        self, own: _Begun | None = None, states: Callable[[], Sequence[bytes]] | None = None, began: float | None = None
    ) -> None:
        """Writes what was finished and what is under way; what cannot be written costs a message."""
        assert self._folder is not None
        began = time.perf_counter() if began is None else began
        try:
            if not (self._folder / ORIGIN).exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                write_text(self._folder / ORIGIN, self._origin)
            for path in list(self._finished):
                self._write_finished(self._folder, path)
            if own is not None and states is not None:
                self._write_under_way(self._folder, own, states)
        except Exception as error:
            self._give_up(error)
        now = time.perf_counter()
        self._due = now + max(self._every, (now - began) / MAX_SHARE if self._every else 0.0)

    def _give_up(self, error: Exception) -> None:
        """Saves no more; on the first rank, with a message."""
        if self._folder is not None:
            problem = f"a repair cannot be saved while it works, in {self._folder} ({type(error).__name__}: {error})."
            warnings.warn(FilesWarning(problem, "make room; if it is stopped, it begins anew."), stacklevel=3)
            self._folder = None

    def _write_finished(self, folder: Path, path: str) -> None:
        result, mark = self._finished.pop(path)
        with suppress(UnsavableValueError):
            data = to_bytes((result, mark))
            replacing(folder / f"{path[:-1]}{FINISHED}", lambda part: part.write_bytes(data))
            for file in folder.glob(f"{path}*{FINISHED}"):
                if file.name != f"{path[:-1]}{FINISHED}":
                    file.unlink(missing_ok=True)

    def _write_under_way(self, folder: Path, own: _Begun, states: Callable[[], Sequence[bytes]]) -> None:
        try:
            contents = states()
        except UnsavableValueError:
            own.has_seams = False
            return
        began = {one.path: one.began for one in self._begun[1:]}
        head = to_bytes((own.path, began, self._clock.mark(), [len(content) for content in contents]))
        data = b"".join((len(head).to_bytes(8, "big"), head, *contents))
        replacing(folder / UNDER_WAY, lambda part: part.write_bytes(data))

    def _read_under_way(self) -> _UnderWay | None:
        data = memoryview(self._read(UNDER_WAY))
        if not data:
            return None

        def decode() -> _UnderWay:
            start = 8 + int.from_bytes(data[:8], "big")
            path, began, now, sizes = from_bytes(data[8:start], (TimeMark,))
            ends = [start + sum(sizes[:number]) for number in range(len(sizes) + 1)]
            return _UnderWay(path, began, now, [data[a:b] for a, b in pairwise(ends)])

        return self._decoded(UNDER_WAY, decode)

    def _read_finished(self, path: str, kinds: Collection[type]) -> tuple[Any, TimeMark] | None:
        name = f"{path[:-1]}{FINISHED}"
        data = self._read(name)
        if not data:
            return None

        def decode() -> tuple[Any, TimeMark]:
            result, mark = from_bytes(data, (*kinds, TimeMark), self._device)
            return result, mark

        return self._decoded(name, decode)

    def _decoded(self, name: str, decode: Callable[[], Result]) -> Result | None:
        """What a file holds; None on all ranks where one cannot read it, as for want of memory, which is warned of."""
        result, problem = None, ""
        try:
            result = decode()
        except DamagedValueError as error:
            problem = str(error)
        if not self._collective.any(bool(problem)):
            return result
        problem = self._collective.first_text(problem)
        if self._collective.rank == 0:
            message = f"{self._folder}: {name!r} is not used, {problem}."
            warnings.warn(FilesWarning(message, "that part of the repair is made once more."), stacklevel=2)
        return None

    def _read(self, name: str) -> Bytes:
        """A file of the first rank, the same on each; empty where there is none, or no memory for it."""
        data = b""
        if self._folder is not None:
            with suppress(OSError, MemoryError):
                data = (self._folder / name).read_bytes()
        return self._collective.first_bytes(data)

    def _find(self, folder: Path, origin: Mapping[str, str]) -> bool:
        """Whether there is saved work of this origin; that of an earlier run goes into the folder of this one."""
        for place in (folder, *(place / folder.name for place in self._elsewhere)):
            with suppress(OSError):
                if (place / ORIGIN).read_text(encoding="utf-8") == self._origin:
                    if place != folder:
                        # Should the earlier run be alive, it makes a new one.
                        shutil.rmtree(folder, ignore_errors=True)
                        folder.parent.mkdir(parents=True, exist_ok=True)
                        shutil.move(place, folder)
                    return True
        self._say_what_is_not_used(folder, origin)
        return False

    def _say_what_is_not_used(self, folder: Path, origin: Mapping[str, str]) -> None:
        """Of saved work of other origins, says of the newest how it differs."""
        places = dict.fromkeys((folder.parent, *self._elsewhere))
        with suppress(OSError, ValueError):
            others = [path for place in places for path in place.glob(f"{PREFIX}*/{ORIGIN}")]
            newest = max(others, key=lambda path: path.stat().st_mtime)
            other = dict(json.loads(newest.read_text(encoding="utf-8")))
            differ = " and ".join(name for name in origin if other.get(name) != origin[name])
            why = f"{newest.parent} is of one with other {differ}; delete it if it is of no use"
            self._clock.announce(f"Repair: begins anew, since {why}.")
