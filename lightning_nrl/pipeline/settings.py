"""What to repair and how: the one value that the shells hand to the core."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from lightning_nrl._model.layers import layer_names
from lightning_nrl.data.targets import AllFailures, Target, parse_target
from lightning_nrl.errors import check_kind, check_real, check_whole
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.gate import Gate
from lightning_nrl.localization import Localizer, NeuRecoverLite
from lightning_nrl.methods import METHODS, AnyMethod, Auto, LocalSearch
from lightning_nrl.pipeline.options import BoundOptions, SearchOptions
from lightning_nrl.search.fitness import Fitness, FitnessFunction

__all__ = ["Settings", "plain_value"]

OPTIONS = {"search": SearchOptions, "bounds": BoundOptions, "samples": SampleOptions}


@dataclass(frozen=True)
class Settings:
    """What to repair and how. The defaults are the strongest regression-free setting there is.

    Attributes:
        target: which failures are to be repaired; also as text, such as `label 3`.
        layer: dotted name of the layer, several names, or `auto`: the last Linear (where there is none, the
            last convolution), and for methods that train the whole network. For these it may be a block too: all layers
            inside may change.
        gate: what a repair must satisfy to be accepted.
        method: how new weights are found, by name or as an object (see `lightning_nrl.methods`).
        max_time: seconds that the repair may take; None: about as long as the fit took, or as its method needs.
        seed: of the samples that are drawn and of the search, from 0 to 2^32 - 1.
        search: how candidates are ranked and searched.
        bounds: how much of the change is made, and which limits are given for data to come.
        samples: what each sample counts.

    Raises:
        ConfigurationError: on construction, for a value of the wrong kind or out of its range. What depends on the
            model, such as whether it has the layer, is checked when the repair begins.

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
        object.__setattr__(self, "target", parse_target(self.target))
        check_kind("gate", self.gate, isinstance(self.gate, Gate), "Gate", "Gate.instance() or Gate.parse('accuracy')")
        object.__setattr__(self, "method", METHODS.parse("method", self.method))
        if isinstance(self.method, LocalSearch):
            # What the user asked for goes before the method's own parts.
            asked = {"localizer": self.search.localizer, "fitness": self.search.fitness}
            parts: dict[str, Any] = {name: part for name, part in asked.items() if part is not None}
            object.__setattr__(self, "method", replace(self.method, **parts))
        layer_names(self.layer)
        check_whole("seed", self.seed, 0, 2**32 - 1)
        if self.max_time is not None:
            check_real("max_time", self.max_time, "time", "give seconds above 0, or None for no limit.", above=0)
        for name, kind in OPTIONS.items():
            value = getattr(self, name)
            check_kind(name, value, isinstance(value, kind), kind.__name__, f"{name}={kind.__name__}(...)")

    @property
    def fitness(self) -> FitnessFunction:
        """How candidates are ranked: as the user, else the method says."""
        said = self.search.fitness or getattr(self.method, "fitness", None) or Fitness()
        return cast(FitnessFunction, said)

    @property
    def localizer(self) -> Localizer:
        """How the weights to be searched are chosen, likewise."""
        said = self.search.localizer or getattr(self.method, "localizer", None) or NeuRecoverLite()
        return cast(Localizer, said)

    @property
    def trains(self) -> bool:
        """Whether the method goes on with the training where it can, so that it needs no layer to search."""
        return bool(getattr(self.method, "trains", False))

    @property
    def limit(self) -> Gate | None:
        """How many calibration samples may break."""
        return cast("Gate | None", self.bounds.limit)

    def plain(self) -> dict[str, Any]:
        """Dicts, lists, numbers and text that say the same, as reports keep it. Equal settings give equal values.

        The fields of the option objects stand beside the others.
        """
        own = _fields(self)
        flat = {name: value for name, value in own.items() if name not in OPTIONS}
        for name in OPTIONS:
            flat |= _fields(own[name])
        flat |= {"fitness": self.fitness, "localizer": self.localizer}
        return {name: plain_value(value) for name, value in flat.items()}


def plain_value(value: Any) -> Any:
    """A value without memory addresses, since these would tell two equal runs apart."""
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
        return {"class": type(value).__name__, **{name: plain_value(item) for name, item in _fields(value).items()}}
    shown: Any = type(value).__repr__
    if shown is object.__repr__:
        own = getattr(value, "__dict__", {}).items()
        simple = {name: item for name, item in own if item is None or isinstance(item, (bool, int, float, str))}
        return {"class": type(value).__name__, **simple}
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}
