"""One run of a sweep as one row of its table."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args

from lightning_nrl._utils.deserialize import from_plain
from lightning_nrl._utils.serialize import Derives, flat, hints_of
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.report.splits import ROLES, Role

__all__ = ["RUN_COLUMNS", "Run", "run_of_text"]

DERIVED_COUNTS = {"n": int, "accuracy_before": float, "accuracy_after": float}
NO_COUNTS = TargetCounts(0, 0, 0, 0)


@dataclass(frozen=True)
class Run(Derives):
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
        known: what becomes of known samples; in the table `known_broken` and so on.
        calibration: what becomes of calibration samples; None where there are none.
        unseen: what becomes of unseen samples; None where there are none.
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
    known: TargetCounts = field(metadata=flat("known_"))
    calibration: TargetCounts | None = field(default=None, metadata=flat("calibration_"))
    unseen: TargetCounts | None = field(default=None, metadata=flat("unseen_"))
    seconds: float = 0.0

    @property
    def regression_free(self) -> bool:
        """Whether something known is repaired and nothing known broken, in the target or not."""
        return self.known.broken == 0 and self.known.repaired > 0

    def has(self, role: Role) -> bool:
        """Whether there were data of this role."""
        return self._of(role) is not None

    def counts(self, role: Role) -> TargetCounts:
        """What became of the samples of a role; all 0 where there are none."""
        return self._of(role) or NO_COUNTS

    @property
    def derived(self) -> Mapping[str, object]:
        return {
            f"{role}_{name}": getattr(self.counts(role), name) if self.has(role) else None
            for role in ROLES
            for name in DERIVED_COUNTS
        }

    def _of(self, role: Role) -> TargetCounts | None:
        return {"known": self.known, "calibration": self.calibration, "unseen": self.unseen}[role]


def _kinds() -> dict[str, tuple[Any, ...]]:
    """Which types each column may have, in the order of the table."""
    own = {name: get_args(hint) or (hint,) for name, hint in hints_of(Run).items()}
    seconds = own.pop("seconds")
    counted = {"n": int} | dict.fromkeys((f.name for f in fields(TargetCounts)), int) | DERIVED_COUNTS
    roles = {f"{role}_{name}": (kind, NoneType) for role in ROLES for name, kind in counted.items()}
    return {name: own[name] for name in own if name not in ROLES} | roles | {"seconds": seconds}


_KINDS = _kinds()
RUN_COLUMNS = tuple(_KINDS)
"""The columns of the table."""


def run_of_text(row: Mapping[str, str]) -> Run:
    """Reads a line of the table, as `csv.DictReader` gives it; a `ConfigurationError` names what is wrong."""
    return from_plain(Run, {name: _value(text, _KINDS.get(name, ())) for name, text in row.items()})


def _value(text: str, kinds: tuple[Any, ...]) -> object:
    """A cell as one of some types; as it is if it is none of them."""
    if not text and NoneType in kinds:
        return None
    if bool in kinds:
        return {"True": True, "False": False}.get(text, text)
    for kind in (int, float):
        with suppress(ValueError):
            if kind in kinds:
                return kind(text)
    return text
