"""How the package is called: arguments of a repair flat, results without what differs from run to
run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from lightning_nrl.callbacks.repair import RegressionFreeRepair
from lightning_nrl.entrypoints import repair
from lightning_nrl.entrypoints.arguments import OPTION_CLASSES
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.gate import Gate
from lightning_nrl.methods import Method, Solution
from lightning_nrl.pipeline import Settings, repair_module
from lightning_nrl.tasks import parse_task


@dataclass(frozen=True)
class Halfway(Method):
    """A method of one's own: half of the way to other weights, whatever that breaks."""

    new: dict[str, Tensor]

    def __call__(self, problem: Any) -> Any:
        old = problem.model.state_dict()
        state = {name: (old[name] + value) / 2 for name, value in self.new.items()}
        return Solution(problem.propose("half way", state))


def grouped(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with those of the option objects inside these."""
    own = dict(flat)
    for name, kind in OPTION_CLASSES.items():
        inside = {field.name: own.pop(field.name) for field in fields(kind) if field.name in own}
        if inside:
            own[name] = replace(own.get(name) or kind(), **inside)
    return own


def settings(flat: Mapping[str, Any]) -> Settings:
    own = grouped(flat)
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
    given = {"unseen": unseen, "calibration": calibration, "reference": reference}
    return repair_module(Evaluator(model, parse_task(task)), known, settings(flat), **given)


def callback(**flat: Any) -> Any:
    return RegressionFreeRepair(**grouped(flat))


def repair_checkpoint(
    trainer: Any, model: Any, *, data: Any, path: Any = None, made: Any = None, **flat: Any
) -> Any:
    return repair(trainer, model, datamodule=data, ckpt_path=path, callback=made, **grouped(flat))


def report_dict(report: Any) -> dict[str, Any]:
    """Everything that a report says; settings and files are kept apart."""
    return {
        key: value for key, value in report.to_dict().items() if key not in ("settings", "files")
    }


# Pages as lines, without times, versions, files and settings.


def page(report: Any) -> list[str]:
    steps, rungs = (
        tuple(replace(one, seconds=0.0) for one in part) for part in (report.steps, report.rungs)
    )
    bare = replace(report, seconds={}, versions={}, files={}, settings={}, steps=steps, rungs=rungs)
    return bare.to_markdown().splitlines() + bare.render(120).splitlines()


def diagnosis_page(diagnosis: Any) -> list[str]:
    return replace(diagnosis, costs={}, seconds={}, versions={}).render(120).splitlines()


def comparison_page(comparison: Any) -> list[str]:
    entries = tuple(replace(entry, seconds=0.0, scaling=0.0) for entry in comparison.entries)
    return replace(comparison, entries=entries, versions={}).render(140).splitlines()


def sweep_page(result: Any) -> list[str]:
    runs = tuple(replace(run, seconds=0.0) for run in result.runs)
    return replace(result, runs=runs, versions={}).render(160).splitlines()
