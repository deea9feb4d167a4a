"""The script `lightning-nrl`: repairs, diagnoses and compares a project, decides on a release, applies patches.

In: arguments, YAML as LightningCLI writes it, files. Out: what is printed and written, and an exit status: 0 fine, 1
not accepted, 2 an error.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from lightning_nrl.entrypoints.commands import (
    compare_command,
    diagnose_command,
    inspect_command,
    patch_command,
    release_command,
    repair_command,
    report_command,
)
from lightning_nrl.errors import RepairError
from lightning_nrl.report import installed_versions

__all__ = ["COMMANDS", "main"]

Command = Callable[[str, str, Sequence[str]], int]
"""Takes the program's name, what it is for and the arguments; gives the exit status."""

COMMANDS: Mapping[str, tuple[Command, str]] = {
    "repair": (repair_command, "repair the model of a project: 0 if repaired, or if nothing is to be repaired; else 1"),
    "diagnose": (diagnose_command, "say what can be repaired, what stands in the way, and what it costs"),
    "compare": (
        compare_command,
        "count what repairs and baselines fix and break, or a new checkpoint against an old one",
    ),
    "release": (release_command, "decide from files of predictions: 0 if the new model is accepted, 1 if refused"),
    "apply": (patch_command, "write a checkpoint with a patch applied"),
    "revert": (patch_command, "write a checkpoint with a patch taken out again, to the bit"),
    "inspect": (inspect_command, "show what a patch, a repaired checkpoint or a report holds"),
    "report": (report_command, "write the report of a repair or of a release as Markdown"),
}
"""By name, what runs a command and what it is for."""

FAILURE_STATUS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives the exit status: 0 fine, 1 not accepted, 2 an error."""
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
    lines = "\n".join(f"  {name:<10}{purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "lightning-nrl",
        usage="lightning-nrl COMMAND ... (each with --help)",
        description="Repair of trained models without regressions.",
        epilog=f"commands:\n{lines}\n\nAn error ends with status 2.".replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    parser.add_argument("--version", action="version", version=versions)
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help=argparse.SUPPRESS)
    name = parser.parse_args(given[:1]).command
    command, purpose = COMMANDS[name]
    return command(f"lightning-nrl {name}", purpose, given[1:])
