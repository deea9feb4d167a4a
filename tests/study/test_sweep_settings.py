from __future__ import annotations

from typing import Any

import pytest

from lightning_nrl import ConfigurationError, Grid, ParticleSwarm, Settings
from lightning_nrl.localization import AllWeights, NeuRecoverLite
from lightning_nrl.search import Fitness
from lightning_nrl.study.grid import parse_settings
from lightning_nrl.study.run_sweep import parse_seeds

BASE = Settings(method=ParticleSwarm(iterations=20))


def names(settings: Any, base: Settings = BASE) -> list[str]:
    return [setting.name for setting in parse_settings(settings, base)]


def test_a_grid_is_the_product_of_its_axes_and_the_last_runs_fastest():
    grid = Grid(fitness="eq1", alpha=[4, 5], n_weights=[16, 32], patience=[10, 50])
    assert names(grid) == [
        f"eq1 alpha={alpha} lw={n} pos=all p=100{patience}"
        for alpha in (4, 5)
        for n in (16, 32)
        for patience in (" patience=10", "")
    ]
    setting = parse_settings(grid, BASE)[0]
    assert setting.fitness == Fitness("eq1", alpha=4)
    assert setting.method == ParticleSwarm(iterations=20, patience=10)
    assert setting.localizer == NeuRecoverLite(n_weights=16)
    assert (
        repr(grid) == "Grid(fitness=['eq1'], alpha=[4, 5], n_weights=[16, 32], patience=[10, 50])"
    )


def test_what_makes_no_difference_is_tried_once():
    grid = Grid(fitness=["lexicographic", "eq1"], alpha=[4, 6], perfect_intact=[False, True])
    assert names(grid) == [
        "lexicographic lw=auto pos=all p=100",
        *(f"eq1 alpha={alpha}{pi} lw=auto pos=all p=100" for alpha in (4, 6) for pi in ("", " pi")),
    ]
    assert names([{"alpha": 4, "name": "a"}, {"alpha": 4, "name": "a"}]) == ["a"]
    # As the paper's 0 it does make one.
    assert (
        len(names(Grid(fitness="lexicographic", infeasible="zero", perfect_intact=[False, True])))
        == 2
    )


def test_whole_objects_are_taken_as_they_are():
    given = {
        "fitness": Fitness("eq2", alpha=8),
        "localizer": AllWeights(),
        "method": ParticleSwarm(7),
        "n_passed": 9,
    }
    (setting,) = parse_settings(given, BASE)
    assert {name: getattr(setting, name) for name in given} == given
    assert setting.name == "eq2 alpha=8 lw=all pos=9 p=7 iterations=300 AllWeights"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alfa": 4}, "`settings='alfa'` is unknown.\nHINT: did you mean 'alpha'?"),
        ({"alpha": -1}, "`fitness.alpha=-1` is no weight"),
        ({"n_passed": 0}, "`n_passed=0` is out of range"),
        ({"fitness": "eq3"}, "`fitness='eq3'` is unknown"),
        ({"localizer": AllWeights(), "n_weights": 5}, "`settings='n_weights'` is unknown"),
        ({"method": "convex"}, "`method='convex'` is no ParticleSwarm"),
        (["EXP-C1"], "`settings='EXP-C1'` is no setting"),
        ("EXP-C1", "`settings='EXP-C1'` is no list of settings"),
        ({"include_bias": True}, "some search biases and others do not"),
        ([], "`settings` is empty"),
        (3, "`settings=3` is no list of settings"),
        ([3], "`settings=3` is no setting"),
        (
            [{"alpha": 4, "name": "a"}, {"fitness": "eq1", "name": "a"}],
            "two settings have the name 'a'",
        ),
    ],
)
def test_what_cannot_be_tried_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_settings(settings, BASE)


def test_a_grid_without_values_and_another_method_are_refused():
    with pytest.raises(ConfigurationError, match="the grid has no argument"):
        Grid()
    with pytest.raises(ConfigurationError, match="`patience` has no value"):
        Grid(alpha=[4], patience=[])
    with pytest.raises(
        ConfigurationError, match=r"`method` is a Convex: a sweep runs the paper's search"
    ):
        parse_settings({"alpha": 4}, Settings(method="convex"))


def test_seeds_are_a_number_or_a_list():
    assert parse_seeds(3) == (0, 1, 2)
    assert parse_seeds([7, 5]) == (7, 5)
    for wrong in (0, [], [1, 1], "ab", True, [-1], [2**32]):
        with pytest.raises(ConfigurationError, match=r"`seeds=|`seed="):
            parse_seeds(wrong)
