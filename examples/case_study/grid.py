"""The 66 settings of the study, and the lines through them along which one number changes.

The paper prints twelve of its 66 settings (Table II) and says of the others that they were looked for by hand. These
are the twelve and what lies between them: every number that the table has, varied around its two kinds of row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_nrl.pipeline import TABLE_II, PaperRow

ALPHAS = (1, 4, 5, 6)
WEIGHTS = (16, 32, 53, 76)
PASSED = (500, 1000)


def studied() -> tuple[PaperRow, ...]:
    """Sixty-six settings, the twelve of Table II first.

    - Equation (1), as in the rows of A and B, with 200 particles: alpha = 1, 4, 5, 6, #lw = 8, 16, 32, 53, 282, and
      #pos = 500, 1000 (40); as the rows of A, with #lw = 309 (5). The paper has no alpha below 4; 1 is where a
      regression costs little beside what a repair earns.
    - Equation (2) under perfect intact and alpha = 8, as in the rows of C: #lw = 8, 16, 32, 53, 76, and #pos = 500,
      1000 (10).
    - Which of the two makes the difference, the equation or perfect intact: each with the other's, alpha = 8 and
      #pos = 500 (8).
    - Half as many particles (3).
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
    """Settings that differ in one number alone.

    Attributes:
        axis: which number, by its column in the table.
        ends: the values between which the paper says what happens.
        rows: for each experiment the row of Table II that all others are like.
        shown: the experiments that the paper shows.
    """

    axis: str
    words: str
    figure: int
    values: tuple[int, ...]
    ends: tuple[int, int]
    rows: dict[str, str]
    shown: str

    def settings(self, experiment: str) -> tuple[PaperRow, ...]:
        """One for each value."""
        name = self.axis
        return tuple(replace(TABLE_II[self.rows[experiment]], **{name: value}) for value in self.values)


LINES = (
    Line("alpha", "intact weight (alpha)", 4, ALPHAS, (4, 6), {"A": "EXP-A2", "B": "EXP-B1", "C": "EXP-B1"}, "AB"),
    Line("n_passed", "passed samples scored (#pos)", 5, PASSED, PASSED, dict.fromkeys("ABC", "EXP-B1"), "B"),
    Line("n_weights", "localised weights asked for (#lw)", 6, WEIGHTS, (16, 76), dict.fromkeys("ABC", "EXP-C1"), "C"),
)
