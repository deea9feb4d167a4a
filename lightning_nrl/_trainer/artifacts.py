"""What a repair leaves on disk and on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_nrl._lightning import Trainer, batch_limit, logged_hparams
from lightning_nrl._tracking import RepairLog, outcome, track
from lightning_nrl._trainer.run_folder import run_folder
from lightning_nrl._utils.state import State, saved_names
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.patches import PATCH_NAME, Patch, safetensors_installed
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report import RepairReport
from lightning_nrl.report.page import Shown
from lightning_nrl.report.sample_files import write_sample_files
from lightning_nrl.report.sample_views import SampleView

__all__ = [
    "REPAIRED_FILES",
    "REPORT_FILES",
    "base_folder",
    "output_folder",
    "parse_prefix",
    "publish",
    "report_files",
    "show",
    "write_patch_file",
    "write_report",
]

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
    """The folder for the files, made on the first rank, the same on all; None in a `fast_dev_run`, which writes none.

    In the run's folder it is the next free of `name`, `name-1`, `name-2` ..., where an earlier one has left its report.
    """
    if batch_limit(trainer):
        return None
    folder = base_folder(dirpath, trainer, name)
    if trainer.is_global_zero:
        free, k = folder, 0
        while dirpath is None and (free / "report.json").exists():
            k += 1
            free = folder.with_name(f"{folder.name}-{k}")
        folder = free
        folder.mkdir(parents=True, exist_ok=True)
    return Path(trainer.strategy.broadcast(str(folder)))


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


def write_report(report: RepairReport | ReleaseReport, views: Sequence[SampleView] = ()) -> None:
    """Writes the report to the files that it names, and views of samples beside it."""
    for kind, text in (
        ("json", report.to_json),
        ("markdown", report.to_markdown),
        ("html", partial(report.to_html, views)),
    ):
        if kind in report.files:
            Path(report.files[kind]).write_text(text(), encoding="utf-8")
    if "json" in report.files and isinstance(report, RepairReport):
        write_sample_files(Path(report.files["json"]).parent, views)


def write_patch_file(report: RepairReport, trainer: Trainer, model: nn.Module, parameters: State) -> None:
    """Writes the change from the model as it is to one with these parameters, if the report names a file for it."""
    if "patch" in report.files and trainer.is_global_zero:
        old = model.state_dict()
        new = {key: parameters[name] for key, name in saved_names(model).items() if name in parameters}
        Patch.between(old, {**old, **new}, report).save(report.files["patch"])


def show(report: Shown) -> None:
    """Prints the report: as a rich table where rich is installed, else as plain text."""
    try:
        from rich import get_console
    except ImportError:
        print(report.render())
    else:
        get_console().print(report.to_table())


def publish(
    report: RepairReport,
    trainer: Trainer,
    name: str,
    *,
    changes: State | None,
    verbose: bool,
    views: Sequence[SampleView] = (),
) -> None:
    """Saves the checkpoint, writes the files, logs and prints.

    `changes` are what was added to each weight, whole tensors by name; tags begin with `name`.
    """
    if "checkpoint" in report.files:
        trainer.save_checkpoint(report.files["checkpoint"], weights_only=False)
    if trainer.is_global_zero:
        write_report(report, views)
        track(RepairLog(report, trainer.global_step, name, changes, views, logged_hparams(trainer)), trainer.loggers)
        if verbose:
            show(report)
    trainer.callback_metrics.update(headline(report, name))


def headline(report: RepairReport, name: str) -> dict[str, Tensor]:
    """What `trainer.callback_metrics` gets, named as in the logs; it outlives processes that a strategy has started."""
    return {tag: torch.tensor(value) for tag, value in outcome(report, name).items()}
