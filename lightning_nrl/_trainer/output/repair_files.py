"""The files of a report: staged, checked, and moved to their folder together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_nrl._trainer.lightning.checkpoint_files import CheckpointWriter, writing_checkpoint
from lightning_nrl._trainer.lightning.packages import Trainer, rank_zero_info, rank_zero_warn
from lightning_nrl._utils.atomic_files import EARLIER, StagedFiles
from lightning_nrl._utils.checkpoint import REFUSED_OBJECT, damaged_part
from lightning_nrl._utils.state import State, current_state, hash_tensor, saved_names
from lightning_nrl.errors import (
    ConfigurationError,
    FilesWarning,
    UnwritableFolderError,
    first_line,
)
from lightning_nrl.methods.lora import WEIGHTS_FILE
from lightning_nrl.pipeline import PATCH_NAME, Patch
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SAMPLES_FOLDER, SampleView, write_sample_files

AnyReport = TypeVar("AnyReport", RepairReport, ReleaseReport)
REPORT_FILES = {"json": "report.json", "markdown": "report.md", "html": "report.html"}
REPAIRED_FILES = {"checkpoint": "repaired.ckpt", "patch": PATCH_NAME, **REPORT_FILES}
RELEASE_FILES = {**REPORT_FILES, "predictions": "predictions.csv"}
PAGE_KINDS = ("html", "markdown", "json")
"""Kinds of report files, in the order in which `commit` moves them, last of all files.

So if `report.json` exists, all other files exist.
"""
MARK = re.compile(
    rb'\*\*lightning_nrl\*\*: |<dt>lightning_nrl</dt>|"lightning_nrl": "'
    rb"|lightning_nrl\.(patch|adapter)|^# weights "
)
"""Text in a line of any file of this package; a checkpoint has the report among its callbacks."""
SAMPLE_NAME = re.compile(r".+-\d+\.(png|txt)")


def is_ours(path: Path) -> bool:
    """True if nothing, or a file or a folder of samples of this package, is at `path`."""
    if path.is_dir():
        names = [sample.name for sample in path.iterdir()]
        # File managers leave hidden files.
        is_sample = [name.startswith(".") or SAMPLE_NAME.fullmatch(name) for name in names]
        if all(is_sample) or _has_line(path / WEIGHTS_FILE, MARK):
            return True
    elif not path.exists() or _has_line(path, MARK):
        return True
    # The user's own plugin may write checkpoints without the mark.
    report = path.with_name(REPORT_FILES["json"])
    is_named = report.is_file() and _has_line(report, re.compile(re.escape(path.name.encode())))
    return path.suffix == ".ckpt" and is_named and is_ours(report)


def _has_line(path: Path, pattern: re.Pattern[bytes]) -> bool:
    # A checkpoint may be larger than the memory; its mark is near the start.
    with suppress(OSError), path.open("rb") as lines:
        return any(pattern.search(line) for line in lines)
    return False


def foreign_file(folder: Path, names: Iterable[str] = REPORT_FILES.values()) -> str:
    """Returns the path of a file of the user at one of `names` or at the samples, or nothing."""
    paths = [folder / name for name in (*names, SAMPLES_FOLDER)]
    return next((str(path) for path in paths if not is_ours(path)), "")


def refuse_foreign(path: str, argument: str) -> None:
    """Raises a `ConfigurationError` if there is a path of a `foreign_file`."""
    if path:
        raise ConfigurationError(
            f"`{argument}`: {path} is no file of this package, and a new file would replace it.",
            f"move it, or name another folder as `{argument}`.",
        )


class SavedFiles(AbstractContextManager["SavedFiles"]):
    """Files of one report, which the first rank stages in a hidden folder before `commit`.

    `files` maps the kind of a file, such as `checkpoint`, to its path. `names` are names of files
    that an earlier run may have left in the same folder. If this report has no file of that name,
    `commit` puts `earlier-` before the name.
    """

    def __init__(
        self, files: Mapping[str, str], trainer: Trainer | None = None, names: Sequence[str] = ()
    ) -> None:
        self._files = {kind: Path(path) for kind, path in files.items()}
        self._trainer = trainer
        self._problems: dict[str, Exception] = {}  # reasons for missing files, by kind
        self._direct: set[str] = set()  # kinds that the user's own plugin writes in place
        self._stage: StagedFiles | None = None
        if files and (trainer is None or trainer.is_global_zero):
            # Pictures of an earlier run do not belong to this report.
            marks = [SAMPLES_FOLDER]
            marks += [self._files[kind].name for kind in PAGE_KINDS if kind in self._files]
            own_names = [path.name for path in self._files.values()]
            earlier_names = [name for name in names if is_ours(self._folder / name)]
            self._stage = StagedFiles(self._folder, [*own_names, *earlier_names], marks, is_ours)

    @property
    def _folder(self) -> Path:
        return next(iter(self._files.values())).parent

    def __exit__(self, *error: object) -> None:
        if self._stage is not None:
            self._stage.__exit__(*error)

    def write(self, kind: str, write: Callable[[Path], object]) -> None:
        if self._stage is not None and kind in self._files:
            with self._record_problem(kind):
                self._stage.write(self._files[kind].name, write)

    @contextmanager
    def _record_problem(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._problems[kind] = error

    def patch(self, report: RepairReport, model: nn.Module, parameters: State) -> None:
        """Stages the patch that changes the current weights of the model to `parameters`."""

        def write(path: Path) -> None:
            old = model.state_dict()
            new = dict(old)
            for key, name in saved_names(model).items():
                if name in parameters:
                    new[key] = parameters[name]
            Patch.between(old, new, report).save(path)

        self.write("patch", write)

    def checkpoint(self, model: nn.Module, parameters: State) -> None:
        """Stages the trainer's checkpoint, and checks that it holds `parameters`.

        All ranks must call it.
        """
        path = self._files.get("checkpoint")
        if self._trainer is None or path is None:
            return
        with writing_checkpoint(self._trainer) as writer:
            if not writer.is_plain:
                self._direct.add("checkpoint")
            elif self._stage is not None:
                try:
                    path = self._stage.place(path.name)
                except OSError as error:
                    writer.error = error
            self._trainer.save_checkpoint(path, weights_only=False)
        check = partial(_check_checkpoint, writer, model, parameters)
        if writer.is_plain:
            self.write("checkpoint", check)
        elif self._stage is not None:
            with self._record_problem("checkpoint"):
                check(None)

    def reports(
        self, report: AnyReport, views: Sequence[SampleView] = (), changes: State | None = None
    ) -> AnyReport:
        """Stages a report as Markdown, HTML and JSON; returns it with the paths of all files."""
        self._write_text("markdown", lambda: self._named(report).to_markdown())
        self._write_text("html", lambda: self._named(report).to_html(views, changes))
        self._write_text("json", lambda: self._named(report).to_json())
        if self._stage is not None and views and self._stage.is_written(self._files["json"].name):
            self._files["samples"] = self._stage.folder / SAMPLES_FOLDER
            self.write("samples", lambda path: write_sample_files(path.parent, views))
        return self._named(report)

    def _write_text(self, kind: str, text: Callable[[], str]) -> None:
        self.write(kind, lambda path: path.write_text(text(), encoding="utf-8"))

    def commit(self) -> None:
        """Moves all staged files to their folder; notes failures for `warn_missing`."""
        if self._stage is None:
            return
        written = self._direct - self._problems.keys()
        try:
            earlier = self._stage.commit({self._files[kind].name for kind in written})
        except OSError as error:
            for kind, path in self._files.items():
                if path.name not in self._stage.placed and kind not in self._direct:
                    self._problems.setdefault(kind, error)
            return
        for path in earlier:
            name = path.name.removeprefix(EARLIER)
            rank_zero_info(f"{path} was kept from before; its name was {name}.")

    def warn_missing(self, report: AnyReport, accepted: bool = False) -> AnyReport:
        """Warns of missing files; returns, on every rank, the report with existing files only.

        With `accepted`, the warning says that the model has the repaired weights.
        """
        if missing := self._missing():
            state = "the result is not affected"
            if accepted:
                state = "the repair was accepted and is in the model"
            hint = "make room, and write the report with `report.to_json()`."
            if isinstance(self._problems.get("checkpoint"), _OtherWeightsError):
                hint = (
                    "look at what `on_save_checkpoint` of the module does; "
                    "the patch has the change."
                )
            elif accepted and "checkpoint" in self._problems:
                hint = "make room, and save the model now: `trainer.save_checkpoint(path)`."
            rank_zero_warn(FilesWarning(f"{state}, but {self._folder} lacks {missing}.", hint))
        kinds = list(self._named(report).files)
        if self._trainer is not None and self._files:
            kinds = self._trainer.strategy.broadcast(kinds)
        files = {kind: path for kind, path in report.files.items() if kind in kinds}
        return replace(report, files=files)

    def refuse_missing(self, argument: str) -> None:
        """Raises an `UnwritableFolderError` that names the folder's argument."""
        if missing := self._missing():
            raise UnwritableFolderError(
                f"`{argument}`: not written in {self._folder}: {missing}.",
                f"make room, or name another folder as `{argument}`.",
            )

    def _missing(self) -> str:
        return "; ".join(
            f"`{self._files[kind].name}` ({short_message(error)})"
            for kind, error in self._problems.items()
        )

    def _named(self, report: AnyReport) -> AnyReport:
        files = {kind: path for kind, path in report.files.items() if kind not in self._problems}
        return replace(report, files=files)


class _OtherWeightsError(OSError):
    """The checkpoint would not hold the weights that were judged."""


def _check_checkpoint(
    writer: CheckpointWriter, model: nn.Module, parameters: State, path: Path | None
) -> None:
    if writer.error is not None:
        raise writer.error
    if path is not None and not path.exists():
        raise OSError("nothing was written")
    if difference := _difference(_read_back(writer, path), model, parameters):
        raise _OtherWeightsError(f"it would not hold {difference}")


def _read_back(writer: CheckpointWriter, path: Path | None) -> Mapping[str, Any]:
    # A file of another format, or with objects, is not loaded; the state dict given to the writer
    # is returned instead.
    if path is None:
        return writer.state_dict
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return cast(Mapping[str, Any], checkpoint["state_dict"])
    except Exception as error:
        if not REFUSED_OBJECT.search(str(error)):
            raise
        if part := damaged_part(path):
            raise OSError(f"{part} in it is damaged") from error
        return writer.state_dict


def _difference(state: Mapping[str, Any], model: nn.Module, parameters: State) -> str:
    """Describes the first tensor in a saved state dict that is not as judged, if any."""
    names = saved_names(model)
    judged = {**current_state(model), **parameters}
    hashes = {key: hash_tensor(x) for key, x in state.items() if isinstance(x, Tensor)}
    for key, digest in hashes.items():
        if key in names and digest != hash_tensor(judged[names[key]]):
            return f"the weights that were judged: {names[key]!r} differs"
    named = {names.get(key) for key in hashes}
    for name in parameters:
        # The module may save a tensor under a name of its own.
        if name not in named and hash_tensor(judged[name]) not in hashes.values():
            return f"the repaired {name!r}"
    return ""


def short_message(error: Exception) -> str:
    """Returns the first line of an error, with its class unless this package has raised it."""
    if isinstance(error, OSError) and error.errno is None:
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


def write_report(
    report: AnyReport, argument: str, predictions: Callable[[Path], object] | None = None
) -> AnyReport:
    """Writes a report, and predictions by a function; returns it with the paths of the files.

    Raises an `UnwritableFolderError` that names the folder's `argument` if a file is missing.
    """
    with SavedFiles(report.files) as files:
        if predictions is not None:
            files.write("predictions", predictions)
        written = files.reports(report)
        files.commit()
        files.refuse_missing(argument)
        return written
