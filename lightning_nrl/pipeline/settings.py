"""Settings of a repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_nrl.data import AllFailures, Target, parse_target
from lightning_nrl.errors import ConfigurationError, check_kind, check_real, check_whole
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.evaluation.evaluator import Need
from lightning_nrl.evaluation.layers import layer_names
from lightning_nrl.gate import Gate
from lightning_nrl.localization import LOCALIZERS, Localizer, NeuRecoverLite
from lightning_nrl.methods import METHODS, AnyMethod, Auto, FineTunePolish, Method
from lightning_nrl.pipeline.options import OPTIONS, BoundOptions, SearchOptions
from lightning_nrl.pipeline.plain_values import fields_of, plain_value
from lightning_nrl.search import FITNESSES, Fitness, FitnessFunction


@dataclass(frozen=True)
class Settings:
    """Settings of a repair.

    The defaults repair as many samples as possible while no known sample breaks.

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
        for name, value in fields_of(self).items():
            if name in OPTIONS:
                kind = OPTIONS[name]
                example = f"{name}={kind.__name__}(...)"
                check_kind(name, value, isinstance(value, kind), kind.__name__, example)
        object.__setattr__(self, "target", parse_target(self.target))
        object.__setattr__(self, "gate", Gate.parse(self.gate))
        method = METHODS.parse("method", self.method)
        if isinstance(method, Method):
            # The user's choice overrides the method's.
            method = method.with_parts(localizer=self.search.localizer, fitness=self.search.fitness)
        object.__setattr__(self, "method", method)
        if isinstance(method, FineTunePolish) and method.lora and self.bounds.sparse is not None:
            raise ConfigurationError(
                f"`sparse={self.bounds.sparse!r}`: fewer changed weights have no low rank.",
                "leave out `sparse` or `lora`.",
            )
        layer_names(self.layer)
        check_whole("seed", self.seed, 0, 2**32 - 1)
        if self.max_time is not None:
            hint = "give seconds above 0, or None for no limit."
            check_real("max_time", self.max_time, "time", hint, above=0)

    @property
    def fitness(self) -> FitnessFunction:
        """The fitness of `search`, else of the method, else `lexicographic`."""
        fitness = self.search.fitness
        if fitness is None and isinstance(self.method, Method):
            fitness = self.method.fitness
        return FITNESSES.parse("fitness", fitness or Fitness())

    @property
    def localizer(self) -> Localizer:
        """The localizer of `search`, else of the method, else `neurecover-lite`."""
        localizer = self.search.localizer
        if localizer is None and isinstance(self.method, Method):
            localizer = self.method.localizer
        return LOCALIZERS.parse("localizer", localizer or NeuRecoverLite())

    @property
    def trains(self) -> bool:
        """True if the method can train the model further. It then needs no layer to search."""
        return isinstance(self.method, Method) and self.method.trains

    @property
    def needs(self) -> tuple[Need, ...]:
        """Requirements of the method on task and data."""
        if isinstance(self.method, Method):
            return self.method.needs
        return ()

    @property
    def limit(self) -> Gate | None:
        limit = self.bounds.limit
        assert not isinstance(limit, str)  # `BoundOptions` has parsed it
        return limit

    def plain(self) -> dict[str, Any]:
        """Returns settings and options by name, in one dict of JSON-like values.

        Equal settings give equal dicts.
        """
        plain: dict[str, Any] = {}
        for name, value in fields_of(self).items():
            if name in OPTIONS:
                plain |= fields_of(value)
            else:
                plain[name] = value
        plain |= {"fitness": self.fitness, "localizer": self.localizer}
        return {name: plain_value(value) for name, value in plain.items()}
