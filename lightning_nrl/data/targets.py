"""Targets, the failures to repair: a small tree of conditions on samples.

Build one with `Target.label(3)`, `Target.confusion(3, 5)`, `Target.where(predicate)` or `Target.all()`, and combine
them with `&`, `|` and `~`. A target is a value: frozen, comparable, and readable with `str`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_nrl._utils.checks import check_class, check_per_sample
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import ConfigurationError, TargetError, check_kind, explain

Predicate = Callable[[Any], Any]
"""Takes a batch as the data loader gave it, extras included; gives one bool a sample: a tensor, an array or a list."""

TARGET_WORD = re.compile(r"->|[()]|(?:(?!->)[^\s()])+")
TARGET_HINT = (
    "write `label 3`, `confusion 3 -> 5`, `where package.module:function` or `all`, "
    "and combine them with `and`, `or`, `not` and parentheses."
)


class Target(ABC):
    """Selects samples; those among them that the model gets wrong are repaired.

    Example:
        >>> print(Target.label(3) | Target.confusion(3, 5))
        label 3 or confusion 3 -> 5
        >>> print(Target.all() & ~(Target.label(3) | Target.label(5)))
        all failures and not (label 3 or label 5)
    """

    @abstractmethod
    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        """The chosen samples of a batch, right or wrong; the caller keeps those that failed.

        Args:
            batch: `n` samples.
            label: `n` int64, true classes; None where the task has none.
            prediction: `n` int64, predicted classes; None where the task has none.

        Returns:
            `n` bool on the CPU, where results are kept.
        """

    def covers(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        """Returns samples of the targeted kind, right or wrong (the paper's class to be repaired).

        They are those that the target would choose if they failed, whatever they were taken for: a condition on the
        predicted class counts as fulfilled. So a confusion covers its true class.
        """
        return self.select(batch, label, prediction)

    @abstractmethod
    def __str__(self) -> str:
        """The condition in words, as reports print it; `parse_target` reads it if predicates are addresses."""

    @staticmethod
    def all() -> Target:
        """Every failure."""
        return AllFailures()

    @staticmethod
    def label(label: int) -> Target:
        """Failures whose true class is `label`."""
        return Label(label)

    @staticmethod
    def confusion(true: int, predicted: int) -> Target:
        """Failures of class `true` that the model takes for class `predicted`."""
        return Confusion(true, predicted)

    @staticmethod
    def where(predicate: Predicate | str, name: str | None = None) -> Target:
        """Failures with an attribute that need not be a class, such as "partly occluded"; arguments as of `Where`."""
        return Where(predicate, name)

    def __and__(self, other: Target) -> Target:
        return And(self, other) if isinstance(other, Target) else NotImplemented

    def __or__(self, other: Target) -> Target:
        return Or(self, other) if isinstance(other, Target) else NotImplemented

    def __invert__(self) -> Target:
        return Not(self)

    def __bool__(self) -> bool:
        """Refused: `a and b` would silently give `b`, `a or b` would give `a`."""
        problem = "`target`: a Target is neither true nor false."
        raise TypeError(explain(problem, "combine targets with `&`, `|` and `~`."))


@dataclass(frozen=True)
class AllFailures(Target):
    """Every sample."""

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return torch.ones(len(batch), dtype=torch.bool)

    def __str__(self) -> str:
        return "all failures"


@dataclass(frozen=True)
class Label(Target):
    """Samples of one true class, a whole number from 0."""

    # An explicit field, since a dataclass would take the inherited constructor of the same name for its default.
    label: int = field()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", check_class("label", self.label))

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return _classes(self, label).eq(self.label).cpu()

    def __str__(self) -> str:
        return f"label {self.label}"


@dataclass(frozen=True)
class Confusion(Target):
    """Samples of one class that the model takes for another."""

    true: int
    predicted: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "true", check_class("true", self.true))
        object.__setattr__(self, "predicted", check_class("predicted", self.predicted))
        if self.true == self.predicted:
            raise ConfigurationError(
                f"`target`: confusion {self} is no failure, the true and the predicted class are the same.",
                f"give two classes, or choose every failure of the class with `Target.label({self.true})`.",
            )

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return (_classes(self, label).eq(self.true) & _classes(self, prediction).eq(self.predicted)).cpu()

    def covers(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return _classes(self, label).eq(self.true).cpu()

    def __str__(self) -> str:
        return f"confusion {self.true} -> {self.predicted}"


@dataclass(frozen=True)
class Where(Target):
    """Samples for which a predicate on the batch is true.

    Attributes:
        predicate: a function of the raw batch that returns one bool a sample, or its address, `package.mod:function`.
        name: what reports call it; None for the function's own name, or its address.
    """

    predicate: str | Predicate
    name: str | None = None

    def __post_init__(self) -> None:
        import_function("predicate", self.predicate)

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        function = import_function("predicate", self.predicate)
        try:
            found = function(batch.raw)
        except Exception as error:
            raise TargetError(
                f"`target`: the predicate of '{self}' raised {type(error).__name__}: {error}",
                "it is called with the whole batch as the data loader gives it, extras included.",
            ) from error
        what = f"`target`: the predicate of '{self}'"
        return check_per_sample(what, found, len(batch), "bool", TargetError).cpu()

    def __str__(self) -> str:
        if self.name is not None or isinstance(self.predicate, str):
            return f"where {self.predicate if self.name is None else self.name}"
        name = getattr(self.predicate, "__name__", type(self.predicate).__name__)
        code = getattr(self.predicate, "__code__", None)
        return f"where lambda of line {code.co_firstlineno}" if name == "<lambda>" and code else f"where {name}"


@dataclass(frozen=True)
class TargetPair(Target):
    """Two targets, combined."""

    left: Target
    right: Target

    word: ClassVar[str]
    combine: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def __post_init__(self) -> None:
        _check_targets(type(self).__name__, self.left, self.right)

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        both = (target.select(batch, label, prediction) for target in (self.left, self.right))
        return type(self).combine(*both)

    def covers(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        both = (target.covers(batch, label, prediction) for target in (self.left, self.right))
        return type(self).combine(*both)

    def __str__(self) -> str:
        other = Or if isinstance(self, And) else And
        return f"{_grouped(self.left, other)} {self.word} {_grouped(self.right, And, Or)}"


class And(TargetPair):
    """Samples that both targets choose."""

    word, combine = "and", torch.logical_and


class Or(TargetPair):
    """Samples that at least one of two targets chooses."""

    word, combine = "or", torch.logical_or


@dataclass(frozen=True)
class Not(Target):
    """Samples that a target does not choose."""

    target: Target

    def __post_init__(self) -> None:
        _check_targets("Not", self.target)

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return ~self.target.select(batch, label, prediction)

    def covers(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        inner = self.target
        if isinstance(inner, Not):
            return inner.target.covers(batch, label, prediction)
        if isinstance(inner, (And, Or)):
            either = Or if isinstance(inner, And) else And
            return either(Not(inner.left), Not(inner.right)).covers(batch, label, prediction)
        # As if it were right: then no confusion chooses it.
        return ~inner.select(batch, label, label)

    def __str__(self) -> str:
        return f"not {_grouped(self.target, And, Or)}"


def _grouped(target: Target, *kinds: type[Target]) -> str:
    return f"({target})" if isinstance(target, kinds) else str(target)


def _check_targets(kind: str, *targets: Any) -> None:
    for target in targets:
        if not isinstance(target, Target):
            raise ConfigurationError(
                f"`target`: {kind} was given {target!r}, which is no Target.",
                "combine what `Target.label(k)`, `Target.where(predicate)` and the like give.",
            )


def _classes(target: Target, classes: Tensor | None) -> Tensor:
    if classes is None:
        raise TargetError(
            f"`target`: '{target}' asks for classes, and the task has none.",
            "choose samples with `Target.where(predicate)` or `Target.all()`.",
        )
    return classes


def classes_in(target: Target) -> set[int]:
    """Returns the classes that a target names."""
    found = {value for value in vars(target).values() if isinstance(target, (Label, Confusion))}
    return found.union(*(classes_in(part) for part in vars(target).values() if isinstance(part, Target)))


def parse_target(target: str | Target) -> Target:
    """Reads a target from text, as `str(target)` gives it; a target is given back as it is.

    `not` binds more closely than `and`, and `and` more closely than `or`. A predicate is named by its address.

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
        self.text, self.at = text, 0
        self.words: list[str] = [*TARGET_WORD.findall(text), ""]

    def read(self) -> Target:
        found = self.either()
        self.take("", "`and`, `or` or the end")
        return found

    def either(self) -> Target:
        found = self.both()
        while self.words[self.at] == "or":
            self.at += 1
            found = Or(found, self.both())
        return found

    def both(self) -> Target:
        found = self.single()
        while self.words[self.at] == "and":
            self.at += 1
            found = And(found, self.single())
        return found

    def single(self) -> Target:
        word = self.take(r"not|\(|all|label|confusion|where", "a condition")
        if word == "not":
            return Not(self.single())
        if word == "(":
            found = self.either()
            self.take(r"\)", "`)`")
            return found
        if word == "label":
            return Label(self.class_number())
        if word == "confusion":
            true = self.class_number()
            self.take("->", "`->`")
            return Confusion(true, self.class_number())
        if word == "where":
            return Where(self.take(r".*[.:].*", "the address of a function, such as `package.module:function`"))
        self.at += self.words[self.at] == "failures"
        return AllFailures()

    def class_number(self) -> int:
        return int(self.take(r"[0-9]{1,18}", "a class, a whole number from 0"))

    def take(self, pattern: str, expected: str) -> str:
        word = self.words[self.at]
        if re.fullmatch(pattern, word):
            self.at += 1
            return word
        text, word, before = (shorten(part, 60) for part in (self.text, word, self.words[self.at - 1]))
        place = f" behind `{before}`" if self.at else ""
        found = f"`{word}`" if word else "the end"
        raise TargetError(f"`target='{text}'`: {expected} was expected{place}, and {found} found.", TARGET_HINT)
