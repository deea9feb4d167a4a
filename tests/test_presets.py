from __future__ import annotations

import pytest

from lightning_nrl import ConfigurationError, RegressionFreeRepair, Settings
from lightning_nrl.study import TABLE_II, paper_arguments
from lightning_nrl.study.table_ii import paper_row

PRINTED = """
EXP-A1 (1) 6 False 309 500 100
EXP-B1 (1) 6 False 282 500 200
EXP-C1 (2) 8 True 32 500 200
EXP-A2 (1) 6 False 309 500 200
EXP-A3 (1) 5 False 309 500 200
EXP-A4 (1) 4 False 309 500 200
EXP-B2 (1) 5 False 282 500 200
EXP-B3 (1) 4 False 282 500 200
EXP-B4 (1) 6 False 282 1000 200
EXP-C2 (2) 8 True 76 500 200
EXP-C3 (2) 8 True 53 500 200
EXP-C4 (2) 8 True 16 500 200
"""


@pytest.mark.parametrize("line", PRINTED.split("\n")[1:-1])
def test_a_row_is_what_the_paper_prints(line):
    name, equation, alpha, pi, n_weights, n_passed, particles = line.split()
    settings = Settings(**paper_arguments(name))
    assert settings.fitness.kind == {"(1)": "eq1", "(2)": "eq2"}[equation]
    assert settings.fitness.alpha == float(alpha)
    assert settings.fitness.perfect_intact is (pi == "True")
    assert settings.localizer == type(settings.localizer)(n_weights=int(n_weights))
    assert settings.search.n_passed == int(n_passed)
    assert settings.method.particles == int(particles)


def test_all_twelve_rows_are_there():
    assert list(TABLE_II) == [line.split()[0] for line in PRINTED.split("\n")[1:-1]]


def test_what_the_paper_says_outside_the_table():
    settings = Settings(**paper_arguments("EXP-C1"))
    assert settings.fitness.beta == 0.25
    assert settings.fitness.infeasible == "zero"
    assert settings.method.start == "paper"
    assert str(settings.gate) == "accuracy"
    # The swarm stops as Arachne's does.
    assert (settings.method.iterations, settings.method.patience) == (100, 10)


def test_the_callback_takes_a_row_and_what_the_user_adds():
    repair = RegressionFreeRepair.from_paper("EXP-B4", gate="instance", seed=3)
    arguments = {**paper_arguments("EXP-B4"), "gate": repair.settings.gate, "seed": 3}
    assert repair.settings == Settings(**arguments)
    assert str(repair.settings.gate) == "instance"


@pytest.mark.parametrize("row", ["EXP-B5", "b1", "", None])
def test_a_row_that_is_not_there_is_refused_with_the_nearest(row):
    with pytest.raises(ConfigurationError, match=r"`row=.*is unknown[\s\S]*HINT: .*'EXP-"):
        paper_row(row)
