from __future__ import annotations

import sys
from typing import Any

import pytest
from ranks import on_ranks
from toy_repairs import known, quick, trained

from lightning_nrl import ConfigurationError, Grid
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.analysis.sweep import Run, SweepResult, Trials, regression_free_repairs, sweep_module
from lightning_nrl.analysis.sweep import run_sweep as study
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.search import Fitness

GRID = Grid(fitness=["eq1", Fitness("eq2")], alpha=[1, 8], n_weights=[4, 8, 12])


def run(trials: Any, settings: Any = GRID, collective: Any = None, **arguments: Any) -> SweepResult:
    evaluator = Evaluator(trained(), collective=collective or Collective())
    return sweep_module(evaluator, known(), settings, seeds=2, base=quick(), trials=trials, **arguments)


def numbers(result: SweepResult) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {(one.setting, one.seed): (one.value, one.known.repaired, one.known.broken) for one in result.runs}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": Trials(4), "settings": "EXP-C1"}, "`trials` go through a grid, and `settings` is none"),
        ({"trials": 4}, "`trials=4` is no Trials"),
    ],
)
def test_what_is_no_trials_of_a_grid_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run(**arguments)
    for wrong in ({"n": 0}, {"n": 3, "together": 0}, {"n": 3, "score": 1}):
        with pytest.raises(ConfigurationError, match=r"`Trials\."):
            Trials(**wrong)


def test_without_optuna_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigurationError, match=r"pip install \"lightning_nrl\[optuna\]\""):
        run(Trials(2))


def test_a_sampler_runs_some_of_the_grid_and_each_run_is_that_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    made: list[int] = []
    find = study.BatchSearch.run

    def counting(self: Any, jobs: Any, on_progress: Any = None) -> Any:
        made.extend(job.seed for job in jobs)
        return find(self, jobs, on_progress)

    monkeypatch.setattr(study.BatchSearch, "run", counting)
    scored: list[Run] = []

    def score(one: Run) -> float:
        scored.append(one)
        return regression_free_repairs(one)

    trials = Trials(30, optuna.samplers.RandomSampler(seed=3), score, together=7)
    result = run(trials)
    assert len(scored) == 60
    # Nothing is run twice.
    assert 12 < len(made) == len(result.runs) <= 24
    whole = numbers(run(None))
    assert numbers(result).items() <= whole.items()
    assert optuna.logging.get_verbosity() != optuna.logging.WARNING


def test_ranks_run_what_the_first_has_chosen() -> None:
    optuna = pytest.importorskip("optuna")

    def work(collective: Any) -> SweepResult:
        sampler = optuna.samplers.RandomSampler(seed=collective.rank)
        return run(Trials(4, sampler, together=2), collective=collective)

    first, second = on_ranks(2, work)
    assert numbers(first) == numbers(second)
    assert numbers(first).items() <= numbers(run(None)).items()


def test_a_run_that_breaks_something_is_worth_less_than_none() -> None:
    best, *_, worst = sorted(run(None).runs, key=regression_free_repairs, reverse=True)
    assert regression_free_repairs(best) == best.known.repaired_in_target > 0 == best.known.broken
    assert regression_free_repairs(worst) == -worst.known.broken < 0
