"""The settings of a sweep: `Grid`, and the parser of settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import product
from typing import Any

from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.localization import LOCALIZERS, Localizer
from lightning_nrl.pipeline.options import BoundOptions, SearchOptions
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.search import FITNESSES, ParticleSwarm
from lightning_nrl.search.fitness import FITNESS_KINDS, Fitness, FitnessFunction

SETTING_PARTS = ("fitness", "method", "localizer", "n_passed")
"""Parts of a setting. Each can be given as a whole; fields of the first three can be given one by
one.
"""


class Grid:
    """All combinations of the values of some arguments. The last argument varies fastest.

    Args:
        **axes: a list of values for each argument. Arguments are `n_passed` (#pos), `fitness`
            (kinds such as `eq1`, or `Fitness` objects), and any field of `Fitness`, `ParticleSwarm`
            and the localizer, such as `alpha`, `perfect_intact` (pi), `n_weights` (#lw),
            `particles` (#p) and `patience`. One value need not be in a list.

    Example:
        >>> grid = Grid(fitness=["eq1", "eq2"], alpha=[4, 5, 6], n_weights=[32, 76], n_passed=500)
        >>> grid.settings()[0]
        {'fitness': 'eq1', 'alpha': 4, 'n_weights': 32, 'n_passed': 500}
    """

    def __init__(self, **axes: Any) -> None:
        lists = (list, tuple, range)
        self.axes = {
            name: tuple(values) if isinstance(values, lists) else (values,)
            for name, values in axes.items()
        }
        for name, values in self.axes.items():
            if not values:
                raise ConfigurationError(
                    f"`{name}` has no value.", f"give a list, such as `{name}=[...]`."
                )
        if not self.axes:
            raise ConfigurationError(
                "`settings`: the grid has no argument.",
                "give one, such as `Grid(alpha=[4, 5, 6])`.",
            )

    def settings(self) -> list[dict[str, Any]]:
        """Returns a mapping of argument names to values for each combination."""
        return [
            dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())
        ]

    def __repr__(self) -> str:
        return f"Grid({', '.join(f'{name}={list(values)}' for name, values in self.axes.items())})"


Sweepable = Grid | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Settings to sweep over: a grid, a mapping of arguments, or several mappings."""


@dataclass(frozen=True)
class Setting:
    """A named setting of the paper's search. With `n_passed=None` the search scores all passed
    samples.
    """

    name: str = field(compare=False)
    fitness: FitnessFunction
    method: ParticleSwarm
    localizer: Localizer
    n_passed: int | None

    def arguments(self) -> dict[str, Any]:
        """Returns arguments of `repair` and `Settings` for this search. Their `strength=1` applies
        its whole change.
        """
        search = SearchOptions(self.fitness, self.localizer, self.n_passed)
        return {"method": self.method, "search": search, "bounds": BoundOptions(strength=1.0)}

    def plain(self) -> dict[str, Any]:
        """Returns all fields except the name as dicts, lists, text and numbers."""
        said = Settings(**self.arguments()).plain()
        return {name: said[name] for name in SETTING_PARTS}

    def columns(self) -> dict[str, Any]:
        """Returns the columns of the paper's table, as fields of `Run`."""
        fitness: Any = self.fitness
        kind = str(
            getattr(fitness, "kind", None) or getattr(fitness, "__name__", type(fitness).__name__)
        )
        alpha = None if kind == "lexicographic" else getattr(fitness, "alpha", None)
        return {
            "fitness": kind,
            "alpha": None if alpha is None else float(alpha),
            "perfect_intact": bool(getattr(fitness, "perfect_intact", False)),
            "n_weights": getattr(self.localizer, "n_weights", None),
            "n_passed": self.n_passed,
            "particles": self.method.particles,
        }


def parse_settings(settings: Sweepable, base: Settings) -> tuple[Setting, ...]:
    """Parses settings in their order and drops duplicates. `base` has the defaults.

    A mapping may include a `name`. Raises `ConfigurationError` for an unknown argument, an invalid
    value, an empty list, or two different settings of the same name.
    """
    if not isinstance(base.method, ParticleSwarm):
        problem = f"`method` is a {type(base.method).__name__}: a sweep runs the paper's search."
        raise ConfigurationError(problem, "give `method=ParticleSwarm(...)`, or leave it out.")
    start = Setting("", base.fitness, base.method, base.localizer, base.search.n_passed)
    given: Any = settings.settings() if isinstance(settings, Grid) else settings
    given = [given] if isinstance(given, Mapping) else given
    several = isinstance(given, Sequence) and not isinstance(given, str)
    check_kind(
        "settings", settings, several, "list of settings", "Grid(alpha=[4, 5]), or [{'alpha': 5}]"
    )
    found: list[Setting] = []
    for one in given:
        made = _setting(one, start)
        if made not in found:
            found.append(made)
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigurationError(
            f"`settings`: two settings have the name {twice!r}.", "give each a `name` of its own."
        )
    if not found:
        raise ConfigurationError(
            "`settings` is empty.", "give a Grid, or a list such as [{'alpha': 5}]."
        )
    return tuple(found)


def _setting(given: Any, start: Setting) -> Setting:
    check_kind("settings", given, isinstance(given, Mapping), "setting", "{'alpha': 5}")
    said, made = dict(given), start
    name = said.pop("name", None)
    for whole in SETTING_PARTS:
        if whole in said:
            made = replace(made, **{whole: _whole(whole, said.pop(whole), made)})
    changes: dict[str, dict[str, Any]] = {}
    for argument, value in said.items():
        changes.setdefault(_owner(argument, made), {})[argument] = value
    for one, other in (("n_weights", "n_g"), ("n_g", "n_weights")):
        # Each of the two determines the other, so the default of the other does not count.
        if said.get(one) is not None and other not in said and hasattr(made.localizer, other):
            changes["localizer"][other] = None
    for part, values in changes.items():
        made = replace(made, **{part: replace(getattr(made, part), **values)})
    if isinstance(made.fitness, Fitness) and made.fitness.kind == "lexicographic":
        # The fields that this fitness ignores are reset, so that a grid does not repeat equal
        # settings.
        plain = Fitness(delta=made.fitness.delta)
        if made.fitness.perfect_intact and made.fitness.infeasible == "zero":
            plain = replace(plain, perfect_intact=True, infeasible="zero")
        made = replace(made, fitness=plain)
    if made.localizer.include_bias != start.localizer.include_bias:
        raise ConfigurationError(
            "`settings`: some search biases and others do not.",
            "set `include_bias` for all, in `search`.",
        )
    Settings(**made.arguments())  # Raises for invalid values.
    return replace(made, name=_label(made, start) if name is None else str(name))


def _whole(argument: str, value: Any, made: Setting) -> Any:
    if argument == "fitness" and isinstance(value, str):
        if isinstance(made.fitness, Fitness) and value in FITNESS_KINDS:
            return replace(made.fitness, kind=value)  # type: ignore[arg-type]
        return FITNESSES.parse("fitness", value)
    if argument == "localizer":
        return LOCALIZERS.parse("localizer", value)
    if argument == "method":
        if value == "swarm":
            return made.method
        check_kind(
            "method",
            value,
            isinstance(value, ParticleSwarm),
            "ParticleSwarm",
            "ParticleSwarm(particles=200)",
        )
    return value


def _owner(argument: str, made: Setting) -> str:
    parts = {part: getattr(made, part) for part in SETTING_PARTS}
    known = {
        f.name: part for part, value in parts.items() if is_dataclass(value) for f in fields(value)
    }
    if argument not in known:
        choices = [name for name in (*SETTING_PARTS, *known) if name != "kind"]
        near = difflib.get_close_matches(str(argument), choices, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it is one of {choices}."
        raise ConfigurationError(f"`settings`: `{argument}` is no argument of a search.", hint)
    return known[argument]


def _label(made: Setting, start: Setting) -> str:
    """Returns a short unique name: the columns of the paper's table, then other differences from
    `start`.
    """
    shown = made.columns()
    words = [shown["fitness"]]
    if shown["alpha"] is not None:
        words.append(f"alpha={shown['alpha']:g}")
    words += ["pi"] * shown["perfect_intact"]
    words.append(
        f"lw={shown['n_weights'] or ('auto' if hasattr(made.localizer, 'n_weights') else 'all')}"
    )
    words += [
        f"pos={'all' if made.n_passed is None else made.n_passed}",
        f"p={made.method.particles}",
    ]
    for part in ("fitness", "method", "localizer"):
        own, first = getattr(made, part), getattr(start, part)
        if type(own) is not type(first) and part == "localizer":
            words.append(type(own).__name__)
        elif is_dataclass(own) and type(own) is type(first):
            words += [
                f"{f.name}={getattr(own, f.name)}"
                for f in fields(own)
                if f.name not in ("kind", *shown) and getattr(own, f.name) != getattr(first, f.name)
            ]
    return " ".join(words)
