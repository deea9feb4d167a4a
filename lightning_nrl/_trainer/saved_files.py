"""The files of a repair, put on disk together: what cannot be written costs a message, never the repair."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_nrl._lightning.checkpoint_files import CheckpointWriter, writing_checkpoint
from lightning_nrl._lightning.packages import Trainer, rank_zero_info, rank_zero_warn
from lightning_nrl._utils.checkpoint import REFUSED_OBJECT
from lightning_nrl._utils.hashing import hash_tensors
from lightning_nrl._utils.state import State, current_state, saved_names
from lightning_nrl._utils.whole_files import StagedFiles
from lightning_nrl.errors import FilesWarning
from lightning_nrl.patches import Patch
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SAMPLES_FOLDER, SampleView, write_sample_files

AnyReport = TypeVar("AnyReport", RepairReport, ReleaseReport)
MARKS = ("html", "markdown", "json")
"""Reports, in the order in which they are put in their places, after pictures: where `report.json` is, all is."""

NOT_JUDGED = "it would not hold"


class SavedFiles(AbstractContextManager["SavedFiles"]):
    """Files of one report, by kind, written beside their places; `commit` puts them there.

    The first rank writes; the others take part in what a trainer does together.

    Args:
        files: paths by kind, all in one folder; none at all writes nothing.
        trainer: the trainer; None: there is one process.
        names: what else a run may have left there, which must not stay as if it were of this one.
    """

    def __init__(self, files: Mapping[str, str], trainer: Trainer | None = None, names: Sequence[str] = ()) -> None:
        self._files = {kind: Path(path) for kind, path in files.items()}
        self._trainer = trainer
        self._writes = bool(files) and (trainer is None or trainer.is_global_zero)
        self._problems: dict[str, str] = {}
        self._direct: set[str] = set()  # kinds that are written to their place by a plugin of the user's
        self._names = names
        self._stage: StagedFiles | None = None

    def __enter__(self) -> Self:
        if self._writes:
            # Pictures of an earlier run must not stay beside this report.
            marks = [SAMPLES_FOLDER, *(self._files[kind].name for kind in MARKS if kind in self._files)]
            others = dict.fromkeys((*(path.name for path in self._files.values()), *self._names))
            names = [*(name for name in others if name not in marks), *marks]
            self._stage = StagedFiles(next(iter(self._files.values())).parent, names, marks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stage is not None:
            self._stage.__exit__(kind, error, traceback)

    @property
    def problems(self) -> Mapping[str, str]:
        """Why files are not there, by kind."""
        return self._problems

    def write(self, kind: str, write: Callable[[Path], object]) -> None:
        """Has one file written, if there is to be one of this kind."""
        if self._stage is None or kind not in self._files:
            return
        try:
            self._stage.write(self._files[kind].name, write)
        except Exception as error:
            self._problems[kind] = _short(error)

    def patch(self, report: RepairReport, model: nn.Module, parameters: State) -> None:
        """The change from the model as it is to one with these parameters."""

        def write(path: Path) -> None:
            old = model.state_dict()
            new = {key: parameters[name] for key, name in saved_names(model).items() if name in parameters}
            Patch.between(old, {**old, **new}, report).save(path)

        self.write("patch", write)

    def checkpoint(self, report: RepairReport, model: nn.Module, parameters: State) -> None:
        """The trainer's checkpoint, read back: what is in it has to be what was judged. To be called by all ranks."""
        trainer, path = self._trainer, self._files.get("checkpoint")
        if trainer is None or path is None:
            return
        with writing_checkpoint(trainer) as writer:
            place = path
            if not writer.is_plain:
                self._direct.add("checkpoint")
            elif self._stage is not None:
                try:
                    place = self._stage.place(path.name)
                except OSError as error:
                    writer.error = error
            trainer.save_checkpoint(place, weights_only=False)

        def check(place: Path) -> None:
            problem = _problem_of(writer, place, report, model, parameters)
            if problem:
                raise OSError(problem)

        if self._writes and writer.is_plain:
            self.write("checkpoint", check)
        elif self._writes:
            problem = _problem_of(writer, None, report, model, parameters)
            self._problems |= {"checkpoint": problem} if problem else {}

    def reports(self, report: AnyReport, views: Sequence[SampleView] = (), changes: State | None = None) -> AnyReport:
        """The pages and the JSON of a report, which then names the files that could be written."""
        written = self._named(report)
        self.write("markdown", lambda path: path.write_text(written.to_markdown(), encoding="utf-8"))
        self.write("html", lambda path: path.write_text(written.to_html(views, changes), encoding="utf-8"))
        written = self._named(report)
        self.write("json", lambda path: path.write_text(written.to_json(), encoding="utf-8"))
        if self._stage is not None and views and self._is_written("json"):
            try:
                self._stage.write(SAMPLES_FOLDER, lambda path: write_sample_files(path.parent, views))
            except Exception as error:
                self._problems["samples"] = _short(error)
        return self._named(report)

    def commit(self) -> None:
        """Puts all that was written in its place; what cannot be put there is a message, see `tell`."""
        if self._stage is None:
            return
        try:
            kept = self._stage.commit({self._files[kind].name for kind in self._direct - self._problems.keys()})
        except OSError as error:
            for kind, path in self._files.items():
                if path.name not in self._stage.placed and kind not in self._direct:
                    self._problems.setdefault(kind, _short(error))
            return
        for path in kept:
            rank_zero_info(f"{path} is of an earlier run; it was {path.name.removeprefix('earlier-')}.")

    def tell(self, report: AnyReport, accepted: bool = False) -> AnyReport:
        """Warns of files that are not there; gives the report with the files that are, the same on all ranks."""
        if self._problems:
            folder = next(iter(self._files.values())).parent
            names = {"samples": SAMPLES_FOLDER, **{kind: path.name for kind, path in self._files.items()}}
            missing = "; ".join(f"`{names[kind]}` ({why})" for kind, why in self._problems.items())
            what = "the repair was accepted and is in the model" if accepted else "the result is not affected"
            hint = "make room, and write the report with `report.to_json()`"
            if NOT_JUDGED in self._problems.get("checkpoint", ""):
                hint = "look at what `on_save_checkpoint` of the module does; the patch has the change"
            elif accepted and "checkpoint" in self._problems:
                hint = "make room, and save the model now: `trainer.save_checkpoint(path)`"
            rank_zero_warn(FilesWarning(f"{what}, but {folder} lacks {missing}.", f"{hint}."))
        left = list(self._named(report).files)
        if self._trainer is not None and self._files:
            left = self._trainer.strategy.broadcast(left)
        return replace(report, files={kind: path for kind, path in report.files.items() if kind in left})

    def _is_written(self, kind: str) -> bool:
        return self._stage is not None and kind in self._files and self._stage.is_written(self._files[kind].name)

    def _named(self, report: AnyReport) -> AnyReport:
        files = {kind: path for kind, path in report.files.items() if kind not in self._problems}
        return replace(report, files=files)


def _problem_of(
    writer: CheckpointWriter, path: Path | None, report: RepairReport, model: nn.Module, parameters: State
) -> str:
    """Why a checkpoint is not what was judged, in words; empty if it is."""
    if writer.error is not None:
        return _short(writer.error)
    if path is not None and not path.exists():
        return "nothing was written"
    return _difference(_read_back(writer, path), report, model, parameters)


def _read_back(writer: CheckpointWriter, path: Path | None) -> Mapping[str, Any]:
    """The state dict in a checkpoint; where it holds objects too, or is of another format, as it was to be written."""
    given: Mapping[str, Any] = writer.state_dict if isinstance(writer.state_dict, Mapping) else {}
    if path is None:
        return given
    try:
        found: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        return found
    except Exception as error:
        if not REFUSED_OBJECT.search(str(error)):
            raise
        # Objects are not read here. That the file is whole is known without.
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken is not None:
            raise OSError(f"{broken} in it is damaged") from error
        return given


def _difference(found: Mapping[str, Any], report: RepairReport, model: nn.Module, parameters: State) -> str:
    """Which tensors of a state dict are not those that were judged, in words; empty if none is.

    A module may leave out or rename what it saves, but what was repaired has to be there under some name.
    """
    names, live = saved_names(model), current_state(model)
    own = {names[key]: value for key, value in found.items() if key in names and isinstance(value, Tensor)}
    if report.hashes is not None and hash_tensors(own) == report.hashes.model_after:
        return ""
    judged = {**live, **parameters}
    wrong = [name for name, value in own.items() if not _is_same(value, judged[name])]
    others = [value for key, value in found.items() if key not in names and isinstance(value, Tensor)]
    lost = [
        name for name in parameters if name not in own and not any(_is_same(value, judged[name]) for value in others)
    ]
    if lost:
        return f"{NOT_JUDGED} the repaired {lost[0]!r}"
    if not wrong:
        return ""
    name = wrong[0]
    kinds = (own[name].dtype, judged[name].dtype)
    how = f"is {kinds[0]}, not {kinds[1]}" if kinds[0] != kinds[1] else "has other values"
    more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
    return f"{NOT_JUDGED} the weights that were judged: {name!r} {how}{more}"


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and hash_tensors({"": a}) == hash_tensors({"": b})


def _short(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, OSError) and error.errno is None else f"{type(error).__name__}: {text}"
