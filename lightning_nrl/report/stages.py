"""How a repair went, stage by stage, without the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Hashes", "LocalizationReport", "SearchReport", "Step"]


@dataclass(frozen=True)
class Step:
    """One step of a method, as a line of the report.

    Attributes:
        name: such as `fit`, `polish` or `convex`.
        repaired: targeted samples that pass after it.
        broken: known passed samples that do not pass any more after it.
        seconds: wall time of it.
        note: what else is worth saying, in words.
    """

    name: str
    repaired: int
    broken: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class LocalizationReport:
    """Which weights were searched.

    Attributes:
        requested: the number of weights that was asked for (#lw); None if `n_g` was given.
        n_g: how many top weights each of the four sets had.
        sizes: sizes of the sets on the way, as in `Localization.sizes`.
    """

    requested: int | None
    n_g: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class SearchReport:
    """How the search went.

    Attributes:
        iterations: how many steps were made.
        stopped: why the search ended, in words.
        fitness: that of the best candidate.
        original_fitness: that of the unchanged weights.
        history: the curves of `SearchHistory` by name, one number an iteration.
        n_failed: failed samples that every candidate was scored on, |I_neg|; None if that was not noted.
        n_passed: passed samples that every candidate was scored on, |I_pos|; None if that was not noted.
    """

    iterations: int
    stopped: str
    fitness: float
    original_fitness: float
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    n_failed: int | None = None
    n_passed: int | None = None


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of weights, see `hash_tensors`.

    Attributes:
        layers_before: the repaired layers as training left them.
        layers_after: the repaired layers as they are now; the same if the weights stay.
        model_before: the whole state dict as training left it, if it was hashed.
        model_after: the whole state dict as it is now, if it was hashed.
    """

    layers_before: str
    layers_after: str
    model_before: str | None = None
    model_after: str | None = None
