"""The one place that turns evaluated data and settings into a `Problem`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._utils.saved_work import SavedWork
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation import Evaluator, SampleResults
from lightning_nrl.pipeline._input_checks import passed_rows
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.problem import Problem, Training
from lightning_nrl.problem.problem import TargetedTraining

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
    work: SavedWork | None = None,
) -> Problem:
    """What a method is given; `layers` as `find_scope` gives them, without a clock there is no limit of time."""
    space, scope = layers
    if isinstance(training, TargetedTraining):
        training = training.for_targets(before.targeted)
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
        n_scored=settings.search.n_scored,
        training=training,
        whole=settings.layer == "auto",
        update=update,
        needed={} if needed is None else needed,
        gate=settings.gate,
        work=SavedWork() if work is None else work,
    )
