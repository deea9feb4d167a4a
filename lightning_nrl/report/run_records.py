"""How a repair went, stage by stage, without the weights themselves: records, as a report has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from platform import python_version

from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts


def installed_versions() -> dict[str, str]:
    """Versions of the software that a repair depends on, by name."""
    found = {"python": python_version()}
    for name in ("lightning_nrl", "torch", "pytorch-lightning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@dataclass(frozen=True)
class Judge:
    """In what the model was computed that was judged, and how many verdicts hang on it.

    Attributes:
        precision: the device, the dtypes, TensorFloat-32 and the flags of cuDNN.
        rounding: how far rounding may move a margin there, an estimate; None where the task has no margins.
        within_rounding: known samples that the model of now gets right by less than that: another device or batch size
            may see them wrong.
    """

    precision: DeployedPrecision
    rounding: float | None = None
    within_rounding: int = 0


@dataclass(frozen=True)
class Step:
    """One step of a method, such as `fit`, `polish` or `convex`, as a line of the report.

    After it so many targeted samples pass (`repaired`), and so many known passed samples do not any more (`broken`).
    """

    name: str
    repaired: int
    broken: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Rung:
    """One rung of the default's ladder, from the least change to the most.

    Attributes:
        name: `search` of localised weights of the chosen layer, its `exact` programmes, or `training` that goes on.
        repaired_in_target: targeted samples that pass.
        repaired: known samples that fail before and pass after it, in the target or not.
        broken: known passed samples that fail after it.
        weights_changed: weights that differ from the original ones.
        seconds: wall time.
        held_out: what the same procedure does to known samples when it may not use them; None where that was not tried.
        taken: whether the repair is this one.
        note: how it went, in words.
    """

    name: str
    repaired_in_target: int
    repaired: int
    broken: int
    weights_changed: int
    seconds: float
    held_out: TargetCounts | None = None
    taken: bool = False
    note: str = ""


@dataclass(frozen=True)
class PricePoint:
    """The best that was found where so many known passed samples may break: what a guarantee costs.

    Attributes:
        allowed: share of the known passed samples that may break, from 0; 1: any number.
        broken: known passed samples that do.
        repaired_in_target: targeted samples that pass.
        repaired: known samples that fail before and pass then, in the target or not.
        held_out: what the procedure does to known samples that it may not use; None where that was not tried.
    """

    allowed: float
    broken: int
    repaired_in_target: int
    repaired: int
    held_out: TargetCounts | None = None


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
        n_failed: failed samples that every candidate was scored on, |I_neg|; None if not noted.
        n_passed: passed samples, likewise, |I_pos|.
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
    """SHA-256 of weights as training left them and as they are now, see `hash_tensors`.

    Of the repaired layers, and of the whole state dict if that was hashed.
    """

    layers_before: str
    layers_after: str
    model_before: str | None = None
    model_after: str | None = None


@dataclass(frozen=True)
class StrengthPoint:
    """What a patch does at one strength: 0 for the original weights and 1 for the patch.

    Attributes:
        repaired_in_target: targeted samples that pass.
        known: what becomes of all known samples.
        calibration: what becomes of the calibration data; None if there are none.
        polished: whether the weights were polished there, and the counts are those after it.
        gain: what the repaired targets are worth; None: as many as they are.
        harm: what the broken known samples cost by the gate; `calibration_harm` likewise.
    """

    strength: float
    repaired_in_target: int
    known: FlipCounts
    calibration: FlipCounts | None = None
    polished: bool = False
    gain: float | None = None
    harm: float | None = None
    calibration_harm: float | None = None

    @property
    def worth(self) -> float:
        """What the repaired targets are worth."""
        return self.repaired_in_target if self.gain is None else self.gain

    @property
    def cost(self) -> float:
        """What the broken known samples cost."""
        return self.known.broken if self.harm is None else self.harm

    @property
    def calibration_cost(self) -> float:
        """What the broken calibration samples cost; 0 without any."""
        if self.calibration_harm is not None:
            return self.calibration_harm
        return 0 if self.calibration is None else self.calibration.broken


@dataclass(frozen=True)
class WeightChange:
    """The difference between two versions of the same tensors: how many of all weights `changed`, and how far.

    `l2` is the Euclidean norm, `relative` that over the norm of the old weights (NaN if those are all 0), `largest` the
    largest absolute difference of a weight.
    """

    changed: int
    total: int
    l2: float
    relative: float
    largest: float


@dataclass(frozen=True)
class CalibrationBounds:
    """How many calibration samples broke, and at most how many others like them do.

    Attributes:
        broken: how many broke.
        n: how many were right before.
        confidence: with which the limit holds, in (0, 1).
        upper: the limit on the rate at which others like them break, in (0, 1].
        states: how many sets of weights the calibration data might have chosen; 1 if they had no say.
        allowed: the count up to which weights were accepted, one strength after the other, from weak to strong, if that
            is how these were; else None. The limit is then that of this count.
    """

    broken: int
    n: int
    confidence: float
    upper: float
    states: int = 1
    allowed: int | None = None


def choice_text(rungs: Sequence[Rung], choice: str) -> str:
    """Why a rung was taken, in a sentence; `choice` is what the method says, for where there are no estimates."""
    number = next((i for i, rung in enumerate(rungs) if rung.taken), None)
    if number is None or rungs[number].held_out is None:
        return choice
    name = f"`{rungs[number].name}`"
    later = rungs[number + 1 :]
    if not later:
        return f"{name} is taken: of the rungs that held-out samples do not speak against, it changes the most."
    return f"{name} is taken: {', '.join(_against(rung, rungs[number]) for rung in later)}."


def _against(rung: Rung, taken: Rung) -> str:
    """Why a rung was not taken that changes more than the one that was."""
    if not rung.repaired_in_target:
        given_up = rung.held_out is not None and rung.held_out.broken > rung.held_out.repaired
        return f"held-out samples speak against `{rung.name}`" if given_up else f"`{rung.name}` repairs no target"
    if rung.held_out is None:
        return f"`{rung.name}` breaks more than the gate allows"
    if rung.repaired_in_target < taken.repaired_in_target:
        return f"`{rung.name}` repairs fewer targets"
    return f"held-out samples speak against `{rung.name}`"
