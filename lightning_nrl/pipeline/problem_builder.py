"""The one place that turns evaluated data and settings into a `Problem`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.pipeline.input_checks import passed_rows
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.problem import Problem, Training

__all__ = ["build_problem"]


def build_problem(
    evaluator: Evaluator,
    known: Sequence[Source],
    before: SampleResults,
    layers: tuple[ParameterSpace, tuple[str, ...]],
    settings: Settings,
    *,
    clock: StageTimer | None = None,
    training: Training | None = None,
    update: bool = False,
    needed: Mapping[str, int] | None = None,
) -> Problem:
    """What a method is given.

    Args:
        evaluator: the original model and what judges it.
        known: data that methods may look at.
        before: what the model does on them.
        layers: the weights to be searched, and the names of those that may change at all (`find_scope`).
        settings: what was asked for.
        clock: what is left of the time; None: there is no limit.
        training: goes on with the training.
        update: whether the model replaces another one that gets the targets right.
        needed: how many targets of a slice are to be repaired at least.
    """
    space, scope = layers
    return Problem(
        evaluator,
        known,
        before,
        space,
        scope,
        settings.localizer,
        settings.fitness,
        passed_rows(before, known, settings),
        clock=StageTimer() if clock is None else clock,
        seed=settings.seed,
        budget=settings.search.budget,
        training=training,
        whole=settings.layer == "auto",
        update=update,
        needed={} if needed is None else needed,
    )
