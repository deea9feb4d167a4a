"""The script `lightning-nrl`: repairs, diagnoses and compares a project, decides on a release, applies patches.

In: arguments, YAML as LightningCLI writes it, files. Out: what is printed and written, and an exit status: 0 fine, 1
not accepted, 2 an error.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from lightning_nrl.entrypoints.command_project import TRUST, read_project
from lightning_nrl.entrypoints.commands import (
    apply_patch,
    compare_project,
    decide_release,
    diagnose_project,
    inspect_file,
    repair_project,
    show_report,
)
from lightning_nrl.errors import RepairError
from lightning_nrl.report import installed_versions
from lightning_nrl.updates.rule_parsing import RULES

__all__ = ["COMMANDS", "main"]


Arguments = Mapping[str, Mapping[str, Any]]


class Command(NamedTuple):
    """What runs a command and gives its exit status, what it is for, and its arguments; None: those of a project."""

    run: Callable[..., int]
    purpose: str
    arguments: Arguments | None = None


PATCH: Arguments = {
    "--patch": {"required": True, "help": "the patch, such as repair.patch.safetensors"},
    "--ckpt": {"required": True, "help": "the checkpoint to read"},
    "--out": {"required": True, "help": "the checkpoint to write; it may be the same file"},
    "--weights_only": {"choices": ("true", "false"), "default": "true", "help": TRUST},
}
RELEASE: Arguments = {
    "old": {"help": "predictions of the model in use, a CSV file with split,id,prediction,passed"},
    "new": {"help": "predictions of the new model, likewise; such as predictions.csv of a ReleaseGate"},
    "--rule": {"action": "append", "help": "what must hold: " + ", ".join(RULES.forms).replace("%", "%%")},
    "--slices": {"help": "a CSV file with split,id,slice"},
    "--allow-missing": {"action": "append", "default": [], "metavar": "SPLIT", "help": "a split that may lack samples"},
    "--out": {"help": "folder for report.json, report.md and report.html"},
}
INSPECT: Arguments = {"file": {"help": "a patch, a checkpoint, or report.json"}}
REPORT: Arguments = {
    "file": {"help": "report.json of a repair or of a release, or a patch with a report"},
    "--out": {"help": "the file to write, HTML if its name ends so; by default it is printed"},
}
COMMANDS: Mapping[str, Command] = {
    "repair": Command(repair_project, "repair the model of a project: 0 if repaired or nothing is to be, else 1"),
    "diagnose": Command(diagnose_project, "say what can be repaired, what stands in the way, and what it costs"),
    "compare": Command(compare_project, "count what repairs, baselines or a new checkpoint fix and break"),
    "release": Command(decide_release, "decide from predictions: 0 if the new model is accepted, else 1", RELEASE),
    "apply": Command(apply_patch, "write a checkpoint with a patch applied", PATCH),
    "revert": Command(partial(apply_patch, undo=True), "write a checkpoint with a patch taken out, to the bit", PATCH),
    "inspect": Command(inspect_file, "show what a patch, a repaired checkpoint or a report holds", INSPECT),
    "report": Command(show_report, "write the report of a repair or of a release as Markdown", REPORT),
}
"""By name, what runs a command and what it is for."""

FAILURE_STATUS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0 fine, 1 not accepted, 2 an error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:
        sys.path.insert(0, "")  # The user's modules are in the folder where the script is called.
    try:
        return _run(given)
    except SystemExit as end:  # of a parser, which has said why
        return end.code if isinstance(end.code, int) else FAILURE_STATUS * bool(end.code)
    except (RepairError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
        print("error: the command broke off as above; nothing was decided.", file=sys.stderr)
    return FAILURE_STATUS


def _run(given: list[str]) -> int:
    lines = "\n".join(f"  {name:<10}{command.purpose}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "lightning-nrl",
        usage="lightning-nrl COMMAND ... (each with --help)",
        description="Repair of trained models without regressions.",
        epilog=f"commands:\n{lines}\n\nAn error ends with status 2.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    parser.add_argument("--version", action="version", version=versions)
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help=argparse.SUPPRESS)
    name = parser.parse_args(given[:1]).command
    command, program = COMMANDS[name], f"lightning-nrl {name}"
    if command.arguments is None:
        return command.run(read_project(program, command.purpose, given[1:], compares=name == "compare"))
    parser = argparse.ArgumentParser(program, description=command.purpose)
    for argument, how in command.arguments.items():
        parser.add_argument(argument, **how)
    return command.run(**vars(parser.parse_args(given[1:])))
