"""Methods of a module replaced for a while, and what runs right after one of its hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_nrl._lightning.packages import LightningModule


@contextmanager
def replaced(module: LightningModule, **methods: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module has other methods; afterwards its own again, whatever was set meanwhile."""
    own = {name: vars(module)[name] for name in methods if name in vars(module)}
    vars(module).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(module).pop(name, None)
        vars(module).update(own)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for a method that is left out."""


class _FollowedHook:
    """Stands in for a hook for one call, in which the module has its own again.

    Lightning calls the hooks of most callbacks before that of the module.
    """

    def __init__(self, module: LightningModule, name: str) -> None:
        self.module = module
        self.name = name
        self.own = {key: value for key, value in vars(module).items() if key == name}
        self.followers: list[Callable[[], None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.release()
        result = getattr(self.module, self.name)(*args, **kwargs)
        for follower in self.followers:
            follower()
        return result

    def __getstate__(self) -> dict[str, Any]:
        # What follows the module's hook does not follow that of a copy.
        return {**vars(self), "followers": []}

    def release(self) -> None:
        vars(self.module).pop(self.name, None)
        vars(self.module).update(self.own)


def follow_hook(module: LightningModule, name: str, follower: Callable[[], None]) -> None:
    """Has something run after the next call of a module's hook, and after what is to follow it already."""
    found = vars(module).get(name)
    if not isinstance(found, _FollowedHook):
        found = _FollowedHook(module, name)
        setattr(module, name, found)
    found.followers.append(follower)


def release_hook(module: LightningModule, name: str) -> None:
    """The module has its own hook again, which nothing follows."""
    found = vars(module).get(name)
    if isinstance(found, _FollowedHook):
        found.release()
