"""What each command does: on a project, or on files of patches, checkpoints, reports and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lightning_nrl._trainer.lightning.checkpoint_files import reading_checkpoints
from lightning_nrl._trainer.lightning.private_parts import callbacks_of, set_callbacks
from lightning_nrl._trainer.repair_files import REPORT_FILES, show, write_report
from lightning_nrl._utils.checkpoint import load_mapping, read_state
from lightning_nrl._utils.json_records import parse_json
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.callbacks import ReleaseGate
from lightning_nrl.entrypoints.arguments import heeded
from lightning_nrl.entrypoints.command_project import Project
from lightning_nrl.entrypoints.functions import compare, diagnose, repair
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.pipeline import Patch, patch_checkpoint
from lightning_nrl.report import RepairReport, Report
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Table
from lightning_nrl.updates.model_pair import check_missing, pair_from_files
from lightning_nrl.updates.predictions import Predictions, read_slices
from lightning_nrl.updates.release import Identity, ReleaseReport, make_report
from lightning_nrl.updates.rule_parsing import parse_rules

PAGE_WIDTH = 120  # characters


def apply_patch(patch: str, ckpt: str, out: str, weights_only: str, undo: bool = False) -> int:
    """Writes a checkpoint with a patch applied, or taken out again."""
    change = Patch.load(patch)
    patch_checkpoint(change, ckpt, out, undo=undo, weights_only=weights_only == "true")
    done = "taken out" if undo else "applied"
    print(f"{out}: {change.n_changed:,} values in {len(change.names)} tensors, {done}.")
    return 0


def inspect_file(file: str) -> int:
    """Prints what a patch, a checkpoint or a report holds."""
    path = Path(file)
    if path.suffix == ".safetensors":
        page = _page_of_patch(Patch.load(path))
    elif path.suffix == ".json":
        page = read_report(path).to_table()
    else:
        page = _page_of_checkpoint(path)
    print(page.plain(PAGE_WIDTH), end="")
    return 0


def show_report(file: str, out: str | None) -> int:
    """Prints a report as Markdown, or writes it to a file as Markdown or HTML."""
    report = read_report(file)
    if out is None:
        print(report.to_markdown(), end="")
    else:
        as_html = Path(out).suffix in (".html", ".htm")
        Path(out).write_text(report.to_html() if as_html else report.to_markdown(), encoding="utf-8")
    return 0


def read_report(path: str | Path) -> Report:
    """Reads the report in a JSON file or a patch."""
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
    rows = []
    for name, change in patch.changes.items():
        dtype = str(change.old.dtype).removeprefix("torch.")
        kept = "all values" if change.index is None else "positions"
        rows.append(Row(name, (str(list(change.shape)), dtype, f"{change.n_changed:,}", kept)))
    columns = (("shape", ""), ("dtype", ""), ("values", ""), ("kept as", ""))
    facts = (("weights before", patch.base), ("weights after", patch.result), *patch.versions.items())
    blocks: list[Block] = [Heading("Patch", 1), Table(columns, tuple(rows)), Facts(facts)]
    return Page((*blocks, *(patch.report.to_table().blocks if patch.report else ())))


def _page_of_checkpoint(path: Path) -> Page:
    hint = "give a patch (.safetensors), a report (.json), or a checkpoint that loads with `weights_only=True`."
    found = load_mapping("file", path, hint)
    tensors = {name: value for name, value in read_state("file", found).items() if isinstance(value, torch.Tensor)}
    facts = [
        ("tensors", f"{len(tensors):,}"),
        ("values", f"{sum(value.numel() for value in tensors.values()):,}"),
        ("weights", hash_tensors(tensors)),
        *((name.replace("_", " "), str(found[name])) for name in ("epoch", "global_step") if name in found),
    ]
    blocks: list[Block] = [Heading("Checkpoint", 1), Facts(tuple(facts))]
    states = found.get("callbacks")
    for name, state in states.items() if isinstance(states, Mapping) else ():
        text = state.get("report") if isinstance(state, Mapping) else None
        if isinstance(text, str) and str(name).startswith("RegressionFreeRepair"):
            blocks += RepairReport.from_json(text).to_table().blocks
    return Page(tuple(blocks))


def decide_release(
    old: str, new: str, rule: list[str] | None, slices: str | None, allow_missing: list[str], out: str | None
) -> int:
    """Judges two files of predictions; the exit status is 1 for a refusal and for nothing else."""
    rules, sliced = parse_rules(rule or ["instance"]), None if slices is None else read_slices(slices)
    before, after = Predictions.read(old, "old"), Predictions.read(new, "new")
    for one in rules:
        one.check_data(tuple(after.splits), sliced is not None)
    missing = check_missing(before, after, allow_missing)
    report = make_report(
        pair_from_files(before, after, sliced),
        rules,
        new=Identity(new, after.weights or ""),
        old=Identity(old, before.weights or ""),
        task="what the files say",
        precision="that in which the predictions were made",
        seeds={},
        missing=missing,
    )
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        files = {kind: str(folder / name) for kind, name in REPORT_FILES.items()}
        report = write_report(replace(report, files=files))
    print(report.render(PAGE_WIDTH), end="")
    return report.exit_status


def repair_project(project: Project) -> int:
    """Repairs the model of a project."""
    report = repair(**project.source, **project.options)
    return 0 if report.status in ("repaired", "nothing to repair") else 1


def diagnose_project(project: Project) -> int:
    """Prints the diagnosis of a project."""
    show(diagnose(**project.source, **project.options))
    return 0


def compare_project(project: Project) -> int:
    """Prints a comparison; options of a repair that it does not heed are left out.

    With an old and a new checkpoint it is the test with a `ReleaseGate` that compares them.
    """
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
