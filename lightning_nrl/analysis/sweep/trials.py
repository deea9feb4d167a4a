"""An Optuna sampler in place of the whole product: each trial is one combination of a grid, run with every seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_nrl.analysis.sweep.grid import Grid
from lightning_nrl.analysis.sweep.run_store import Run
from lightning_nrl.errors import ConfigurationError, check_kind, check_whole

Combination = tuple[int, ...]
"""Which value of each axis."""


def regression_free_repairs(run: Run) -> float:
    """Repaired targets of a run that breaks nothing known; of any other, minus what it breaks."""
    return float(-run.known.broken if run.known.broken else run.known.repaired_in_target)


@dataclass(frozen=True)
class Trials:
    """How a sampler goes through a grid.

    Attributes:
        n: trials in all, at least 1. A combination that comes again costs nothing.
        sampler: an `optuna.samplers` object; None: Optuna's own choice, with a seed of 0.
        score: what a run is worth, of its known and calibration counts: the larger, the better; a trial's score is the
            mean over its seeds. Unseen data are not to be looked at.
        together: trials that are asked for before any of them is scored, so that they are searched in one go.

    Raises:
        ConfigurationError: on construction, for numbers below 1.
    """

    n: int
    sampler: Any = None
    score: Callable[[Run], float] = regression_free_repairs
    together: int = 8

    def __post_init__(self) -> None:
        for name in ("n", "together"):
            check_whole(f"Trials.{name}", getattr(self, name), 1)
        check_kind("Trials.score", self.score, callable(self.score), "function of a run", "score=lambda run: ...")

    def explore(
        self, grid: Grid, evaluate: Callable[[Sequence[Combination]], Sequence[Sequence[Run]]], chooses: bool
    ) -> None:
        """Has combinations of a sampler run and scored; on ranks that do not choose, `evaluate` runs its choice."""
        study = self._study() if chooses else None
        for start in range(0, self.n, self.together):
            count = min(self.together, self.n - start)
            if study is None:
                evaluate([(0,) * len(grid.axes)] * count)
                continue
            asked = [study.ask() for _ in range(count)]
            runs = evaluate([_suggested(trial, grid) for trial in asked])
            for trial, own in zip(asked, runs, strict=True):
                study.tell(trial, fmean(map(self.score, own)))

    def _study(self) -> Any:
        try:
            import optuna
        except ImportError as error:
            raise ConfigurationError(
                "`trials` needs Optuna.", 'pip install "lightning_nrl[optuna]", or run the whole grid.'
            ) from error
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            sampler = optuna.samplers.TPESampler(seed=0) if self.sampler is None else self.sampler
            return optuna.create_study(direction="maximize", sampler=sampler)
        finally:
            optuna.logging.set_verbosity(before)


def _suggested(trial: Any, grid: Grid) -> Combination:
    """Optuna keeps plain values as they are, others by their places."""
    found = []
    for name, values in grid.axes.items():
        plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in values)
        choices: list[Any] = list(values) if plain else list(range(len(values)))
        found.append(choices.index(trial.suggest_categorical(name, choices)))
    return tuple(found)
