"""Commands on a project: model, data and trainer from YAML or arguments, as LightningCLI takes them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nrl._trainer.artifacts import show
from lightning_nrl.command_line.project import read_project
from lightning_nrl.entrypoints import compare, diagnose, repair
from lightning_nrl.entrypoints._option_support import heeded

__all__ = ["compare_command", "diagnose_command", "repair_command"]


def repair_command(program: str, purpose: str, arguments: Sequence[str]) -> int:
    """`repair`: prints the report and writes what the function does."""
    project = read_project(program, purpose, arguments)
    report = repair(**project.source, **project.options)
    return 0 if report.status in ("repaired", "nothing to repair") else 1


def diagnose_command(program: str, purpose: str, arguments: Sequence[str]) -> int:
    """`diagnose`: prints the diagnosis."""
    project = read_project(program, purpose, arguments)
    show(diagnose(**project.source, **project.options))
    return 0


def compare_command(program: str, purpose: str, arguments: Sequence[str]) -> int:
    """`compare`: prints the table. Options of a repair that a comparison does not heed are left out."""
    project = read_project(program, purpose, arguments, methods=True)
    options = {name: value for name, value in project.options.items() if heeded("compare", name)}
    show(compare(**project.source, methods=project.methods, **options))
    return 0
