"""Commands on a project: model, data and trainer from YAML or arguments, as LightningCLI takes them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nrl._lightning.checkpoint_files import reading_checkpoints
from lightning_nrl._lightning.private_parts import callbacks_of, set_callbacks
from lightning_nrl._trainer.artifacts import show
from lightning_nrl.callbacks import ReleaseGate
from lightning_nrl.command_line.project import read_project
from lightning_nrl.entrypoints import compare, diagnose, repair
from lightning_nrl.entrypoints._option_support import heeded
from lightning_nrl.errors import ConfigurationError

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
    """`compare`: prints the table. Options of a repair that a comparison does not heed are left out.

    With an old and a new checkpoint it is the test with a `ReleaseGate` that compares them.
    """
    project = read_project(program, purpose, arguments, compares=True)
    methods, old, new, rules = (project.compared[name] for name in ("methods", "old", "new", "rules"))
    if old is None and new is None:
        options = {name: value for name, value in project.options.items() if heeded("compare", name)}
        show(compare(**project.source, methods=methods, **options))
        return 0
    if old is None or new is None or methods:
        problem = "`old` and `new` are two checkpoints to be compared, without `methods`."
        raise ConfigurationError(problem, "give both, such as --old best.ckpt --new new.ckpt.")
    trainer, module, data = (project.source[name] for name in ("trainer", "model", "datamodule"))
    options = {name: value for name, value in project.options.items() if name in ("task", "dirpath")}
    gate = ReleaseGate(old, rules or ["instance"], **options)
    set_callbacks(trainer, [*callbacks_of(trainer), gate])
    with reading_checkpoints(trainer, "new", weights_only=project.source["weights_only"]):
        trainer.test(module, datamodule=data, ckpt_path=new)
    return 1 if gate.report is None else gate.report.exit_status
