"""Options of a repair that most people leave alone: how it searches, and how far it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_nrl._utils.saved_work import SAVE_EVERY
from lightning_nrl.errors import ConfigurationError, check_choice, check_real, check_whole
from lightning_nrl.gate import Gate
from lightning_nrl.localization import LOCALIZERS, Localizer
from lightning_nrl.problem.problem import N_SCORED
from lightning_nrl.search import FITNESSES
from lightning_nrl.search.fitness import Fitness, FitnessFunction
from lightning_nrl.stats.binomial import check_confidence
from lightning_nrl.stats.weighted import check_shares

__all__ = ["BoundOptions", "SearchOptions", "changed_options"]


@dataclass(frozen=True)
class SearchOptions:
    """How candidates for new weights are ranked, and over which weights and samples they are searched.

    Attributes:
        fitness: how candidates are ranked: `lexicographic` (fewer broken, then more repaired, then lower loss), `eq1`
            and `eq2` (the paper's equations), `arachne`, `arachne-de`, `neurecover`, or a `Fitness`. None: as the
            method says, else `lexicographic`.
        localizer: how the weights to be searched are chosen: `neurecover-lite`, `neurecover`, `arachne`, `arachne-v2`,
            `gradient`, `random`, `all`, or an object such as `NeuRecoverLite(n_weights=32)`. None: as the method says,
            else `neurecover-lite`.
        n_passed: how many passed samples the search scores (#pos in the paper), drawn from the `passed` data; None:
            all that are known.
        n_scored: how many known samples a search records, localises on and scores, at most: failed ones, those nearest
            to the border, and a draw from all others; fewer where `max_time` is too short to prepare it. What it finds
            is counted, and judged, on all known samples.
        budget: bytes that the search may use on the device; None: a share of what is free. Half of it is for the
            activations that are recorded of the data (beside a GPU's, main memory is used too). What does not fit is
            computed again each time, and the step's note says so.
        on_interrupt: what Ctrl-C does while the repair works. `untouched`: it stops, and the weights stay as they are.
            `best`: it ends early with the best that it has found so far, which is judged and saved as always; a second
            Ctrl-C stops it. SIGTERM always stops it, and so does Ctrl-C where there are several ranks.
        save_every: seconds between two times that a repair in a trainer saves what it has done, from 0: the same call
            goes on from there after it was stopped or killed. None: it saves nothing.

    Raises:
        ConfigurationError: on construction, for a value of the wrong kind or out of its range.

    Example:
        >>> SearchOptions(n_passed=500).n_passed
        500
    """

    fitness: str | Fitness | FitnessFunction | None = None
    localizer: str | Localizer | None = None
    n_passed: int | None = None
    budget: int | None = None
    on_interrupt: Literal["untouched", "best"] = "untouched"
    save_every: float | None = SAVE_EVERY
    n_scored: int = N_SCORED

    def __post_init__(self) -> None:
        if self.fitness is not None:
            object.__setattr__(self, "fitness", FITNESSES.parse("fitness", self.fitness))
        if self.localizer is not None:
            object.__setattr__(self, "localizer", LOCALIZERS.parse("localizer", self.localizer))
        for name, value in (("n_passed", self.n_passed), ("budget", self.budget)):
            if value is not None:
                check_whole(name, value, 1)
        check_whole("n_scored", self.n_scored, 2)
        check_choice("on_interrupt", self.on_interrupt, ("untouched", "best"))
        if self.save_every is not None:
            check_real("save_every", self.save_every, "time", "give seconds from 0, or None to save nothing.", least=0)


@dataclass(frozen=True)
class BoundOptions:
    """How much of the change that was found is made, and which limits are given for data to come.

    Attributes:
        strength: how much of the change is made, above 0 to 2; None: all of it (1), or more where that repairs more and
            breaks no known sample and no more of the calibration data.
        limit: how many calibration samples may break, as a gate such as `tolerance:1%`: the greatest strength within it
            is taken. None: there is no limit.
        sparse: the share of repaired targets, from 0 to below 1, that may be lost for a patch of fewer changed weights;
            None: no weights are spared.
        confidence: of the limits that the report gives from calibration data, in (0, 1).
        mix: the expected share of each slice, or without slices of each class, among samples that are right before, for
            a limit under this mix.

    Raises:
        ConfigurationError: on construction, for a value of the wrong kind or out of its range, or for a strength and a
            limit.

    Example:
        >>> str(BoundOptions(limit="tolerance:1%").limit)
        'tolerance:0.01'
    """

    strength: float | None = None
    limit: str | Gate | None = None
    sparse: float | None = None
    confidence: float = 0.95
    mix: Mapping[str | int, float] | None = None

    def __post_init__(self) -> None:
        if self.strength is not None:
            hint = "give a number above 0 and at most 2, or None."
            check_real("strength", self.strength, "strength", hint, above=0, most=2)
        if self.sparse is not None:
            hint = "give a share from 0 to below 1 of the repairs, or None."
            check_real("sparse", self.sparse, "share", hint, least=0, below=1)
        check_confidence(self.confidence)
        if self.mix is not None:
            check_shares("mix", self.mix)
        if self.limit is not None:
            object.__setattr__(self, "limit", Gate.parse(self.limit, "limit"))
            if self.strength is not None:
                raise ConfigurationError(
                    f"`strength={self.strength!r}` and `limit={str(self.limit)!r}` both say how far to go.",
                    "give one of them.",
                )


def changed_options(options: Any) -> dict[str, Any]:
    """The fields of an option object that are not as by default."""
    plain = type(options)()
    own = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in own.items() if not _same(value, getattr(plain, name))}


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))
