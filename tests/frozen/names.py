"""The one place that knows how the package is imported and called. Where names or signatures change, only this changes.

Cases give the arguments of a repair flat, by the words of `FLAT`; the functions below hand them on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from lightning_nrl.analysis.baselines import FineTuning, Interpolation
from lightning_nrl.analysis.comparison import compare_module
from lightning_nrl.analysis.diagnosis import diagnose_module
from lightning_nrl.analysis.sweep import Grid, SweepResult, sweep_module
from lightning_nrl.callbacks import (
    PositiveCongruentTraining,
    RegressionMetrics,
    ReleaseGate,
    WeightInterpolation,
    regression_loss,
)
from lightning_nrl.callbacks.repair import RegressionFreeRepair
from lightning_nrl.data import Target, TensorSource
from lightning_nrl.entrypoints import compare, diagnose, repair, sweep
from lightning_nrl.entrypoints.arguments import OPTION_CLASSES
from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.evaluation import Evaluator, Focal, metrics
from lightning_nrl.gate import Gate
from lightning_nrl.localization import AllWeights, NeuRecoverLite
from lightning_nrl.methods import Auto, Polish, Solution
from lightning_nrl.pipeline import Settings, repair_module
from lightning_nrl.pipeline.presets import TABLE_II, paper_arguments
from lightning_nrl.report import RepairReport
from lightning_nrl.report import stats as bounds
from lightning_nrl.search import Fitness, ParticleSwarm
from lightning_nrl.tasks import Custom, Multiclass, Multilabel, Regression, Segmentation, Task, parse_task
from lightning_nrl.tasks import Sequence as SequenceTask
from lightning_nrl.updates import (
    AtMostBroken,
    FocalDistillation,
    MarginHinge,
    MaxNegativeFlipRate,
    NoSliceWorse,
    OldModel,
    Oversampler,
    Predictions,
    ProtectedIntact,
    choose_share,
    interpolate,
    release,
)

__all__ = [
    "FLAT",
    "TABLE_II",
    "AllWeights",
    "AtMostBroken",
    "Auto",
    "Custom",
    "Evaluator",
    "FineTuning",
    "Fitness",
    "Focal",
    "FocalDistillation",
    "Grid",
    "Halfway",
    "Interpolation",
    "MarginHinge",
    "MaxNegativeFlipRate",
    "Multiclass",
    "Multilabel",
    "NeuRecoverLite",
    "NoSliceWorse",
    "OldModel",
    "Oversampler",
    "ParticleSwarm",
    "Polish",
    "PositiveCongruentTraining",
    "Predictions",
    "ProtectedIntact",
    "Regression",
    "RegressionMetrics",
    "ReleaseGate",
    "Segmentation",
    "SequenceTask",
    "SweepResult",
    "Target",
    "Task",
    "TensorSource",
    "WeightInterpolation",
    "arguments_of",
    "bounds",
    "callback",
    "callback_of_row",
    "choose_share",
    "compare_checkpoint",
    "compare_tensors",
    "comparison_page",
    "configured",
    "diagnose_checkpoint",
    "diagnose_tensors",
    "diagnosis_page",
    "interpolate",
    "is_repair",
    "metrics",
    "page",
    "read_report",
    "regression_loss",
    "release",
    "release_command",
    "repair_checkpoint",
    "repair_tensors",
    "report_dict",
    "row_arguments",
    "settings_of",
    "sweep_checkpoint",
    "sweep_page",
    "sweep_tensors",
    "swept_callback",
]

FLAT = (
    *("target", "layer", "gate", "method", "fitness", "localizer", "n_passed", "seed", "budget", "max_time"),
    *("strength", "limit", "sparse", "keep", "importance", "slices", "quotas", "protected", "set_aside"),
    "confidence",
)
"""Arguments of a repair, in the words of the cases and of the frozen settings."""


@dataclass(frozen=True)
class Halfway:
    """A method of one's own: half of the way to other weights, whatever that breaks."""

    new: dict[str, Tensor]

    def __call__(self, problem: Any) -> Any:
        old = problem.model.state_dict()
        state = {name: (old[name] + value) / 2 for name, value in self.new.items()}
        return Solution(problem.propose("half way", state))


def _grouped(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with those of the option objects inside these."""
    own = dict(flat)
    for name, kind in OPTION_CLASSES.items():
        inside = {field.name: own.pop(field.name) for field in fields(kind) if field.name in own}
        if inside:
            own[name] = replace(own.get(name) or kind(), **inside)
    return own


def _settings(flat: Mapping[str, Any]) -> Settings:
    own = _grouped(flat)
    if isinstance(own.get("gate"), str):
        own["gate"] = Gate.parse(own["gate"])
    return Settings(**own)


def repair_tensors(
    model: nn.Module,
    known: Sequence[Any],
    *,
    unseen: Sequence[Any] = (),
    calibration: Sequence[Any] = (),
    task: Any = None,
    reference: Any = None,
    **flat: Any,
) -> Any:
    """A repair in plain PyTorch; the outcome has `report`, `parameters`, `change` and `write`."""
    given = {"unseen": unseen, "calibration": calibration, "reference": reference}
    return repair_module(Evaluator(model, parse_task(task)), known, _settings(flat), **given)


def callback(**flat: Any) -> Any:
    """The callback that repairs after a fit; beside `FLAT` it takes where data come from and where files go."""
    return RegressionFreeRepair(**_grouped(flat))


def configured(**flat: Any) -> dict[str, Any]:
    """The same callback as an entry of a configuration file."""
    inside = dict(flat)
    for name, kind in OPTION_CLASSES.items():
        own = {field.name: inside.pop(field.name) for field in fields(kind) if field.name in inside}
        inside |= {name: own} if own else {}
    return {"class_path": "lightning_nrl.RegressionFreeRepair", "init_args": inside}


def is_repair(made: Any) -> bool:
    return isinstance(made, RegressionFreeRepair)


def callback_of_row(row: str, **flat: Any) -> Any:
    return RegressionFreeRepair.from_paper(row, **_grouped(flat))


def repair_checkpoint(trainer: Any, model: Any, *, data: Any, path: Any = None, made: Any = None, **flat: Any) -> Any:
    """A repair without training; gives the report."""
    return repair(trainer, model, datamodule=data, ckpt_path=path, callback=made, **_grouped(flat))


def compare_tensors(
    model: nn.Module, known: Sequence[Any], *, unseen: Sequence[Any] = (), methods: Any = None, **flat: Any
) -> Any:
    return compare_module(model, known, _settings(flat), unseen=unseen, methods=methods)


def compare_checkpoint(trainer: Any, model: Any, *, data: Any, path: Any, methods: Any, **flat: Any) -> Any:
    return compare(trainer, model, datamodule=data, ckpt_path=path, methods=methods, **_grouped(flat))


def diagnose_tensors(model: nn.Module, known: Sequence[Any], *, task: Any = None, **flat: Any) -> Any:
    return diagnose_module(Evaluator(model, parse_task(task)), known, _settings(flat))


def diagnose_checkpoint(trainer: Any, model: Any, *, data: Any, path: Any, **flat: Any) -> Any:
    return diagnose(trainer, model, datamodule=data, ckpt_path=path, **_grouped(flat))


def sweep_tensors(
    model: nn.Module,
    known: Sequence[Any],
    settings: Any,
    *,
    seeds: Any,
    unseen: Sequence[Any] = (),
    calibration: Sequence[Any] = (),
    folder: Any = None,
    **flat: Any,
) -> Any:
    given = {"seeds": seeds, "unseen": unseen, "calibration": calibration, "dirpath": folder}
    return sweep_module(model, known, settings=settings, base=_settings(flat), **given)


def sweep_checkpoint(trainer: Any, model: Any, settings: Any, *, data: Any, path: Any, seeds: Any, **flat: Any) -> Any:
    rows = [_setting_of_row(**setting) for setting in settings]
    return sweep(trainer, model, settings=rows, datamodule=data, ckpt_path=path, seeds=seeds, **_grouped(flat))


def _setting_of_row(row: str, **further: Any) -> dict[str, Any]:
    """A row of Table II with something else, named after both."""
    made = paper_arguments(row)
    search = made["search"]
    own = {"fitness": search.fitness, "localizer": search.localizer, "n_passed": search.n_passed}
    name = " ".join([row, *(f"{key}={value}" for key, value in further.items())])
    return {"name": name, "method": made["method"], **own, **further}


def swept_callback(result: Any, run: Any, **flat: Any) -> Any:
    """The callback that makes one run of a sweep again."""
    return RegressionFreeRepair(**{**_grouped(flat), **result.arguments(run)})


def row_arguments(row: str) -> dict[str, Any]:
    """The settings of one row of the paper's Table II, flat and plain."""
    plain = _settings(paper_arguments(row)).plain()
    return {name: plain[name] for name in FLAT}


def arguments_of(made: Any) -> dict[str, Any]:
    """The settings that a callback has, flat and plain."""
    plain = made.settings.plain()
    return {name: plain[name] for name in FLAT}


def settings_of(report: Any) -> dict[str, Any]:
    """The settings that a report names, flat: those of `FLAT` and what else a callback adds."""
    return dict(report.settings)


ADDED_COUNTS = ("kept", "failing")


def _is_old(column: str) -> bool:
    return not column.endswith(("_kept", "_failing"))


def report_dict(report: Any) -> dict[str, Any]:
    """Everything that a report says; settings and files are kept apart."""
    found = {key: value for key, value in report.to_dict().items() if key not in ("settings", "files")}
    # Samples that are known too are looked for now; no case has any.
    if not found["leaked"]:
        del found["leaked"]
    # A slice has all four counts now, as a split has.
    slices = [{key: value for key, value in one.items() if key not in ADDED_COUNTS} for one in found["slices"]]
    return {**found, "slices": slices}


def runs_of(result: Any) -> list[dict[str, Any]]:
    """The rows of a sweep's table, without the counts that it had not before."""
    return [{key: value for key, value in row.items() if _is_old(key)} for row in result.to_dict()["runs"]]


def sweep_columns(result: Any) -> str:
    """The head of a sweep's table, likewise; `n` of each role came first, not after its counts."""
    columns = [name for name in result.to_csv().splitlines()[0].split(",") if _is_old(name)]
    order = ("n", "targeted", "repaired_in_target", "repaired", "broken")
    roles = [f"{role}_{name}" for role in ("known", "calibration", "unseen") for name in order]
    counted = iter(roles)
    assert set(roles) <= set(columns)
    return ",".join(next(counted) if name in roles else name for name in columns)


def read_report(text: str) -> Any:
    return RepairReport.from_json(text)


def page(report: Any) -> list[str]:
    """The lines of a report as a reviewer reads it, without times, versions, files and settings."""
    steps = tuple(replace(step, seconds=0.0) for step in report.steps)
    bare = replace(report, seconds={}, versions={}, files={}, settings={}, steps=steps)
    return bare.to_markdown().splitlines() + bare.render(120).splitlines()


def diagnosis_page(diagnosis: Any) -> list[str]:
    """The lines of a diagnosis as it is shown, without what it says of time."""
    return replace(diagnosis, costs=(), seconds={}, versions={}).render(120).splitlines()


def comparison_page(comparison: Any) -> list[str]:
    """The lines of a comparison as it is shown, without times."""
    entries = tuple(replace(entry, seconds=0.0, scaling=0.0) for entry in comparison.entries)
    return replace(comparison, entries=entries, versions={}).render(140).splitlines()


def sweep_page(result: Any) -> list[str]:
    """The lines of a sweep as it is shown, without times."""
    runs = tuple(replace(run, seconds=0.0) for run in result.runs)
    return replace(result, runs=runs, versions={}).render(160).splitlines()


def release_command(arguments: Sequence[str]) -> int:
    """The release gate on files of predictions."""
    return main(["release", *arguments])
