"""What a repair leaves on disk and on the screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich import get_console
from torch import Tensor

from lightning_nrl._lightning.packages import ModelCheckpoint, Trainer, rank_zero_warn
from lightning_nrl._lightning.private_parts import batch_limit, logged_hparams
from lightning_nrl._tracking import RepairLog, outcome, track
from lightning_nrl._trainer.run_folder import run_folder
from lightning_nrl._trainer.saved_files import AnyReport, SavedFiles
from lightning_nrl._utils.state import State
from lightning_nrl.errors import ConfigurationError, FilesWarning, LoggingWarning, check_kind
from lightning_nrl.patches import PATCH_NAME, safetensors_installed
from lightning_nrl.report import RepairReport
from lightning_nrl.report._formatting import from_here
from lightning_nrl.report.page import Shown
from lightning_nrl.report.sample_views import SampleView

REPORT_FILES = {"json": "report.json", "markdown": "report.md", "html": "report.html"}
REPAIRED_FILES = {"checkpoint": "repaired.ckpt", "patch": PATCH_NAME, **REPORT_FILES}


def base_folder(dirpath: str | Path | None, trainer: Trainer, name: str = "repair") -> Path:
    """The folder that the user named, or one of this name in the run's folder; refuses what is no local folder."""
    found = dirpath if dirpath is not None else run_folder(trainer)  # asks all ranks
    if "://" in str(found):
        raise ConfigurationError(
            f"`dirpath`: the files of a {name} cannot go to '{found}', which is no local folder.",
            "pass a local folder as `dirpath=`, and copy it where it should be.",
        )
    return Path(found) if dirpath is not None else Path(found) / name


def output_folder(dirpath: str | Path | None, trainer: Trainer, name: str = "repair") -> Path | None:
    """The folder for the files, made on the first rank, the same on all; None where it cannot be made.

    None in a `fast_dev_run` too, which writes no files. In the run's folder it is the next free of `name`, `name-1`,
    `name-2` ..., where an earlier one has left its report.
    """
    if batch_limit(trainer):
        return None
    folder, made = base_folder(dirpath, trainer, name), ""
    if trainer.is_global_zero:
        try:
            made = str(_made(folder if dirpath is not None else _next_free(folder)))
        except OSError as error:
            hint = "name another folder as `dirpath=`; what is in memory can still be saved."
            rank_zero_warn(FilesWarning(f"{folder} cannot be made ({error}): the {name} writes no files.", hint))
    made = trainer.strategy.broadcast(made)
    return Path(made) if made else None


def _next_free(folder: Path) -> Path:
    free, k = folder, 0
    while (free / "report.json").exists():
        k += 1
        free = folder.with_name(f"{folder.name}-{k}")
    return free


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parse_prefix(prefix: str, default: str) -> str:
    """What tags begin with, without a slash at the end."""
    fits = isinstance(prefix, str) and bool(prefix.strip("/"))
    check_kind("prefix", prefix, fits, "name", f"prefix={default!r}")
    return prefix.rstrip("/")


def report_files(
    dirpath: str | Path | None, trainer: Trainer, name: str, files: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """The paths of a report's files by kind, and the name that it has in logs; a patch needs safetensors.

    A second report in one log gets tags of its own, as it gets a folder of its own.
    """
    folder = output_folder(dirpath, trainer, name)
    if folder is None:
        return {}, name
    written = {kind: str(folder / file) for kind, file in files.items() if kind != "patch" or safetensors_installed()}
    return written, folder.name if dirpath is None else name


def write_report(
    report: AnyReport, views: Sequence[SampleView] = (), others: Mapping[str, Callable[[Path], object]] | None = None
) -> AnyReport:
    """Writes the report, and other files of it by kind, to the paths that it names; gives it with those that are there.

    Views are of samples, where these can be shown.
    """
    with SavedFiles(report.files) as files:
        for kind, write in (others or {}).items():
            files.write(kind, write)
        written = files.reports(report, views)
        files.commit()
        return files.tell(written)


def show(report: Shown) -> None:
    """Prints the report as tables."""
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
    """Logs and prints what is decided and saved; what goes wrong here is a warning.

    `changes` are what was added to each weight, whole tensors by name; tags begin with `name`.
    """
    try:
        if trainer.is_global_zero:
            log = RepairLog(report, trainer.global_step, name, changes, views, logged_hparams(trainer))
            track(log, trainer.loggers)
            if verbose:
                show(report)
                if text := _about_best(report, trainer):
                    print(text)
        trainer.callback_metrics.update(headline(report, name))
    except Exception as error:
        problem = f"the report was not shown ({type(error).__name__}: {error})."
        rank_zero_warn(LoggingWarning(problem, "the repair and its files are not affected; print `report`."))


def _about_best(report: RepairReport, trainer: Trainer) -> str:
    """What to know before `trainer.test()` is called without a model, in a line; empty where there is nothing."""
    checkpoint = trainer.checkpoint_callback
    best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
    path = report.files.get("checkpoint", "")
    if report.status != "repaired" or not best or best == path:
        return ""
    how = f"ckpt_path={from_here(path)!r}" if path else "the model as an argument"
    return f"`trainer.test()` tests the best checkpoint of the fit, as it was before the repair; the repair with {how}."


def headline(report: RepairReport, name: str) -> dict[str, Tensor]:
    """What `trainer.callback_metrics` gets, named as in the logs; it outlives processes that a strategy has started."""
    return {tag: torch.tensor(value) for tag, value in outcome(report, name).items()}
