"""The script `lightning-nrl`: works on models of a project, decides on releases, applies patches.

A project is given by arguments and YAML as for LightningCLI. The exit status is 0 for success, 1 if
the result is not accepted, 2 for an error, 3 if a release is undecided, and 4 if files cannot be
written.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_nrl._trainer.lightning.checkpoint_files import reading_checkpoints
from lightning_nrl._trainer.lightning.private_parts import callbacks_of, set_callbacks
from lightning_nrl._trainer.output.announcement import show
from lightning_nrl._trainer.output.repair_files import (
    REPORT_FILES,
    foreign_file,
    refuse_foreign,
    write_report,
)
from lightning_nrl._utils.atomic_files import check_writable, must_be_written
from lightning_nrl._utils.checkpoint import load_mapping, read_state
from lightning_nrl._utils.json_records import parse_json
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.callbacks import ReleaseGate
from lightning_nrl.entrypoints.arguments import is_used
from lightning_nrl.entrypoints.command_project import (
    GROW,
    JUNIT,
    ON_UNDECIDED,
    OWN_ARGUMENTS,
    REQUIRE,
    SUITE_HELP,
    SUMMARY,
    SUMMARY_VARIABLE,
    TRUST,
    Project,
    read_project,
)
from lightning_nrl.entrypoints.functions import compare, diagnose, repair
from lightning_nrl.entrypoints.suite_command import SUITE, run_suite
from lightning_nrl.errors import ConfigurationError, RepairError, UnwritableFolderError, explain
from lightning_nrl.pipeline import Patch, patch_checkpoint
from lightning_nrl.records import installed_versions
from lightning_nrl.records.provenance import today
from lightning_nrl.release import recount
from lightning_nrl.release.accepted import reports_in
from lightning_nrl.release.junit import errors_in_junit, write_junit
from lightning_nrl.release.model_pair import check_missing, pair_from_files
from lightning_nrl.release.release_report import (
    ACTIONS,
    Criteria,
    Identity,
    OnUndecided,
    ReleaseReport,
    make_report,
)
from lightning_nrl.release.rule_parsing import REQUIRED, RULES, Require
from lightning_nrl.release.suite import RegressionSuite, released_samples
from lightning_nrl.report import RepairReport, Report
from lightning_nrl.report.page import Block, FactList, Heading, Page, Row, Table
from lightning_nrl.report.side_by_side import side_by_side
from lightning_nrl.updates.predictions import Predictions, read_slices

__all__ = ["COMMANDS", "main"]

PAGE_WIDTH = 120  # characters


def apply_patch(patch: str, ckpt: str, out: str, weights_only: str, undo: bool = False) -> int:
    """Writes a copy of a checkpoint to `out`, with the patch applied, or reverted if `undo`."""
    change = Patch.load(patch)
    patch_checkpoint(change, ckpt, out, undo=undo, weights_only=weights_only == "true")
    done = "reverted" if undo else "applied"
    print(f"{out}: {done} {change.n_changed:,} values in {len(change.names)} tensors.")
    return 0


def inspect_file(file: str) -> int:
    """Prints the contents of a patch, a checkpoint or a report."""
    path = Path(file)
    if path.suffix == ".safetensors":
        page = _page_of_patch(Patch.load(path))
    elif path.suffix == ".json":
        page = read_report(path).to_table()
    else:
        page = _page_of_checkpoint(path)
    print(page.plain(PAGE_WIDTH), end="")
    return 0


def show_report(file: str, other: str | None, out: str | None) -> int:
    """Prints a report as Markdown, or writes it to the file `out` as HTML or Markdown.

    With `other`, prints two repairs side by side.
    """
    report = read_report(file)
    if other is not None:
        beside = read_report(other)
        if out or not (isinstance(report, RepairReport) and isinstance(beside, RepairReport)):
            raise ConfigurationError(
                "two reports are printed side by side if both are of repairs.",
                "give two files report.json of repairs, and no `--out`.",
            )
        print(side_by_side(report, beside, (file, other)).plain(PAGE_WIDTH), end="")
        return 0
    if out is None:
        print(report.to_markdown(), end="")
        return 0
    write = report.to_html if Path(out).suffix in (".html", ".htm") else report.to_markdown
    Path(out).write_text(write(), encoding="utf-8")
    return 0


def read_report(path: str | Path) -> Report:
    """Reads a report from a JSON file, or from the patch that contains it."""
    path = Path(path)
    if path.suffix == ".safetensors":
        report = Patch.load(path).report
        if report is None:
            raise ConfigurationError(
                f"`{path}` holds no report.", "give report.json of the repair."
            )
        return report
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"`{path}` cannot be read ({error}).", "give report.json of a repair."
        ) from error
    plain = parse_json(text)
    if isinstance(plain, Mapping) and "findings" in plain:
        return ReleaseReport.from_dict(plain)
    return RepairReport.from_dict(plain)


def _page_of_patch(patch: Patch) -> Page:
    rows = []
    for name, change in patch.changes.items():
        shape, dtype = str(list(change.shape)), str(change.old.dtype).removeprefix("torch.")
        rows.append(Row(name, (shape, dtype, f"{change.n_changed:,}")))
    columns = (("shape", ""), ("dtype", ""), ("values", ""))
    facts = (
        ("weights before", patch.base),
        ("weights after", patch.result),
        *patch.versions.items(),
    )
    blocks: list[Block] = [Heading("Patch", 1), Table(columns, tuple(rows)), FactList(facts)]
    if patch.report:
        blocks += patch.report.to_table().blocks
    return Page(tuple(blocks))


def _page_of_checkpoint(path: Path) -> Page:
    hint = (
        "give a patch (.safetensors), a report (.json), "
        "or a checkpoint that loads with `weights_only=True`."
    )
    checkpoint = load_mapping("file", path, hint)
    state = read_state("file", checkpoint)
    n_values = [value.numel() for value in state.values() if isinstance(value, torch.Tensor)]
    facts = [
        ("tensors", f"{len(n_values):,}"),
        ("values", f"{sum(n_values):,}"),
        ("weights", hash_tensors(state)),
    ]
    for key in ("epoch", "global_step"):
        if key in checkpoint:
            facts.append((key.replace("_", " "), str(checkpoint[key])))
    blocks: list[Block] = [Heading("Checkpoint", 1), FactList(tuple(facts))]
    for report in reports_in(checkpoint):
        blocks += report.to_table().blocks
    return Page(tuple(blocks))


def decide_release(
    old: str,
    new: str,
    rules: list[str] | None,
    require: Require,
    slices: str | None,
    allow_missing: list[str],
    on_undecided: OnUndecided | None,
    out: str | None,
    junit: str | None,
    summary: str | None,
    suite: str | None,
    grow: str,
    noise: list[str] | None,
) -> int:
    """Decides on a release from two files of predictions. Returns `ReleaseReport.exit_status`."""
    if out:
        refuse_foreign(foreign_file(Path(out)), "out")
    summary = find_summary(summary)
    if junit is not None:
        check_writable("junit", junit)
    criteria = Criteria(rules or ["instance"], require, on_undecided=on_undecided, noise=noise)
    kept = None
    if suite is not None:
        kept = RegressionSuite.read(RegressionSuite(suite, grow == "true"))
        criteria = criteria.protecting(kept)
    slice_names = None if slices is None else read_slices(slices)
    before, after = Predictions.read(old, "old"), Predictions.read(new, "new")
    criteria.check_data(tuple(after.splits), sliced=slice_names is not None)
    missing = check_missing(before, after, allow_missing)
    pair = pair_from_files(before, after, slice_names, criteria.targets)
    report = make_report(
        pair,
        criteria,
        old=Identity(old, before.weights or ""),
        new=Identity(new, after.weights or ""),
        task="as recorded in the files",
        precision="as recorded in the files",
        missing=missing,
    )
    if out:
        folder = Path(out)
        with must_be_written("out", out):
            folder.mkdir(parents=True, exist_ok=True)
        files = {kind: str(folder / name) for kind, name in REPORT_FILES.items()}
        report = write_report(replace(report, files=files), "out")
    if junit:
        write_junit(report, junit)
    append_summary(report, summary)
    print(report.render(PAGE_WIDTH), end="")
    if kept is not None and report.accepted:
        kept.grow_by(released_samples(pair, today(), new))
    return report.exit_status


def find_summary(summary: str | None) -> str | None:
    """Returns the file to which `--summary` appends: its value, or that of GitHub's job."""
    if summary == "":
        summary = os.environ.get(SUMMARY_VARIABLE)
        if summary is None:
            raise ConfigurationError(
                f"`--summary` names no file, and {SUMMARY_VARIABLE} is not set.",
                "write `--summary FILE`; GitHub's jobs set the variable.",
            )
    if summary is not None:
        check_writable("summary", summary)
    return summary


def append_summary(report: ReleaseReport, summary: str | None) -> None:
    if summary is not None:
        with must_be_written("summary", summary), Path(summary).open("a", encoding="utf-8") as file:
            file.write(report.to_markdown() + "\n")


def recount_file(file: str, predictions: str) -> int:
    """Prints if a repair's promise holds for the deployed model. Returns 0 if so, else 1."""
    report = RepairReport.from_json(Path(file).read_text(encoding="utf-8"))
    decision = recount(report, Predictions.read(predictions, "predictions"))
    promise = "kept" if decision.accepted else "NOT kept"
    print(f"Promise {promise} by the deployed model: {decision.reason}")
    return int(not decision.accepted)


def repair_project(project: Project) -> int:
    """Repairs the model of a project.

    Returns 1 if the repair fails or does not meet `require`, else 0.
    """
    require: Require = project.arguments["require"] or "any"
    if require != "any" and "unseen" not in project.options:
        raise ConfigurationError(
            f"`require={require}` judges data that the repair does not use, "
            "but `unseen` is not given.",
            "add --repair.unseen test.",
        )
    report = repair(**project.source, **{**project.options, "verbose": False})
    trainer = project.source["trainer"]
    is_saved = "checkpoint" in report.files or trainer.fast_dev_run
    if report.status == "repaired" and not is_saved:
        raise UnwritableFolderError(
            "`dirpath`: repaired.ckpt could not be written, so the repair is lost.",
            "make room, or name another folder: --repair.dirpath FOLDER.",
        )
    if project.options.get("verbose", True) and trainer.is_global_zero:
        show(report)
    if report.status not in ("repaired", "nothing to repair"):
        return 1
    if _meets(require, report):
        return 0
    verdict = report.verdict
    old = project.source["ckpt_path"] or "the old weights"
    if report.update:
        old = "the model that it replaces"
    message = explain(
        f"not accepted: `--require {require}` is not met: {verdict.repaired:,} repaired, "
        f"{verdict.broken:,} broken of {verdict.n:,} unseen samples "
        f"(sign test, p = {verdict.p_value:.2g}).",
        f"do not ship {report.files.get('checkpoint', 'the new model')}; keep {old}.",
    )
    print(message, file=sys.stderr)
    return 1


def _meets(require: Require, report: RepairReport) -> bool:
    verdict = report.verdict
    has_no_evidence = report.status == "nothing to repair" and verdict.source == "none"
    if require == "any" or has_no_evidence:
        return True
    if require == "better":
        return verdict.evidence == "better"
    groups = verdict.groups
    if groups is not None and groups.better < groups.worse:
        return False
    return verdict.repaired >= verdict.broken


def diagnose_project(project: Project) -> int:
    show(diagnose(**project.source, **project.options))
    return 0


def compare_project(project: Project) -> int:
    """Prints a comparison of methods, or the decision of a `ReleaseGate`.

    Returns the exit status of the decision.
    """
    values = {name: project.arguments[name] for name in OWN_ARGUMENTS["compare"]}
    methods = values.pop("methods")
    if all(value is None for value in values.values()):
        options = {
            name: value for name, value in project.options.items() if is_used("compare", name)
        }
        show(compare(**project.source, methods=methods, **options))
        return 0
    if values["old"] is None or values["new"] is None or methods:
        raise ConfigurationError(
            f"{', '.join(f'`{name}`' for name in values)} test a new model; "
            "they need `old` and `new`, and no `methods`.",
            "give --old best.ckpt --new new.ckpt, or only --methods.",
        )
    summary = find_summary(values["summary"])
    suite = values["suite"]
    with errors_in_junit(values["junit"]):  # from YAML; later ones are written by the gate
        if suite:
            suite = RegressionSuite(suite, values["grow"] is not False)
        gate = ReleaseGate(
            values["old"],
            values["rules"] or ["instance"],
            values["require"] or "not-worse",
            on_undecided=values["on_undecided"],
            junit=values["junit"],
            suite=suite,
            task=project.options.get("task"),
            dirpath=project.options.get("dirpath"),
            verbose=False,
        )
    source = project.source
    trainer = source["trainer"]
    set_callbacks(trainer, [*callbacks_of(trainer), gate])
    with reading_checkpoints(trainer, "new", weights_only=source["weights_only"]):
        trainer.test(source["model"], datamodule=source["datamodule"], ckpt_path=values["new"])
    assert gate.report is not None
    if trainer.is_global_zero:
        append_summary(gate.report, summary)
        show(gate.report)
    return gate.report.exit_status


Arguments = Mapping[str, Mapping[str, Any]]


class Command(NamedTuple):
    """A command: its function, its purpose in words, and its arguments.

    The arguments are None if the command reads a project.
    """

    run: Callable[..., int]
    purpose: str
    arguments: Arguments | None = None


PATCH: Arguments = {
    "--patch": {
        "required": True,
        "help": "patch to apply or revert, such as repair.patch.safetensors",
    },
    "--ckpt": {"required": True, "help": "checkpoint to read"},
    "--out": {"required": True, "help": "checkpoint to write; may be the file of --ckpt"},
    "--weights_only": {"choices": ("true", "false"), "default": "true", "help": TRUST},
}


def _rule_texts(text: str) -> list[str]:
    if not text.startswith("["):
        return [text]
    return [rule.strip(" '\"") for rule in text.strip("[]").split(",")]


RELEASE: Arguments = {
    "old": {
        "help": "predictions of the model in use: CSV file with the columns "
        "split,id,prediction,passed",
    },
    "new": {
        "help": "predictions of the new model: a file like `old`, "
        "such as predictions.csv of a ReleaseGate",
    },
    "--rules": {
        "action": "extend",
        "type": _rule_texts,
        "help": "rules to meet, such as [instance, nfr:1%%]; repeatable: "
        + ", ".join(RULES.forms).replace("%", "%%"),
    },
    "--require": {"choices": list(REQUIRED), "default": "not-worse", "help": REQUIRE},
    "--slices": {"help": "CSV file with the columns split,id,slice"},
    "--noise": {
        "nargs": 2,
        "metavar": "FILE",
        "help": "predictions of two trainings of the old recipe, which show how many flips are "
        "chance",
    },
    "--allow_missing": {
        "action": "append",
        "default": [],
        "metavar": "SPLIT",
        "help": "split that may lack samples",
    },
    "--on_undecided": {"choices": list(ACTIONS), "help": ON_UNDECIDED},
    "--out": {"help": "folder to write report.json, report.md and report.html"},
    "--suite": {"metavar": "FILE", "help": SUITE_HELP},
    "--grow": {"choices": ("true", "false"), "default": "true", "help": GROW},
    "--junit": {"metavar": "FILE", "help": JUNIT},
    "--summary": {"metavar": "FILE", "nargs": "?", "const": "", "help": SUMMARY},
}
RECOUNT: Arguments = {
    "file": {"help": "report.json of a repair"},
    "--predictions": {
        "required": True,
        "help": "deployed predictions of the known samples: CSV file with the columns "
        "split,id,passed",
    },
}
INSPECT: Arguments = {"file": {"help": "a patch, a checkpoint, or report.json"}}
REPORT: Arguments = {
    "file": {"help": "report.json of a repair or of a release, or a patch with a report"},
    "other": {"nargs": "?", "help": "report.json of another repair of the same model"},
    "--out": {
        "help": "file to write: HTML if it ends in .html, else Markdown; "
        "without --out, Markdown is printed",
    },
}
COMMANDS: Mapping[str, Command] = {
    "repair": Command(
        repair_project,
        "repair the model of a project; exit status 1 if the repair fails or is refused",
    ),
    "diagnose": Command(
        diagnose_project, "predict what can be repaired, what limits this, and how long it takes"
    ),
    "compare": Command(
        compare_project, "count the samples that methods, or a new checkpoint, repair and break"
    ),
    "release": Command(
        decide_release,
        "accept a new model by predictions, or refuse it with exit status 1",
        RELEASE,
    ),
    "recount": Command(
        recount_file,
        "say if the promise of a repair holds for deployed predictions; exit status 1 if not",
        RECOUNT,
    ),
    "suite": Command(
        run_suite, "add samples to a regression suite, list it, or check predictions by it", SUITE
    ),
    "apply": Command(apply_patch, "write a checkpoint with a patch applied", PATCH),
    "revert": Command(
        partial(apply_patch, undo=True),
        "write a checkpoint with a patch reverted, bit for bit",
        PATCH,
    ),
    "inspect": Command(
        inspect_file, "show the contents of a patch, a checkpoint or a report", INSPECT
    ),
    "report": Command(
        show_report, "print or write a report, or print two repairs side by side", REPORT
    ),
}
"""All commands by name."""

ONCE = (
    "--require",
    "--on_undecided",
    "--suite",
    "--junit",
    "--summary",
    "--slices",
    "--old",
    "--new",
)
JUNIT_PARSER = argparse.ArgumentParser(add_help=False)
JUNIT_PARSER.add_argument("--junit", nargs="?")
FAILURE_STATUS, UNWRITABLE_STATUS = 2, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns 0 (success), 1 (result not accepted), 2 (error), 3 (undecided) or 4 (cannot write).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:
        sys.path.insert(0, "")  # for the user's modules in the current folder
    try:
        with errors_in_junit(JUNIT_PARSER.parse_known_args(words)[0].junit):
            return _run(_spelled(words))
    except SystemExit as end:  # raised by a parser, which has printed why
        if isinstance(end.code, int):
            return end.code
        return FAILURE_STATUS if end.code else 0
    except UnwritableFolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNWRITABLE_STATUS
    except (RepairError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
        print("error: the command failed as shown above; nothing was decided.", file=sys.stderr)
    return FAILURE_STATUS


def _spelled(words: Sequence[str]) -> list[str]:
    """Writes options with underscores, and `--rule` as `--rules+`, which appends to a list.

    Refuses an option in `ONCE` that is given twice, since the last would win.
    """
    spelled = []
    for word in words:
        option, equals, value = word.partition("=")
        if option.startswith("--") and "." not in option:
            name = option.removeprefix("--").replace("-", "_")
            option = "--rules+" if name in ("rule", "rules") else f"--{name}"
            if option in ONCE and option in spelled:
                raise ConfigurationError(f"`{option}` is given twice.", "give it once.")
        spelled += [option, value] if equals and option in ONCE else [f"{option}{equals}{value}"]
    return spelled


def _run(words: list[str]) -> int:
    lines = "\n".join(f"  {name:<10}{command.purpose}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "lightning-nrl",
        usage="lightning-nrl COMMAND [ARGUMENTS]",
        description="Repair of trained models without regressions. "
        "COMMAND --help describes a command.",
        epilog=f"commands:\n{lines}\n\n"
        "Exit status: 2 for an error, 3 if undecided, 4 if files cannot be written.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    parser.add_argument("--version", action="version", version=versions)
    names = list(COMMANDS)
    parser.add_argument("command", metavar="COMMAND", choices=names, help=argparse.SUPPRESS)
    name = parser.parse_args(words[:1]).command
    command = COMMANDS[name]
    if command.arguments is None:
        return command.run(read_project(name, command.purpose, words[1:]))
    program = f"lightning-nrl {name}"
    parser = argparse.ArgumentParser(program, description=command.purpose, allow_abbrev=False)
    for argument, settings in command.arguments.items():
        names = [argument, f"{argument}+"] if argument == "--rules" else [argument]
        parser.add_argument(*names, **settings)
    return command.run(**vars(parser.parse_args(words[1:])))
