"""The 66 settings of the study, and series of settings that differ in one parameter.

The paper prints twelve of its 66 settings (Table II); the others were found by hand. The settings
here are those twelve and variations of them: each parameter of the table is varied around its two
kinds of row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_nrl.study import TABLE_II, PaperRow

ALPHAS = (1, 4, 5, 6)
WEIGHTS = (16, 32, 53, 76)
PASSED = (500, 1000)


def studied() -> tuple[PaperRow, ...]:
    """Returns 66 settings. The twelve of Table II come first.

    - Equation (1), as in the rows of A and B, with 200 particles: alpha = 1, 4, 5, 6, #lw = 8, 16,
      32, 53, 282, and #pos = 500, 1000 (40); as the rows of A, with #lw = 309 (5). The paper has no
      alpha below 4; with 1, a regression costs little compared with a repair.
    - Equation (2) under perfect intact and alpha = 8, as in the rows of C: #lw = 8, 16, 32, 53, 76,
      and #pos = 500, 1000 (10).
    - Equation (1) under perfect intact, and equation (2) without it, to separate the two effects:
      alpha = 8 and #pos = 500 (8).
    - Half the number of particles (3).
    """
    rows = list(TABLE_II.values())
    rows += [
        PaperRow("eq1", alpha, False, n, passed, 200)
        for alpha in ALPHAS
        for n in (8, 16, 32, 53, 282)
        for passed in PASSED
    ]
    rows += [PaperRow("eq2", 8, True, n, passed, 200) for n in (8, *WEIGHTS) for passed in PASSED]
    rows += [PaperRow("eq2", 8, False, n, 500, 200) for n in (16, 32, 53, 282)]
    rows += [PaperRow("eq1", 8, True, n, 500, 200) for n in (16, 32, 53, 282)]
    rows += [PaperRow("eq1", 1, False, 309, 500, 200), PaperRow("eq1", 6, False, 32, 500, 100)]
    rows += [PaperRow("eq2", 8, True, n, 500, 100) for n in (32, 76)]
    return tuple(dict.fromkeys(rows))


@dataclass(frozen=True)
class Line:
    """Series of settings that differ in one parameter.

    Attributes:
        axis: the parameter, by its column in the table.
        ends: the two values that the paper compares.
        rows: for each experiment, the row of Table II that is varied.
        shown: the experiments in the paper's figure.
    """

    axis: str
    words: str
    figure: int
    values: tuple[int, ...]
    ends: tuple[int, int]
    rows: dict[str, str]
    shown: str

    def settings(self, experiment: str) -> tuple[PaperRow, ...]:
        """Returns one setting per value."""
        name = self.axis
        return tuple(
            replace(TABLE_II[self.rows[experiment]], **{name: value}) for value in self.values
        )


LINES = (
    Line(
        "alpha",
        "intact weight (alpha)",
        4,
        ALPHAS,
        (4, 6),
        {"A": "EXP-A2", "B": "EXP-B1", "C": "EXP-B1"},
        "AB",
    ),
    Line(
        "n_passed",
        "passed samples scored (#pos)",
        5,
        PASSED,
        PASSED,
        dict.fromkeys("ABC", "EXP-B1"),
        "B",
    ),
    Line(
        "n_weights",
        "localised weights asked for (#lw)",
        6,
        WEIGHTS,
        (16, 76),
        dict.fromkeys("ABC", "EXP-C1"),
        "C",
    ),
)
