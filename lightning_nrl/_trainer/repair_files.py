"""Files, folders and printed report of a repair."""

from __future__ import annotations

import os
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from uuid import uuid4

import torch
from rich import get_console
from torch import Tensor, nn
from typing_extensions import Self

from lightning_nrl._trainer.lightning.checkpoint_files import CheckpointWriter, writing_checkpoint
from lightning_nrl._trainer.lightning.packages import (
    ModelCheckpoint,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import batch_limit, logged_hparams
from lightning_nrl._trainer.tracking.loggers import track
from lightning_nrl._trainer.tracking.repair_log import RepairLog, next_free
from lightning_nrl._trainer.tracking.scalars import outcome
from lightning_nrl._utils.atomic_files import StagedFiles, remove_stale, write_text
from lightning_nrl._utils.checkpoint import REFUSED_OBJECT
from lightning_nrl._utils.formatting import relative_to_cwd
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import State, current_state, hash_tensors, saved_names
from lightning_nrl.errors import (
    ConfigurationError,
    FilesWarning,
    LoggingWarning,
    UnwritableFolderError,
)
from lightning_nrl.pipeline import PATCH_NAME, Patch
from lightning_nrl.report import RepairReport
from lightning_nrl.report.page import Renderable
from lightning_nrl.report.sample_views import SAMPLES_FOLDER, SampleView, write_sample_files
from lightning_nrl.updates import ReleaseReport

AnyReport = TypeVar("AnyReport", RepairReport, ReleaseReport)
PAGE_KINDS = ("html", "markdown", "json")
"""Kinds of report files. `commit` moves them last, in this order. So if `report.json` exists, all
other files exist.
"""

NOT_JUDGED = "it would not hold"
FILE_PREFIX = "lightning_nrl-"


class SavedFiles(AbstractContextManager["SavedFiles"]):
    """Files of one report. The first rank writes (stages) them in a hidden folder; `commit` moves
    them
    to their paths.

    `files` maps the kind of a file, such as `checkpoint`, to its path. `names` are names of files
    that an earlier run may have left in the same folder. If this report has no file of that name,
    `commit` puts `earlier-` before the name.
    """

    def __init__(
        self, files: Mapping[str, str], trainer: Trainer | None = None, names: Sequence[str] = ()
    ) -> None:
        self._files = {kind: Path(path) for kind, path in files.items()}
        self._trainer = trainer
        self._problems: dict[str, str] = {}  # reasons for missing files, by kind
        self._direct: set[str] = set()  # kinds that the user's own plugin writes in place
        self._stage: StagedFiles | None = None
        if files and (trainer is None or trainer.is_global_zero):
            # Pictures of an earlier run do not belong to this report.
            marks = [
                SAMPLES_FOLDER,
                *(self._files[kind].name for kind in PAGE_KINDS if kind in self._files),
            ]
            others = dict.fromkeys((*(path.name for path in self._files.values()), *names))
            all_names = [*(name for name in others if name not in marks), *marks]
            self._stage = StagedFiles(next(iter(self._files.values())).parent, all_names, marks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stage is not None:
            self._stage.__exit__(kind, error, traceback)

    def write(self, kind: str, write: Callable[[Path], object]) -> None:
        if self._stage is not None and kind in self._files:
            with self._record_problem(kind):
                self._stage.write(self._files[kind].name, write)

    @contextmanager
    def _record_problem(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._problems[kind] = _short(error)

    def patch(self, report: RepairReport, model: nn.Module, parameters: State) -> None:
        """Stages the patch that changes the current weights of the model to `parameters`."""

        def write(path: Path) -> None:
            old = model.state_dict()
            new = {
                key: parameters[name]
                for key, name in saved_names(model).items()
                if name in parameters
            }
            Patch.between(old, {**old, **new}, report).save(path)

        self.write("patch", write)

    def checkpoint(self, report: RepairReport, model: nn.Module, parameters: State) -> None:
        """Stages the trainer's checkpoint, and checks that it holds `parameters`. All ranks must
        call it.
        """
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

        check = partial(_check_checkpoint, writer, report, model, parameters)
        if writer.is_plain:
            self.write("checkpoint", check)
        elif self._stage is not None:
            with self._record_problem("checkpoint"):
                check(None)

    def reports(
        self, report: AnyReport, views: Sequence[SampleView] = (), changes: State | None = None
    ) -> AnyReport:
        """Stages a report as Markdown, HTML and JSON; returns the report with the paths of all
        files written so far.
        """
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
        try:
            kept = self._stage.commit(
                {self._files[kind].name for kind in self._direct - self._problems.keys()}
            )
        except OSError as error:
            for kind, path in self._files.items():
                if path.name not in self._stage.placed and kind not in self._direct:
                    self._problems.setdefault(kind, _short(error))
            return
        for path in kept:
            rank_zero_info(
                f"{path} is of an earlier run; its name was {path.name.removeprefix('earlier-')}."
            )

    def warn_missing(self, report: AnyReport, accepted: bool = False) -> AnyReport:
        """Warns of missing files. Returns, on every rank, the report with the paths of the existing
        files only.

        With `accepted`, the warning says that the model has the repaired weights.
        """
        if self._problems:
            folder = next(iter(self._files.values())).parent
            missing = "; ".join(
                f"`{self._files[kind].name}` ({why})" for kind, why in self._problems.items()
            )
            what = (
                "the repair was accepted and is in the model"
                if accepted
                else "the result is not affected"
            )
            hint = "make room, and write the report with `report.to_json()`"
            if NOT_JUDGED in self._problems.get("checkpoint", ""):
                hint = (
                    "look at what `on_save_checkpoint` of the module does; the patch has the change"
                )
            elif accepted and "checkpoint" in self._problems:
                hint = "make room, and save the model now: `trainer.save_checkpoint(path)`"
            rank_zero_warn(FilesWarning(f"{what}, but {folder} lacks {missing}.", f"{hint}."))
        left = list(self._named(report).files)
        if self._trainer is not None and self._files:
            left = self._trainer.strategy.broadcast(left)
        return replace(
            report, files={kind: path for kind, path in report.files.items() if kind in left}
        )

    def _named(self, report: AnyReport) -> AnyReport:
        files = {kind: path for kind, path in report.files.items() if kind not in self._problems}
        return replace(report, files=files)


def _check_checkpoint(
    writer: CheckpointWriter,
    report: RepairReport,
    model: nn.Module,
    parameters: State,
    path: Path | None,
) -> None:
    if writer.error is not None:
        raise writer.error
    if path is not None and not path.exists():
        raise OSError("nothing was written")
    if difference := _difference(_read_back(writer, path), report, model, parameters):
        raise OSError(difference)


def _read_back(writer: CheckpointWriter, path: Path | None) -> Mapping[str, Any]:
    # A file of another format, or with objects, is not loaded; the state dict given to the writer
    # is returned instead.
    given: Mapping[str, Any] = writer.state_dict if isinstance(writer.state_dict, Mapping) else {}
    if path is None:
        return given
    try:
        found: Mapping[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )["state_dict"]
        return found
    except Exception as error:
        if not REFUSED_OBJECT.search(str(error)):
            raise
        # Check the file without loading its objects.
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken is not None:
            raise OSError(f"{broken} in it is damaged") from error
        return given


def _difference(
    found: Mapping[str, Any], report: RepairReport, model: nn.Module, parameters: State
) -> str:
    names, judged = saved_names(model), {**current_state(model), **parameters}
    own = {
        names[key]: value
        for key, value in found.items()
        if key in names and isinstance(value, Tensor)
    }
    if report.hashes is not None and hash_tensors(own) == report.hashes.model_after:
        return ""
    wrong = [name for name, value in own.items() if not _is_same(value, judged[name])]
    others = [
        value for key, value in found.items() if key not in names and isinstance(value, Tensor)
    ]
    lost = [
        name
        for name in parameters
        if name not in own and not any(_is_same(value, judged[name]) for value in others)
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
    return (
        a.dtype == b.dtype and a.shape == b.shape and hash_tensors({"": a}) == hash_tensors({"": b})
    )


def _short(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return (
        text
        if isinstance(error, OSError) and error.errno is None
        else f"{type(error).__name__}: {text}"
    )


class ResultBox:
    """Box in which a process of a strategy such as `ddp_spawn` leaves a text for the process that
    made the box.
    """

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


REPORT_FILES = {"json": "report.json", "markdown": "report.md", "html": "report.html"}
REPAIRED_FILES = {"checkpoint": "repaired.ckpt", "patch": PATCH_NAME, **REPORT_FILES}


def base_folder(dirpath: str | Path | None, trainer: Trainer, name: str = "repair") -> Path:
    """Returns `dirpath`, or by default the folder `name` in the log folder of the run. All ranks
    must
    call it.

    The log folder is the folder of the first logger, or `default_root_dir` without loggers. W&B and
    MLflow share one `save_dir` among all runs, so their log folder is
    `<save_dir>/<logger.name>/<logger.version>`.
    """
    found: Any = dirpath
    if found is None:
        found = trainer.default_root_dir
        for logger in trainer.loggers[:1]:
            try:
                own = getattr(logger, "log_dir", None)
                if own is None:
                    version = (
                        f"version_{logger.version}"
                        if isinstance(logger.version, int)
                        else logger.version
                    )
                    parts = [str(part) for part in (logger.name, version) if part is not None]
                    own = os.path.join(logger.save_dir or found, *parts)
            except Exception as error:  # such as a store that MLflow cannot open
                own = found
                problem = f"{type(logger).__name__} has no folder ({_short(error)}); the files are written below {own}."
                rank_zero_warn(
                    LoggingWarning(problem, "set `dirpath=`, or check the logger's settings.")
                )
            found = trainer.strategy.broadcast(str(own))
    if "://" in str(found):
        problem = (
            f"`dirpath`: the files of a {name} cannot go to '{found}', which is no local folder."
        )
        raise ConfigurationError(
            problem, "pass a local folder as `dirpath=`, and copy it where it should be."
        )
    return Path(found) if dirpath is not None else Path(found) / name


def check_folder(dirpath: str | Path | None, trainer: Trainer, name: str = "repair") -> None:
    """Refuses a folder (see `base_folder`) that cannot be written to. All ranks must call it,
    before any work.
    """
    folder = base_folder(dirpath, trainer, name)
    place = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path)
    )
    fits = bool(batch_limit(trainer)) or (place.is_dir() and os.access(place, os.W_OK | os.X_OK))
    if not trainer.strategy.broadcast(fits):
        problem = f"`dirpath`: {folder} cannot be written to; the obstacle is {place}."
        raise UnwritableFolderError(problem, "name another folder as `dirpath=`.")


def report_files(
    dirpath: str | Path | None, trainer: Trainer, name: str, files: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Returns the paths of a report's files by kind, and the name of the report in logs. All ranks
    must call it.

    Without `dirpath`, the folder is the first of `name`, `name-1`, ... in the log folder that has
    no report, and the name in logs is the name of the folder. In a `fast_dev_run`, no paths are
    returned, since nothing is written.
    """
    if batch_limit(trainer):
        return {}, name
    place = base_folder(dirpath, trainer, name)
    if trainer.is_global_zero:
        with suppress(OSError):  # `SavedFiles` reports it
            place = place if dirpath is not None else next_free(place, "report.json")
            place.mkdir(parents=True, exist_ok=True)
    made = trainer.strategy.broadcast(str(place))
    return {kind: str(Path(made) / file) for kind, file in files.items()}, Path(
        made
    ).name if dirpath is None else name


def write_report(
    report: AnyReport,
    views: Sequence[SampleView] = (),
    others: Mapping[str, Callable[[Path], object]] | None = None,
) -> AnyReport:
    """Writes a report, and each file in `others` by its function. Returns the report with the paths
    of these files.
    """
    with SavedFiles(report.files) as files:
        for kind, write in (others or {}).items():
            files.write(kind, write)
        written = files.reports(report, views)
        files.commit()
        return files.warn_missing(written)


def show(report: Renderable) -> None:
    get_console().print(report.to_table())


def announce(
    report: RepairReport,
    trainer: Trainer,
    name: str,
    *,
    changes: State | None,
    verbose: bool,
    views: Sequence[SampleView] = (),
) -> None:
    """Logs a saved repair, with tags that begin with `name`, and prints it if `verbose`. Errors
    become warnings.
    """
    try:
        if trainer.is_global_zero:
            log = RepairLog(
                report, trainer.global_step, name, changes, views, logged_hparams(trainer)
            )
            track(log, trainer.loggers)
            if verbose:
                show(report)
                if text := _about_best(report, trainer):
                    print(text)
        # Lightning passes on tensors, but no numbers, from processes that a strategy has started.
        numbers = {tag: torch.tensor(value) for tag, value in outcome(report, name).items()}
        trainer.callback_metrics.update(numbers)
    except Exception as error:
        problem = f"the report was not shown ({type(error).__name__}: {error})."
        rank_zero_warn(
            LoggingWarning(problem, "the repair and its files are not affected; print `report`.")
        )


def _about_best(report: RepairReport, trainer: Trainer) -> str:
    checkpoint = trainer.checkpoint_callback
    best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
    path = report.files.get("checkpoint", "")
    if report.status != "repaired" or not best or best == path:
        return ""
    how = f"ckpt_path={relative_to_cwd(path)!r}" if path else "the model as an argument"
    return f"`trainer.test()` tests the best checkpoint, from before the repair; to test the repair, give {how}."


def resume_store(
    dirpath: str | Path | None, trainer: Trainer, every: float | None, name: str = "repair"
) -> ResumeStore:
    """Returns a store for results of steps of `every` seconds or more (None: no results). All ranks
    must call it.
    """
    if every is None or batch_limit(trainer):
        return ResumeStore()
    parent = base_folder(dirpath, trainer, name)
    earlier: list[Path] = []
    if dirpath is None and trainer.loggers and trainer.is_global_zero:
        with suppress(OSError):
            others = [
                path for path in parent.parent.parent.glob(f"*/{parent.name}") if path != parent
            ]
            earlier = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    return ResumeStore(parent, earlier, every)
