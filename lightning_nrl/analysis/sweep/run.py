"""One run of a sweep as one row of its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from lightning_nrl.evaluation.flips import FlipCounts

__all__ = ["COLUMNS", "COUNTED", "ROLES", "Run"]

ROLES = ("known", "calibration", "unseen")
COUNTED = (
    "n",
    "targeted",
    "repaired_in_target",
    "repaired",
    "broken",
    "accuracy_before",
    "accuracy_after",
)
"""What is counted of each role."""


@dataclass(frozen=True)
class Run:
    """One search with one seed, and what its weights do; the counts are those of the deployed model.

    Attributes:
        setting: its label.
        fitness: the kind of fitness.
        alpha: its intact weight; None where it has none.
        perfect_intact: whether one regression makes a candidate infeasible (pi).
        n_weights: localised weights that were asked for (#lw); None: as many as the localizer thinks fit.
        n_passed: passed samples that were scored (#pos) as asked for; None: all that are known.
        particles: of the swarm (#p).
        seed: of the sample of passed data and of the search.
        layer: the layers that were searched.
        n_localized: weights that were searched; 0 where localisation left none.
        iterations: steps that the swarm made.
        value: the fitness of the best candidate; None where nothing was searched.
        patched: samples of I_neg that it repairs, as the search counts them.
        intact: samples of the sampled I_pos that it keeps.
        changed: whether it differs from the original weights.
        known_n: known samples.
        known_targeted: of these, failures to be repaired.
        known_repaired_in_target: of these, repaired ones.
        known_repaired: known samples that were wrong and are right.
        known_broken: known samples that were right and are wrong.
        known_accuracy_before: share of known samples that were right.
        known_accuracy_after: share of known samples that are right.
        calibration_n: the same for calibration data; None, and so on, where there are none.
        unseen_n: the same for unseen data.
        seconds: wall time, its share of what was searched and counted together.
    """

    setting: str
    fitness: str
    alpha: float | None
    perfect_intact: bool
    n_weights: int | None
    n_passed: int | None
    particles: int
    seed: int
    layer: str
    n_localized: int
    iterations: int
    value: float | None
    patched: int
    intact: int
    changed: bool
    known_n: int
    known_targeted: int
    known_repaired_in_target: int
    known_repaired: int
    known_broken: int
    known_accuracy_before: float
    known_accuracy_after: float
    calibration_n: int | None = None
    calibration_targeted: int | None = None
    calibration_repaired_in_target: int | None = None
    calibration_repaired: int | None = None
    calibration_broken: int | None = None
    calibration_accuracy_before: float | None = None
    calibration_accuracy_after: float | None = None
    unseen_n: int | None = None
    unseen_targeted: int | None = None
    unseen_repaired_in_target: int | None = None
    unseen_repaired: int | None = None
    unseen_broken: int | None = None
    unseen_accuracy_before: float | None = None
    unseen_accuracy_after: float | None = None
    seconds: float = 0.0

    @property
    def regression_free(self) -> bool:
        """Whether something known is repaired and nothing known broken (instance level; paper, section III)."""
        return self.known_broken == 0 and self.known_repaired > 0

    def has(self, role: str) -> bool:
        """Whether there were data of this role."""
        return getattr(self, f"{role}_n") is not None

    def counts(self, role: str) -> FlipCounts:
        """What became of the samples of a role; all 0 where there are none."""
        if not self.has(role):
            return FlipCounts(0, 0, 0, 0)
        n, repaired, broken, before = (
            getattr(self, f"{role}_{name}") for name in ("n", "repaired", "broken", "accuracy_before")
        )
        passed = round(before * n)
        return FlipCounts(passed - broken, broken, repaired, n - passed - repaired)

    @classmethod
    def of_text(cls, row: Mapping[str, str]) -> Run:
        """Reads a line of the table, as `csv.DictReader` gives it.

        Raises:
            ValueError: a number that is none.
            KeyError: a column that is not there.
        """
        return cls(**{name: _read(row[name], kinds) for name, kinds in _KINDS.items()})


COLUMNS = tuple(field.name for field in fields(Run))
_KINDS = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Run).items()}


def _read(text: str, kinds: tuple[Any, ...]) -> Any:
    if not text and type(None) in kinds:
        return None
    if bool in kinds:
        return {"True": True, "False": False}[text]
    return kinds[0](text)
