"""The settings of a sweep: `Grid`, and the parser of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from itertools import product
from typing import Any

from lightning_nrl.errors import ConfigurationError, check_choice, check_kind
from lightning_nrl.localization import LOCALIZERS, Localizer
from lightning_nrl.pipeline import BoundOptions, SearchOptions, Settings
from lightning_nrl.pipeline.plain_values import fields_of
from lightning_nrl.search import FITNESSES, ParticleSwarm
from lightning_nrl.search.fitness import FITNESS_KINDS, Fitness, FitnessFunction

# Parts of a setting. Each can be given as an object, or field by field except for `n_passed`.
SETTING_PARTS = ("fitness", "method", "localizer", "n_passed")


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
        self.axes = {}
        for name, values in axes.items():
            is_list = isinstance(values, (list, tuple, range))
            self.axes[name] = tuple(values) if is_list else (values,)
            if not self.axes[name]:
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
        combinations = product(*self.axes.values())
        return [dict(zip(self.axes, values, strict=True)) for values in combinations]

    def __repr__(self) -> str:
        return f"Grid({', '.join(f'{name}={list(values)}' for name, values in self.axes.items())})"


Sweepable = Grid | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Settings to sweep over: a grid, a mapping of arguments, or several mappings."""


@dataclass(frozen=True)
class Setting:
    """A named setting of the paper's search.

    With `n_passed=None` the search scores all passed samples.
    """

    name: str = field(compare=False)
    fitness: FitnessFunction
    method: ParticleSwarm
    localizer: Localizer
    n_passed: int | None

    def arguments(self) -> dict[str, Any]:
        """Returns arguments of `repair` and `Settings` for this search.

        Their `strength=1` applies its whole change.
        """
        search = SearchOptions(self.fitness, self.localizer, self.n_passed)
        return {"method": self.method, "search": search, "bounds": BoundOptions(strength=1.0)}

    def plain(self) -> dict[str, Any]:
        """Returns all fields except the name as dicts, lists, text and numbers."""
        settings = Settings(**self.arguments()).plain()
        return {part: settings[part] for part in SETTING_PARTS}

    def columns(self) -> dict[str, Any]:
        """Returns the columns of the paper's table, as fields of `Run`."""
        fitness = _fields(self.fitness)
        kind = fitness.get("kind", type(self.fitness).__name__)
        alpha = None if kind == "lexicographic" else fitness.get("alpha")
        return {
            "fitness": kind,
            "alpha": None if alpha is None else float(alpha),
            "perfect_intact": fitness.get("perfect_intact", False),
            "n_weights": _fields(self.localizer).get("n_weights"),
            "n_passed": self.n_passed,
            "particles": self.method.particles,
        }


def _fields(part: object) -> dict[str, Any]:
    """Returns the fields of a dataclass by name, and nothing for any other object."""
    return fields_of(part) if is_dataclass(part) else {}


def parse_settings(settings: Sweepable, base: Settings) -> tuple[Setting, ...]:
    """Parses settings in their order and drops duplicates. `base` has the defaults.

    A mapping may include a `name`. Raises `ConfigurationError` for an unknown argument, an invalid
    value, an empty list, or two different settings of the same name.
    """
    if not isinstance(base.method, ParticleSwarm):
        problem = f"`method` is a {type(base.method).__name__}: a sweep runs the paper's search."
        raise ConfigurationError(problem, "give `method=ParticleSwarm(...)`, or leave it out.")
    default = Setting("", base.fitness, base.method, base.localizer, base.search.n_passed)
    if isinstance(settings, Grid):
        settings = settings.settings()
    elif isinstance(settings, Mapping):
        settings = [settings]
    is_list = isinstance(settings, Sequence) and not isinstance(settings, str)
    check_kind(
        "settings", settings, is_list, "list of settings", "Grid(alpha=[4, 5]), or [{'alpha': 5}]"
    )
    parsed = []
    for mapping in settings:
        setting = _setting(mapping, default)
        if setting not in parsed:
            parsed.append(setting)
    names = [setting.name for setting in parsed]
    for name in names:
        if names.count(name) > 1:
            problem = f"`settings`: two settings have the name {name!r}."
            raise ConfigurationError(problem, "give each a `name` of its own.")
    if not parsed:
        raise ConfigurationError(
            "`settings` is empty.", "give a Grid, or a list such as [{'alpha': 5}]."
        )
    return tuple(parsed)


def _setting(mapping: Mapping[str, Any], default: Setting) -> Setting:
    check_kind("settings", mapping, isinstance(mapping, Mapping), "setting", "{'alpha': 5}")
    arguments = dict(mapping)
    name = arguments.pop("name", None)
    setting = default
    for part in SETTING_PARTS:
        if part in arguments:
            value = _parse_part(part, arguments.pop(part), setting)
            setting = replace(setting, **{part: value})
    setting = _with_fields(setting, arguments)
    if isinstance(setting.fitness, Fitness) and setting.fitness.kind == "lexicographic":
        setting = replace(setting, fitness=_without_ignored(setting.fitness))
    if setting.localizer.include_bias != default.localizer.include_bias:
        raise ConfigurationError(
            "`settings`: some search biases and others do not.",
            "set `include_bias` for all, in `search`.",
        )
    Settings(**setting.arguments())  # raises for invalid values
    return replace(setting, name=_label(setting, default) if name is None else str(name))


def _parse_part(part: str, value: Any, setting: Setting) -> Any:
    if part == "fitness" and isinstance(value, str):
        if isinstance(setting.fitness, Fitness) and value in FITNESS_KINDS:
            return replace(setting.fitness, kind=value)  # type: ignore[arg-type]
        return FITNESSES.parse("fitness", value)
    if part == "localizer":
        return LOCALIZERS.parse("localizer", value)
    if part == "method":
        if value == "swarm":
            return setting.method
        is_swarm = isinstance(value, ParticleSwarm)
        check_kind("method", value, is_swarm, "ParticleSwarm", "ParticleSwarm(particles=200)")
    return value


def _with_fields(setting: Setting, arguments: Mapping[str, Any]) -> Setting:
    """Replaces fields of the parts of a setting."""
    parts = _fields(setting)
    owners = {name: part for part in SETTING_PARTS for name in _fields(parts[part])}
    changes: dict[str, dict[str, Any]] = {part: {} for part in SETTING_PARTS}
    for argument, value in arguments.items():
        check_choice("settings", argument, owners | dict.fromkeys(SETTING_PARTS))
        changes[owners[argument]][argument] = value
    # Each of the two determines the other, so the default of the other does not count.
    for argument, implied in (("n_weights", "n_g"), ("n_g", "n_weights")):
        if arguments.get(argument) is not None and implied in _fields(setting.localizer):
            changes["localizer"].setdefault(implied, None)
    for part, values in changes.items():
        if values:
            setting = replace(setting, **{part: replace(parts[part], **values)})
    return setting


def _without_ignored(fitness: Fitness) -> Fitness:
    """Resets the fields that `lexicographic` ignores, so that a grid repeats no equal setting."""
    plain = Fitness(delta=fitness.delta)
    if fitness.perfect_intact and fitness.infeasible == "zero":
        return replace(plain, perfect_intact=True, infeasible="zero")
    return plain


def _label(setting: Setting, default: Setting) -> str:
    """Returns a short unique name.

    It has the columns of the paper's table, then other differences from the default.
    """
    columns = setting.columns()
    words = [columns["fitness"]]
    if columns["alpha"] is not None:
        words.append(f"alpha={columns['alpha']:g}")
    if columns["perfect_intact"]:
        words.append("pi")
    chooses_number = "n_weights" in _fields(setting.localizer)
    n_weights = columns["n_weights"] or ("auto" if chooses_number else "all")
    n_passed = "all" if setting.n_passed is None else setting.n_passed
    words += [f"lw={n_weights}", f"pos={n_passed}", f"p={setting.method.particles}"]
    for part, start in (
        (setting.fitness, default.fitness),
        (setting.method, default.method),
        (setting.localizer, default.localizer),
    ):
        if type(part) is type(start):
            start_fields = _fields(start)
            for name, value in _fields(part).items():
                if name not in ("kind", *columns) and value != start_fields[name]:
                    words.append(f"{name}={value}")
        elif part is setting.localizer:
            words.append(type(part).__name__)
    return " ".join(words)
