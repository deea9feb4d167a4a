"""Targets as text, the way reports print them: for command lines, YAML and Python alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import shorten

from lightning_nrl.data.targets import And, Target
from lightning_nrl.errors import TargetError, check_kind

__all__ = ["parse_target", "target_in"]

TARGET_WORD = re.compile(r"->|[()]|(?:(?!->)[^\s()])+")
TARGET_HINT = (
    "write `label 3`, `confusion 3 -> 5`, `where package.module:function` or `all`, "
    "and combine them with `and`, `or`, `not` and parentheses."
)


def parse_target(target: str | Target) -> Target:
    """A target from text, as `str(target)` gives it; a target is given back as it is.

    `not` binds more closely than `and`, and `and` more closely than `or`. A predicate is named by its address.

    Raises:
        ConfigurationError: it cannot be read, a class is no class, or a predicate cannot be imported.

    Example:
        >>> parse_target("label 3 and not confusion 3 -> 5") == Target.label(3) & ~Target.confusion(3, 5)
        True
    """
    if isinstance(target, str):
        try:
            return _TargetReader(target).read()
        except RecursionError as error:
            raise TargetError("`target`: the text is nested too deeply.", TARGET_HINT) from error
    check_kind("target", target, isinstance(target, Target), "Target", "Target.label(3) or 'label 3'")
    return target


def target_in(text: str) -> Target | None:
    """The target that a text of several words stands for; None for a word by itself, and for what is no target."""
    try:
        return parse_target(text) if len(text.split()) > 1 else None
    except TargetError:
        return None


class _TargetReader:
    """Reads the words of a target from left to right, by recursive descent."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words: list[str] = [*TARGET_WORD.findall(text), ""]
        self.at = 0

    def read(self) -> Target:
        found = self.either()
        if self.words[self.at]:
            raise self.unexpected("`and`, `or` or the end")
        return found

    def either(self) -> Target:
        found = self.both()
        while self.skip("or"):
            found = found | self.both()
        return found

    def both(self) -> Target:
        found = self.single()
        while self.skip("and"):
            found = And(found, self.single())
        return found

    def single(self) -> Target:
        readers: dict[str, Callable[[], Target]] = {
            "not": lambda: ~self.single(),
            "(": self.group,
            "all": self.every,
            "label": lambda: Target.label(self.class_number()),
            "confusion": self.confusion,
            "where": lambda: Target.where(self.address()),
        }
        word = self.words[self.at]
        if word not in readers:
            raise self.unexpected("a condition")
        self.at += 1
        return readers[word]()

    def group(self) -> Target:
        found = self.either()
        self.expect(")")
        return found

    def every(self) -> Target:
        self.skip("failures")
        return Target.all()

    def confusion(self) -> Target:
        true = self.class_number()
        self.expect("->")
        return Target.confusion(true, self.class_number())

    def class_number(self) -> int:
        word = self.words[self.at]
        if not re.fullmatch(r"[0-9]{1,18}", word):
            raise self.unexpected("a class, a whole number from 0")
        self.at += 1
        return int(word)

    def address(self) -> str:
        word = self.words[self.at]
        if not re.search(r"[.:]", word):
            raise self.unexpected("the address of a function, such as `package.module:function`")
        self.at += 1
        return word

    def skip(self, word: str) -> bool:
        found = self.words[self.at] == word
        self.at += found
        return found

    def expect(self, word: str) -> None:
        if not self.skip(word):
            raise self.unexpected(f"`{word}`")

    def unexpected(self, expected: str) -> TargetError:
        text, word, before = (shorten(part, 60) for part in (self.text, self.words[self.at], self.words[self.at - 1]))
        place = f" behind `{before}`" if self.at else ""
        found = f"`{word}`" if word else "the end"
        return TargetError(f"`target='{text}'`: {expected} was expected{place}, and {found} found.", TARGET_HINT)
