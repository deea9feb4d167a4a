"""Settings of a repair."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

from torch import Tensor, nn

from lightning_nrl._utils.resume import SAVE_EVERY
from lightning_nrl.data.targets import AllFailures, Target, parse_target
from lightning_nrl.errors import ConfigurationError, check_kind, check_real, check_whole
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.evaluation.evaluator import Need
from lightning_nrl.evaluation.layers import layer_names
from lightning_nrl.gate import Gate
from lightning_nrl.localization import LOCALIZERS, Localizer, NeuRecoverLite
from lightning_nrl.methods import METHODS, AnyMethod, Auto, Method
from lightning_nrl.methods.problem import N_SCORED
from lightning_nrl.records.stats import check_confidence
from lightning_nrl.search import FITNESSES
from lightning_nrl.search.fitness import Fitness, FitnessFunction


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search: how candidates (new values for some weights) are ranked, and what is
    searched.

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
        n_scored: maximum number of known samples that the search uses: failed samples, samples near
            the decision boundary, and random other samples. If time is short, fewer are used. The
            gate counts all known samples.
        memory_limit: device memory for the search, in bytes. None takes a share of the free memory. Half
            of the limit holds recorded activations. With a GPU, main memory holds further
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
        for name, value in (("n_passed", self.n_passed), ("memory_limit", self.memory_limit)):
            if value is not None:
                check_whole(name, value, 1)
        check_whole("n_scored", self.n_scored, 2)
        if self.save_every is not None:
            check_real(
                "save_every",
                self.save_every,
                "time",
                "give seconds from 0, or None to save nothing.",
                least=0,
            )


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
        'tolerance:0.01'
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
                    f"`strength={self.strength!r}` and `limit={str(self.limit)!r}` both set the strength.",
                    "give one of them.",
                )


def changed_options(options: Any) -> dict[str, Any]:
    """Returns the fields of an option object that differ from the defaults."""
    plain = type(options)()

    def same(value: Any, default: Any) -> bool:
        return value is default or (type(value) is type(default) and bool(value == default))

    return {
        name: value
        for name, value in _fields(options).items()
        if not same(value, getattr(plain, name))
    }


AnyGate = str | Gate
parse_gate = Gate.parse

OPTIONS = {"search": SearchOptions, "bounds": BoundOptions, "samples": SampleOptions}


@dataclass(frozen=True)
class Settings:
    """Settings of a repair. The defaults repair as many samples as possible while no known sample
    breaks.

    Attributes:
        target: the failures to repair, also as text such as `label 3`.
        layer: dotted name of a layer to search, or several names. `auto` takes the last Linear, or
            the last convolution if there is no Linear. With `auto`, methods that train may change
            the whole network. They also accept the name of a block, such as `encoder.2`. Then all
            layers in the block may change.
        gate: the condition for accepting a repair.
        method: finds new weights, by name or as an object (see `lightning_nrl.methods`).
        max_time: time limit in seconds. None limits the work by the number of epochs of the
            original fit.
        seed: seed of sampling and search, from 0 to 2^32 - 1.
        search: options of the search.
        bounds: how much of the weight change to make, and the bounds to report.
        samples: which samples matter most, which must not break, and which are left out.

    Raises:
        ConfigurationError: on construction, for a wrong type or a value out of range. Settings that
            depend on the model, such as the layer, are checked when the repair begins.

    Example:
        >>> Settings(target=Target.label(3)).plain()["target"]
        'label 3'
    """

    target: Target = field(default_factory=AllFailures)
    layer: str | Sequence[str] = "auto"
    gate: Gate = field(default_factory=Gate.instance)
    method: AnyMethod = field(default_factory=Auto)
    max_time: float | None = None
    seed: int = 0
    search: SearchOptions = field(default_factory=SearchOptions)
    bounds: BoundOptions = field(default_factory=BoundOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)

    def __post_init__(self) -> None:
        for name, kind in OPTIONS.items():
            value = getattr(self, name)
            check_kind(
                name, value, isinstance(value, kind), kind.__name__, f"{name}={kind.__name__}(...)"
            )
        object.__setattr__(self, "target", parse_target(self.target))
        object.__setattr__(self, "gate", parse_gate(self.gate))
        object.__setattr__(self, "method", METHODS.parse("method", self.method))
        if isinstance(self.method, Method):
            # The user's choice overrides the method's.
            method = self.method.with_parts(
                localizer=self.search.localizer, fitness=self.search.fitness
            )
            object.__setattr__(self, "method", method)
        layer_names(self.layer)
        check_whole("seed", self.seed, 0, 2**32 - 1)
        if self.max_time is not None:
            check_real(
                "max_time",
                self.max_time,
                "time",
                "give seconds above 0, or None for no limit.",
                above=0,
            )

    @property
    def fitness(self) -> FitnessFunction:
        """The fitness in `search`. If it is None, the fitness of the method or, without one,
        `lexicographic`.
        """
        of_method = self.method.fitness if isinstance(self.method, Method) else None
        return FITNESSES.parse("fitness", self.search.fitness or of_method or Fitness())

    @property
    def localizer(self) -> Localizer:
        """The localizer in `search`. If it is None, the localizer of the method or, without one,
        `neurecover-lite`.
        """
        of_method = self.method.localizer if isinstance(self.method, Method) else None
        return LOCALIZERS.parse("localizer", self.search.localizer or of_method or NeuRecoverLite())

    @property
    def trains(self) -> bool:
        """True if the method can train the model further. Such a method needs no layer to search."""
        return isinstance(self.method, Method) and self.method.trains

    @property
    def needs(self) -> tuple[Need, ...]:
        """Requirements of the method on task and data."""
        return self.method.needs if isinstance(self.method, Method) else ()

    @property
    def limit(self) -> Gate | None:
        return cast("Gate | None", self.bounds.limit)

    def plain(self) -> dict[str, Any]:
        """Returns settings and options by name, in one dict of JSON-like values. Equal settings
        give equal dicts.
        """
        flat = {name: value for name, value in _fields(self).items() if name not in OPTIONS}
        for name in OPTIONS:
            flat |= _fields(getattr(self, name))
        flat |= {"fitness": self.fitness, "localizer": self.localizer}
        return {name: plain_value(value) for name, value in flat.items()}


def plain_value(value: Any) -> Any:
    """Converts a value to plain JSON values, without memory addresses, so that equal runs give
    equal values.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Target, Gate)):
        return str(value)
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Mapping):
        if value and all(isinstance(item, Tensor) for item in value.values()):
            return f"{len(value)} tensors"
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_value(item) for item in value), key=str)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        return {
            "class": type(value).__name__,
            **{name: plain_value(item) for name, item in _fields(value).items()},
        }
    shown: Any = type(value).__repr__
    if shown is object.__repr__:
        own = getattr(value, "__dict__", {}).items()
        simple = {
            name: item
            for name, item in own
            if item is None or isinstance(item, (bool, int, float, str))
        }
        return {"class": type(value).__name__, **simple}
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}
