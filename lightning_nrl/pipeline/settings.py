"""What to repair and how: the one value that the shells hand to the core."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn

from lightning_nrl._model.layers import layer_names
from lightning_nrl.data.targets import AllFailures, Target
from lightning_nrl.errors import ConfigurationError, check_choice, check_kind, explain
from lightning_nrl.evaluation import Importance
from lightning_nrl.evaluation.quotas import Quota, checked_quotas
from lightning_nrl.gate import Gate
from lightning_nrl.localization import Localizer, NeuRecoverLite
from lightning_nrl.methods import METHODS, AnyMethod, Auto
from lightning_nrl.reference.update import KEEPS, Keep
from lightning_nrl.search.fitness import Fitness
from lightning_nrl.stats.binomial import check_confidence
from lightning_nrl.stats.weighted import check_shares

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What to repair and how. The defaults are the strongest regression-free setting there is.

    Attributes:
        target: which failures are to be repaired.
        layer: dotted name of the layer, several names, or `auto`: the last Linear (where there is none, the
            last convolution), and for methods that train the whole network. For these it may be a block too: all layers
            inside may change.
        gate: what a repair must satisfy to be accepted.
        method: how new weights are found, by name or as an object (see `lightning_nrl.methods`).
        max_time: seconds that the repair may take; None: as long as its method needs.
        fitness: how candidates are ranked.
        localizer: how the weights to be searched are chosen.
        n_passed: how many passed samples are scored in the search (#pos), drawn from the sources marked `passed`; None
            scores every known passed sample.
        seed: of the sample and of the search, from 0 to 2^32 - 1.
        budget: bytes that the search may use on the device; None takes a share of what is free. Half of it is for
            what is recorded of the data: on a GPU more than that is kept in main memory, on a CPU all is kept.
        strength: how much of the change that was found is made, above 0 to 2; None: all of it (1), or more where that
            repairs more and breaks no known sample and no more of the calibration data.
        limit: a gate, or its text, for calibration data: the greatest strength within it is taken.
        sparse: the share of repaired targets, from 0 to below 1, that may be lost for a patch of fewer changed weights;
            None: no weights are spared.
        importance: what repairing each failed sample is worth, beside the others: a column of numbers above 0, ids as
            `{id: number}` or `{split: {id: number}}`, or `"focal"` or `Focal(gamma)`: hard ones count more. None: all
            alike. A column is a key or a place in your batches, a function of a batch, or its address.
        slices: the slice that each sample is in, likewise a column, of names, numbers or bools, or a target; the report
            has a row for each.
        quotas: how many targets of a slice must be repaired for a repair to be accepted:
            `{"night": 5, "truck": "50%"}`.
        protected: passed samples that may not break, whatever the gate tolerates, on known and calibration data: a
            column of bools, a target, or ids by split. Whole numbers say how many other samples one counts for.
        set_aside: failed samples that are no targets although they are in the target: a column of bools, a target, ids,
            or `"doubtful"`, those whose label looks wrong. They are listed in the report.
        keep: in an update, what may not break: `both`, what the new model or the replaced one gets right, or
            `reference`, only what both of them get right.
        confidence: of the limits that the report gives from calibration data, in (0, 1).
        mix: the expected share of each slice, or without slices of each class, among samples that are right before, for
            a limit under this mix.

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
    fitness: Fitness = field(default_factory=Fitness)
    localizer: Localizer = field(default_factory=NeuRecoverLite)
    n_passed: int | None = None
    seed: int = 0
    budget: int | None = None
    max_time: float | None = None
    strength: float | None = None
    limit: Gate | str | None = None
    sparse: float | None = None
    keep: Keep = "both"
    importance: Any = None
    slices: Any = None
    quotas: Mapping[str, Quota] | None = None
    protected: Any = None
    set_aside: Any = None
    confidence: float = 0.95
    mix: Mapping[str | int, float] | None = None

    def __post_init__(self) -> None:
        check_kind("target", self.target, isinstance(self.target, Target), "Target", "Target.label(3)")
        check_kind("gate", self.gate, isinstance(self.gate, Gate), "Gate", "Gate.instance() or Gate.parse('accuracy')")
        object.__setattr__(self, "method", METHODS.parse("method", self.method))
        check_kind("fitness", self.fitness, callable(self.fitness), "Fitness", "Fitness('eq1')")
        localizes = callable(self.localizer) and hasattr(self.localizer, "include_bias")
        check_kind("localizer", self.localizer, localizes, "Localizer", "NeuRecoverLite()")
        layer_names(self.layer)
        check_choice("keep", self.keep, KEEPS)
        for name, least, most in (("n_passed", 1, None), ("seed", 0, 2**32 - 1), ("budget", 1, None)):
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < least or (most is not None and value > most):
                limits = f"from {least}" + (f" to {most}" if most is not None else "")
                raise ConfigurationError(
                    explain(f"`{name}={value!r}` is out of range.", f"give a whole number {limits}.")
                )
        self._check_numbers()
        object.__setattr__(self, "quotas", None if self.quotas is None else checked_quotas(self.quotas))
        _ = self.counting
        check_confidence(self.confidence)
        if self.mix is not None:
            check_shares("mix", self.mix)
        if self.limit is not None:
            object.__setattr__(self, "limit", Gate.parse(self.limit, "limit"))
            if self.strength is not None:
                raise ConfigurationError(
                    explain(
                        f"`strength={self.strength!r}` and `limit={str(self.limit)!r}` both say how far to go.",
                        "give one of them.",
                    )
                )

    def _check_numbers(self) -> None:
        for name, kind, most, hint in (
            ("max_time", "time", math.inf, "give seconds above 0, or None for no limit."),
            ("strength", "strength", 2.0, "give a number above 0 and at most 2, or None."),
            ("sparse", "share", 1.0, "give a share from 0 to below 1 of the repairs, or None."),
        ):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            fits = number and math.isfinite(value) and (0 <= value < most if name == "sparse" else 0 < value <= most)
            if value is not None and not fits:
                raise ConfigurationError(explain(f"`{name}={value!r}` is no {kind}.", hint))

    @property
    def counting(self) -> Importance:
        """What was said of how much samples count."""
        return Importance(self.importance, self.slices, self.quotas, self.protected, self.set_aside)

    def plain(self) -> dict[str, Any]:
        """Dicts, lists, numbers and text that say the same, as reports keep it. Equal settings give equal values."""
        return {name: _plain(value) for name, value in _fields(self).items()}


def _plain(value: Any) -> Any:
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
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        return {"class": type(value).__name__, **{name: _plain(item) for name, item in _fields(value).items()}}
    if type(value).__repr__ is object.__repr__:
        own = getattr(value, "__dict__", {}).items()
        simple = {name: item for name, item in own if item is None or isinstance(item, (bool, int, float, str))}
        return {"class": type(value).__name__, **simple}
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}
