"""Commands on files: patches, checkpoints, reports."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_nrl._trainer.lightning.checkpoint_files import reading_checkpoints
from lightning_nrl._trainer.lightning.private_parts import callbacks_of, set_callbacks
from lightning_nrl._trainer.repair_files import REPORT_FILES, show, write_report
from lightning_nrl._utils.checkpoint import load_mapping
from lightning_nrl._utils.json_records import parse_json
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.callbacks import ReleaseGate
from lightning_nrl.entrypoints.arguments import heeded
from lightning_nrl.entrypoints.command_project import read_project
from lightning_nrl.entrypoints.functions import compare, diagnose, repair
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.pipeline import Patch, patch_checkpoint
from lightning_nrl.report import RepairReport, Report
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Table
from lightning_nrl.updates.model_pair import check_missing, pair_from_files
from lightning_nrl.updates.predictions import Predictions, read_slices
from lightning_nrl.updates.release import Identity, ReleaseReport, make_report
from lightning_nrl.updates.rule_parsing import RULES, parse_rules

PAGE_WIDTH = 120  # characters


def patch_command(program: str, purpose: str, arguments: Sequence[str]) -> int:
    """`apply` and `revert`: a checkpoint with a patch in it, or without it."""
    parser = argparse.ArgumentParser(program, description=purpose)
    parser.add_argument("--patch", required=True, help="the patch, such as repair.patch.safetensors")
    parser.add_argument("--ckpt", required=True, help="the checkpoint to read")
    parser.add_argument("--out", required=True, help="the checkpoint to write; it may be the same file")
    parser.add_argument(
        "--weights_only",
        choices=("true", "false"),
        default="true",
        help="false: you trust the checkpoint, which may hold objects and run their code",
    )
    given = parser.parse_args(arguments)
    patch, undo = Patch.load(given.patch), program.endswith("revert")
    patch_checkpoint(patch, given.ckpt, given.out, undo=undo, weights_only=given.weights_only == "true")
    done = "taken out" if undo else "applied"
    print(f"{given.out}: {patch.n_changed:,} values in {len(patch.names)} tensors, {done}.")
    return 0


def inspect_command(program: str, purpose: str, arguments: Sequence[str]) -> int:
    """What a file holds, as a page."""
    parser = argparse.ArgumentParser(program, description=purpose)
    parser.add_argument("file", help="a patch, a checkpoint, or report.json")
    path = Path(parser.parse_args(arguments).file)
    if path.suffix == ".safetensors":
        page = _page_of_patch(Patch.load(path))
    elif path.suffix == ".json":
        page = read_report(path).to_table()
    else:
        page = _page_of_checkpoint(path)
    print(page.plain(PAGE_WIDTH), end="")
    return 0


def report_command(program: str, purpose: str, arguments: Sequence[str]) -> int:
    """A report as Markdown on the screen, or as Markdown or HTML in a file."""
    parser = argparse.ArgumentParser(program, description=purpose)
    parser.add_argument("file", help="report.json of a repair or of a release, or a patch with a report")
    parser.add_argument("--out", help="the file to write, HTML if its name ends so; by default it is printed")
    given = parser.parse_args(arguments)
    report = read_report(given.file)
    as_html = given.out is not None and Path(given.out).suffix in (".html", ".htm")
    text = report.to_html() if as_html else report.to_markdown()
    if given.out is None:
        print(text, end="")
    else:
        Path(given.out).write_text(text, encoding="utf-8")
    return 0


def read_report(path: str | Path) -> Report:
    """The report in a JSON file or a patch.

    Raises:
        ConfigurationError: it cannot be read, or there is none.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        found = Patch.load(path).report
        if found is None:
            raise ConfigurationError(f"`{path}` holds no report.", "give report.json of the repair.")
        return found
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"`{path}` cannot be read ({error}).", "give report.json of a repair.") from error
    plain = parse_json(text)
    kind = ReleaseReport if isinstance(plain, Mapping) and "findings" in plain else RepairReport
    return kind.from_dict(plain)


def _page_of_patch(patch: Patch) -> Page:
    rows = tuple(
        Row(
            name,
            (
                str(list(change.shape)),
                str(change.old.dtype).removeprefix("torch."),
                f"{change.n_changed:,}",
                "all values" if change.index is None else "positions",
            ),
        )
        for name, change in patch.changes.items()
    )
    columns = (("shape", ""), ("dtype", ""), ("values", ""), ("kept as", ""))
    facts = (("weights before", patch.base), ("weights after", patch.result), *patch.versions.items())
    blocks: list[Block] = [Heading("Patch", 1), Table(columns, rows), Facts(facts)]
    return Page((*blocks, *(patch.report.to_table().blocks if patch.report else ())))


def _page_of_checkpoint(path: Path) -> Page:
    hint = "give a patch (.safetensors), a report (.json), or a checkpoint that loads with `weights_only=True`."
    found = load_mapping("file", path, hint)
    inside = found.get("state_dict", found)
    if not isinstance(inside, Mapping):
        raise ConfigurationError(f"`{path}` holds a {type(found).__name__}.", "give a checkpoint.")
    tensors = {name: value for name, value in inside.items() if isinstance(value, torch.Tensor)}
    facts = [
        ("tensors", f"{len(tensors):,}"),
        ("values", f"{sum(value.numel() for value in tensors.values()):,}"),
        ("weights", hash_tensors(tensors)),
        *((name.replace("_", " "), str(found[name])) for name in ("epoch", "global_step") if name in found),
    ]
    blocks: list[Block] = [Heading("Checkpoint", 1), Facts(tuple(facts))]
    for text in _reports_in(found.get("callbacks")):
        blocks += RepairReport.from_json(text).to_table().blocks
    return Page(tuple(blocks))


def _reports_in(callbacks: Any) -> list[str]:
    """The reports that `RegressionFreeRepair` keeps in a checkpoint."""
    states = callbacks.items() if isinstance(callbacks, Mapping) else ()
    own = [state for name, state in states if str(name).startswith("RegressionFreeRepair")]
    return [state["report"] for state in own if isinstance(state, Mapping) and isinstance(state.get("report"), str)]


def release_command(program: str, purpose: str, arguments: Sequence[str]) -> int:
    """Judges, prints and writes; the exit status is 1 for a refusal and for nothing else."""
    parser = argparse.ArgumentParser(program, description=purpose)
    rules = ", ".join(RULES.forms).replace("%", "%%")
    parser.add_argument("old", help="predictions of the model in use, a CSV file with split,id,prediction,passed")
    parser.add_argument("new", help="predictions of the new model, likewise; such as predictions.csv of a ReleaseGate")
    parser.add_argument("--rule", action="append", help=f"what must hold, also several: {rules}")
    parser.add_argument("--slices", help="a CSV file with split,id,slice")
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="SPLIT",
        help="a split of which samples may lack new predictions; how many do is in the report",
    )
    parser.add_argument("--out", help="folder for report.json, report.md and report.html")
    given = parser.parse_args(arguments)
    report = _judged(given.old, given.new, given.rule or ["instance"], given.slices, given.allow_missing)
    if given.out:
        report = _written(report, Path(given.out))
    print(report.render(120), end="")
    return report.exit_status


def _judged(old: str, new: str, rules: list[str], slices: str | None, allow_missing: list[str]) -> ReleaseReport:
    asked, sliced = parse_rules(rules), None if slices is None else read_slices(slices)
    before, after = Predictions.read(old, "old"), Predictions.read(new, "new")
    for rule in asked:
        rule.check_data(tuple(after.splits), sliced is not None)
    missing = check_missing(before, after, allow_missing)
    return make_report(
        pair_from_files(before, after, sliced),
        asked,
        new=Identity(new, after.weights or ""),
        old=Identity(old, before.weights or ""),
        task="what the files say",
        precision="that in which the predictions were made",
        seeds={},
        missing=missing,
    )


def _written(report: ReleaseReport, folder: Path) -> ReleaseReport:
    folder.mkdir(parents=True, exist_ok=True)
    report = replace(report, files={kind: str(folder / name) for kind, name in REPORT_FILES.items()})
    return write_report(report)


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
