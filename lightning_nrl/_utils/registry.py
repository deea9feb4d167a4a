"""`Registry` of objects by name, and import of functions by address."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from lightning_nrl.errors import ConfigurationError, check_choice, check_kind

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(eq=False)
class Registry(Generic[T]):
    """Registry of factories (classes or functions) by name.

    Args:
        kind: word for the objects in messages, such as `Task`.
        example: example of a valid value for messages.
        fits: returns True for a valid object.
        include: other registries, whose names are accepted too.
        on_demand: further factories by name, as addresses `package.module:name`, which are imported
            on first use.
        group: if not empty, other distributions can add factories, by entry points in the group
            `lightning_nrl.<group>`. A factory must be callable without arguments.

    Example:
        >>> boxes = Registry("box", "'square'", lambda value: isinstance(value, tuple))
        >>> @boxes.register("square", "square:3")
        ... def square(side="1"):
        ...     return (int(side), int(side))
        >>> boxes.parse("box", "square"), boxes.parse("box", (2, 3)), list(boxes), boxes.forms
        ((1, 1), (2, 3), ['square'], ('square:3',))
    """

    kind: str
    example: str
    fits: Callable[[Any], bool]
    include: tuple[Registry[Any], ...] = ()
    on_demand: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    _factories: dict[str, Callable[..., T]] = field(default_factory=dict, init=False)
    _forms: list[str] = field(default_factory=list, init=False)

    def register(self, name: str, *forms: str) -> Callable[[Factory], Factory]:
        """Returns a decorator that adds a factory.

        `forms` are example texts with arguments, such as `tolerance:1%`.
        """

        def add(factory: Factory) -> Factory:
            if any(name in registry._factories for registry in (self, *self.include)):
                raise ValueError(f"There is a {self.kind} named {name!r} already.")
            self._factories[name] = factory
            self._forms.extend(forms or (name,))
            return factory

        return add

    def __iter__(self) -> Iterator[str]:
        yield from self._factories
        yield from self.on_demand
        yield from self._added
        for registry in self.include:
            yield from registry

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        # A name of this package wins over an entry point, and the first entry point wins over a
        # later one.
        points: dict[str, EntryPoint] = {}
        if not self.group:
            return points
        for point in entry_points(group=f"lightning_nrl.{self.group}"):
            if point.name not in self._factories and point.name not in self.on_demand:
                points.setdefault(point.name, point)
        return points

    @property
    def forms(self) -> tuple[str, ...]:
        """Example texts of all names, as messages show them."""
        forms = [*self._forms, *self.on_demand, *self._added]
        for registry in self.include:
            forms += registry.forms
        return tuple(forms)

    def factory(self, argument: str, name: str) -> Callable[..., T]:
        """Returns the factory with this name; the error for an unknown name has a similar one."""
        check_choice(argument, name, self)
        if name in self._factories:
            return self._factories[name]
        if name in self.on_demand:
            return cast(Callable[..., T], pkgutil.resolve_name(self.on_demand[name]))
        if name in self._added:
            return self._loaded(argument, self._added[name])
        registry = next(registry for registry in self.include if name in registry)
        return registry.factory(argument, name)

    def _loaded(self, argument: str, point: EntryPoint) -> Callable[..., T]:
        origin = f"`{argument}={point.name!r}`: the entry point {point.value!r}"
        if point.dist is not None:
            origin += f" of {point.dist.name}"
        try:
            make = point.load()
        except Exception as error:
            raise ConfigurationError(
                f"{origin} cannot be loaded ({type(error).__name__}: {error}).",
                "update or uninstall that distribution.",
            ) from error

        def checked(*args: Any, **kwargs: Any) -> T:
            value = make(*args, **kwargs) if callable(make) else None
            if not self.fits(value):
                raise ConfigurationError(
                    f"{origin} gave a {type(value).__name__}, which is no {self.kind}.",
                    "give a class, or a function that makes one without arguments.",
                )
            return cast(T, value)

        return checked

    def parse(self, argument: str, value: object) -> T:
        """Returns a valid object unchanged, or what the factory named `value` makes."""
        if isinstance(value, str):
            return self.factory(argument, value)()
        check_kind(argument, value, self.fits(value), self.kind, self.example)
        return cast(T, value)

    def unreadable(self, text: str, name: str) -> ConfigurationError:
        """Returns the error for `text`, a quoted text such as `tolerence:1%`; `name` starts it."""
        problem = f"{text} is no {self.kind}"
        hint = f"write one of {list(self.forms)}, or {self.example}."
        for similar in difflib.get_close_matches(name, tuple(self), n=1):
            if similar != name:
                return ConfigurationError(f"{problem}, did you mean {similar!r}?", hint)
        return ConfigurationError(f"{problem}.", hint)


def import_function(argument: str, value: str | Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function, given directly or by its address.

    An address is `package.module:function` or `package.module.function`.
    """
    function = value
    if isinstance(value, str):
        try:
            function = pkgutil.resolve_name(value)
        except (ValueError, ImportError, AttributeError) as error:
            raise ConfigurationError(
                f"`{argument}={value!r}` was not found: {error}.",
                "write `package.module:function`, with a module that Python can import from here.",
            ) from error
    if not callable(function):
        raise ConfigurationError(
            f"`{argument}`: a value of type {type(function).__name__} cannot be called.",
            "give a function, or its address as text, `package.module:function`.",
        )
    return function
