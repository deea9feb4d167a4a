"""Targets: conditions that select the failures to repair.

Targets are built by `Target.label(3)`, `Target.confusion(3, 5)`, `Target.where(predicate)` and
`Target.all()`, and combined by `&`, `|` and `~`. They are immutable and comparable; `str` describes
them.
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
"""Maps a batch as returned by the data loader to one bool per sample: a tensor, an array or a list.
"""

TARGET_WORD = re.compile(r"->|[()]|(?:(?!->)[^\s()])+")
TARGET_HINT = (
    "write `label 3`, `confusion 3 -> 5`, `where package.module:function` or `all`, "
    "and combine them with `and`, `or`, `not` and parentheses."
)


class Target(ABC):
    """Condition on samples: the failures that meet the condition are repaired.

    Example:
        >>> print(Target.label(3) | Target.confusion(3, 5))
        label 3 or confusion 3 -> 5
        >>> print(Target.all() & ~(Target.label(3) | Target.label(5)))
        all failures and not (label 3 or label 5)
    """

    @abstractmethod
    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        """Marks the samples of a batch that meet the condition. Of these, the caller repairs only
        failures.

        Args:
            batch: `n` samples.
            label: `n` int64, true classes; None if the task has no classes.
            prediction: `n` int64, predicted classes; None if the task has no classes.

        Returns:
            `n` bool on the CPU.
        """

    def covers(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        """Marks right and wrong samples of the kind to repair (in the paper, the samples of the
        class
        to be repaired).

        Ignores conditions on the predicted class: a confusion covers all samples of its true class.
        """
        return self.select(batch, label, prediction)

    @abstractmethod
    def __str__(self) -> str:
        """Returns the condition as text, which `parse_target` reads if every predicate is given by
        its address.
        """

    @staticmethod
    def all() -> Target:
        """Selects every failure."""
        return AllFailures()

    @staticmethod
    def label(label: int) -> Target:
        """Selects failures of class `label`."""
        return Label(label)

    @staticmethod
    def confusion(true: int, predicted: int) -> Target:
        """Selects failures of class `true` predicted as class `predicted`."""
        return Confusion(true, predicted)

    @staticmethod
    def where(predicate: Predicate | str, name: str | None = None) -> Target:
        """Selects failures by a predicate on the batch, such as "partly occluded". See `Where` for
        the arguments.
        """
        return Where(predicate, name)

    def __and__(self, other: Target) -> Target:
        return And(self, other) if isinstance(other, Target) else NotImplemented

    def __or__(self, other: Target) -> Target:
        return Or(self, other) if isinstance(other, Target) else NotImplemented

    def __invert__(self) -> Target:
        return Not(self)

    def __bool__(self) -> bool:
        # Without this error, `a and b` would silently give `b`, and `a or b` would give `a`.
        problem = "`target`: a Target is neither true nor false."
        raise TypeError(explain(problem, "combine targets with `&`, `|` and `~`."))


@dataclass(frozen=True)
class AllFailures(Target):
    """Target without a condition: every failure is repaired."""

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return torch.ones(len(batch), dtype=torch.bool)

    def __str__(self) -> str:
        return "all failures"


@dataclass(frozen=True)
class Label(Target):
    """Target that selects the samples of one true class, a whole number from 0."""

    # Without `field()`, the inherited static method `label` would become the default.
    label: int = field()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", check_class("label", self.label))

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return _required(self, label).eq(self.label).cpu()

    def __str__(self) -> str:
        return f"label {self.label}"


@dataclass(frozen=True)
class Confusion(Target):
    """Target that selects the samples of class `true` that are predicted as class `predicted`."""

    true: int
    predicted: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "true", check_class("true", self.true))
        object.__setattr__(self, "predicted", check_class("predicted", self.predicted))
        if self.true == self.predicted:
            raise ConfigurationError(
                f"`target`: confusion {self} is not a failure: the true and the predicted class are the same.",
                f"give two classes, or choose every failure of the class with `Target.label({self.true})`.",
            )

    def select(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return (
            _required(self, label).eq(self.true) & _required(self, prediction).eq(self.predicted)
        ).cpu()

    def covers(self, batch: Batch, label: Tensor | None, prediction: Tensor | None) -> Tensor:
        return _required(self, label).eq(self.true).cpu()

    def __str__(self) -> str:
        return f"confusion {self.true} -> {self.predicted}"


@dataclass(frozen=True)
class Where(Target):
    """Target that selects the samples for which a predicate is true.

    Attributes:
        predicate: function of the raw batch that returns one bool per sample, or its address,
            `package.mod:function`.
        name: name in reports; None: the function's name or address.
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
                "it is called with the whole batch as the data loader returns it.",
            ) from error
        what = f"`target`: the predicate of '{self}'"
        return check_per_sample(what, found, len(batch), "bool", TargetError).cpu()

    def __str__(self) -> str:
        if self.name is not None or isinstance(self.predicate, str):
            return f"where {self.predicate if self.name is None else self.name}"
        name = getattr(self.predicate, "__name__", type(self.predicate).__name__)
        code = getattr(self.predicate, "__code__", None)
        return (
            f"where lambda of line {code.co_firstlineno}"
            if name == "<lambda>" and code
            else f"where {name}"
        )


@dataclass(frozen=True)
class TargetPair(Target):
    """Combination of two targets."""

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
        return (
            f"{_parenthesized(self.left, other)} {self.word} {_parenthesized(self.right, And, Or)}"
        )


class And(TargetPair):
    """Target that selects the samples selected by both of two targets."""

    word, combine = "and", torch.logical_and


class Or(TargetPair):
    """Target that selects the samples selected by at least one of two targets."""

    word, combine = "or", torch.logical_or


@dataclass(frozen=True)
class Not(Target):
    """Target that selects the samples not selected by another target."""

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
        # With the label as prediction, no sample is a confusion: `not confusion` covers every
        # sample.
        return ~inner.select(batch, label, label)

    def __str__(self) -> str:
        return f"not {_parenthesized(self.target, And, Or)}"


def _parenthesized(target: Target, *kinds: type[Target]) -> str:
    return f"({target})" if isinstance(target, kinds) else str(target)


def _check_targets(kind: str, *targets: Any) -> None:
    for target in targets:
        if not isinstance(target, Target):
            raise ConfigurationError(
                f"`target`: {kind} was given {target!r}, which is not a Target.",
                "combine targets such as `Target.label(k)` and `Target.where(predicate)`.",
            )


def _required(target: Target, classes: Tensor | None) -> Tensor:
    if classes is None:
        raise TargetError(
            f"`target`: '{target}' asks for classes, and the task has none.",
            "choose samples with `Target.where(predicate)` or `Target.all()`.",
        )
    return classes


def classes_in(target: Target) -> set[int]:
    """Returns the numbers of all classes that occur in a target."""
    found = {value for value in vars(target).values() if isinstance(target, (Label, Confusion))}
    return found.union(
        *(classes_in(part) for part in vars(target).values() if isinstance(part, Target))
    )


def parse_target(target: str | Target) -> Target:
    """Parses the text of a target, as returned by `str(target)`. Returns a `Target` unchanged.

    `not` binds tighter than `and`, and `and` tighter than `or`. Predicates are written as
    addresses.

    Example:
        >>> parse_target("label 3 and not confusion 3 -> 5") == Target.label(3) & ~Target.confusion(3, 5)
        True
    """
    if isinstance(target, str):
        try:
            return _TargetParser(target).parse()
        except RecursionError as error:
            raise TargetError("`target`: the text is nested too deeply.", TARGET_HINT) from error
    check_kind(
        "target", target, isinstance(target, Target), "Target", "Target.label(3) or 'label 3'"
    )
    return target


def target_in(text: str) -> Target | None:
    """Parses a target of several words, such as `label 3`. Returns None for one word or other text."""
    try:
        return parse_target(text) if len(text.split()) > 1 else None
    except TargetError:
        return None


class _TargetParser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.words: list[str] = [*TARGET_WORD.findall(text), ""]

    def parse(self) -> Target:
        found = self.parse_or()
        self.take("", "`and`, `or` or the end")
        return found

    def parse_or(self) -> Target:
        found = self.parse_and()
        while self.words[self.at] == "or":
            self.at += 1
            found = Or(found, self.parse_and())
        return found

    def parse_and(self) -> Target:
        found = self.parse_not()
        while self.words[self.at] == "and":
            self.at += 1
            found = And(found, self.parse_not())
        return found

    def parse_not(self) -> Target:
        word = self.take(r"not|\(|all|label|confusion|where", "a condition")
        if word == "not":
            return Not(self.parse_not())
        if word == "(":
            found = self.parse_or()
            self.take(r"\)", "`)`")
            return found
        if word == "label":
            return Label(self.parse_class())
        if word == "confusion":
            true = self.parse_class()
            self.take("->", "`->`")
            return Confusion(true, self.parse_class())
        if word == "where":
            return Where(
                self.take(
                    r".*[.:].*", "the address of a function, such as `package.module:function`"
                )
            )
        self.at += self.words[self.at] == "failures"
        return AllFailures()

    def parse_class(self) -> int:
        return int(self.take(r"[0-9]{1,18}", "a class number from 0"))

    def take(self, pattern: str, expected: str) -> str:
        word = self.words[self.at]
        if re.fullmatch(pattern, word):
            self.at += 1
            return word
        text, word, before = (
            shorten(part, 60) for part in (self.text, word, self.words[self.at - 1])
        )
        place = f" after `{before}`" if self.at else ""
        found = f"`{word}`" if word else "the end"
        raise TargetError(
            f"`target='{text}'`: expected {expected}{place}, found {found}.", TARGET_HINT
        )
