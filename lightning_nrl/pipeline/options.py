"""Options of a repair: of its search, and of the strength and the bounds of its weight change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_nrl._utils.resume import SAVE_EVERY
from lightning_nrl.errors import ConfigurationError, check_real, check_whole
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.evaluation.stats import check_confidence
from lightning_nrl.gate import Gate
from lightning_nrl.localization import LOCALIZERS, Localizer
from lightning_nrl.methods.problem import N_SCORED
from lightning_nrl.pipeline.plain_values import fields_of
from lightning_nrl.search import FITNESSES, Fitness, FitnessFunction


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search: how candidates are ranked, and what is searched.

    A candidate is new values for some weights.

    Attributes:
        fitness: ranks the candidates: `lexicographic` (fewer broken samples, then more repaired
            samples, then a lower loss), `eq1` and `eq2` (the paper's equations), `arachne`,
            `arachne-de`, `neurecover`, or a `Fitness`. None takes the fitness of the method, or
            `lexicographic` if the method has no fitness.
        localizer: chooses the weights to search: `neurecover-lite`, `neurecover`, `arachne`,
            `arachne-v2`, `gradient`, `random`, `all`, or an object such as
            `NeuRecoverLite(n_weights=32)`. None takes the localizer of the method, or
            `neurecover-lite` if the method has no localizer.
        n_passed: number of passed samples to score (#pos in the paper), drawn at random from
            sources marked `passed`. None scores all known passed samples.
        n_scored: maximum number of known samples that a search or `convex` uses: failed samples,
            samples near the decision boundary, and random other samples. If time is short, or if
            the method trains with all samples too, fewer are used. The gate counts all known
            samples.
        memory_limit: device memory for the search, in bytes. None takes a share of the free memory.
            Half of the limit holds recorded activations. With a GPU, main memory holds further
            activations. All others are recomputed.
        save_every: in a trainer, the result of each step of the repair is saved if the step took at
            least this many seconds. If the run is stopped or killed, the same call skips the saved
            steps. None saves nothing.

    Raises:
        ConfigurationError: on construction, for a wrong type or a value out of range.

    Example:
        >>> SearchOptions(n_passed=500).n_passed
        500
    """

    fitness: str | Fitness | FitnessFunction | None = None
    localizer: str | Localizer | None = None
    n_passed: int | None = None
    memory_limit: int | None = None
    save_every: float | None = SAVE_EVERY
    n_scored: int = N_SCORED

    def __post_init__(self) -> None:
        if self.fitness is not None:
            object.__setattr__(self, "fitness", FITNESSES.parse("fitness", self.fitness))
        if self.localizer is not None:
            object.__setattr__(self, "localizer", LOCALIZERS.parse("localizer", self.localizer))
        if self.n_passed is not None:
            check_whole("n_passed", self.n_passed, 1)
        if self.memory_limit is not None:
            check_whole("memory_limit", self.memory_limit, 1)
        check_whole("n_scored", self.n_scored, 2)
        if self.save_every is not None:
            hint = "give seconds from 0, or None to save nothing."
            check_real("save_every", self.save_every, "time", hint, least=0)


@dataclass(frozen=True)
class BoundOptions:
    """How much of the weight change to make, and which bounds to report for future data.

    Attributes:
        strength: the share of the weight change to make, above 0 and at most 2. None takes 1 or,
            with calibration data, a greater strength that repairs more targets than 1, breaks no
            known sample, and breaks no more calibration samples than 1.
        limit: how many calibration samples may break, as a gate such as `tolerance:1%`. The
            greatest strength within this limit is taken. None sets no limit.
        sparse: share of the repaired targets (0 to below 1) to give up for fewer changes. None
            keeps all changes.
        confidence: confidence of the bound from calibration data, in (0, 1).

    Raises:
        ConfigurationError: on construction, for a wrong type, a value out of range, or both a
            strength and a limit.

    Example:
        >>> str(BoundOptions(limit="tolerance:1%").limit)
        'tolerance:1%'
    """

    strength: float | None = None
    limit: str | Gate | None = None
    sparse: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.strength is not None:
            hint = "give a number above 0 and at most 2, or None."
            check_real("strength", self.strength, "strength", hint, above=0, most=2)
        if self.sparse is not None:
            hint = "give a share from 0 to below 1 of the repairs, or None."
            check_real("sparse", self.sparse, "share", hint, least=0, below=1)
        check_confidence(self.confidence)
        if self.limit is not None:
            object.__setattr__(self, "limit", Gate.parse(self.limit, "limit"))
            if self.strength is not None:
                raise ConfigurationError(
                    f"`strength={self.strength!r}` and `limit={str(self.limit)!r}` "
                    "both set the strength.",
                    "give one of them.",
                )


OPTIONS = {"search": SearchOptions, "bounds": BoundOptions, "samples": SampleOptions}


def changed_options(options: object) -> dict[str, Any]:
    """Returns the fields of an option object that differ from the defaults."""
    defaults = fields_of(type(options)())
    changed = {}
    for name, value in fields_of(options).items():
        default = defaults[name]
        # 0 and False are equal, but not the same option.
        if (type(value), value) != (type(default), default):
            changed[name] = value
    return changed
