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
from types import FunctionType
from typing import ClassVar

import torch
from torch import Tensor

from lightning_nrl._utils.checks import check_class, check_per_sample
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.batch import Batch, RawBatch
from lightning_nrl.errors import ConfigurationError, TargetError, check_kind, explain

Predicate = Callable[[RawBatch], object]
"""Maps a raw batch to one bool per sample: a tensor, an array or a list."""
Classes = Tensor | None
"""True or predicted classes of `n` samples, `n` int64; None if the task has no classes."""

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
    def select(self, batch: Batch, label: Classes, prediction: Classes) -> Tensor:
        """Marks the samples of a batch that meet the condition; only failures are repaired.

        Args:
            batch: `n` samples.
            label: `n` int64, true classes; None if the task has no classes.
            prediction: `n` int64, predicted classes; None if the task has no classes.

        Returns:
            `n` bool on the CPU.
        """

    def covers(self, batch: Batch, label: Classes, prediction: Classes) -> Tensor:
        """Marks right and wrong samples of the kind to repair (in the paper, of a class).

        Ignores conditions on the predicted class: a confusion covers all samples of its true class.
        """
        if label is None:
            return self.select(batch, label, prediction)
        covered = self.select(batch, label, label)
        for predicted in classes_in(self):
            covered = covered | self.select(batch, label, torch.full_like(label, predicted))
        return covered

    @abstractmethod
    def __str__(self) -> str:
        """Returns the condition as text.

        `parse_target` reads the text if every predicate is given by its address.
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
        """Selects failures by a predicate on the batch, such as "partly occluded" (see `Where`)."""
        return Where(predicate, name)

    def __and__(self, other: Target) -> Target:
        return And(self, other)

    def __or__(self, other: Target) -> Target:
        return Or(self, other)

    def __invert__(self) -> Target:
        return Not(self)

    def __bool__(self) -> bool:
        # Without this error, `a and b` would silently give `b`, and `a or b` would give `a`.
        raise TypeError(
            explain(
                "`target`: a Target is neither true nor false.",
                "combine targets with `&`, `|` and `~`.",
            )
        )


@dataclass(frozen=True)
class AllFailures(Target):
    """Target without a condition: every failure is repaired."""

    def select(self, batch: Batch, label: Classes, prediction: Classes) -> Tensor:
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

    def select(self, batch: Batch, label: Classes, prediction: Classes) -> Tensor:
        return (_required(self, label) == self.label).cpu()

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
                f"`target`: confusion {self} is not a failure: the true and the predicted class "
                "are the same.",
                "give two classes, or choose every failure of the class with "
                f"`Target.label({self.true})`.",
            )

    def select(self, batch: Batch, label: Classes, prediction: Classes) -> Tensor:
        if prediction is None and label is not None:
            raise TargetError(
                f"`target`: '{self}' asks what a model predicts, which is not known here.",
                f"choose the class: `label {self.true}`.",
            )
        is_predicted = _required(self, prediction) == self.predicted
        return ((_required(self, label) == self.true) & is_predicted).cpu()

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

    def select(self, batch: Batch, label: Classes, prediction: Classes) -> Tensor:
        predicate = import_function("predicate", self.predicate)
        argument = f"`target`: the predicate of '{self}'"
        try:
            selected = predicate(batch.raw)
        except Exception as error:
            raise TargetError(
                f"{argument} raised {type(error).__name__}: {error}",
                "it is called with the whole batch as the data loader returns it.",
            ) from error
        return check_per_sample(argument, selected, len(batch), "bool", TargetError).cpu()

    def __str__(self) -> str:
        predicate = self.predicate
        if self.name is not None:
            name = self.name
        elif isinstance(predicate, str):
            name = predicate
        elif isinstance(predicate, FunctionType) and predicate.__name__ == "<lambda>":
            name = f"lambda of line {predicate.__code__.co_firstlineno}"
        else:
            name = getattr(predicate, "__name__", type(predicate).__name__)
        return f"where {name}"


@dataclass(frozen=True)
class TargetPair(Target):
    """Combination of two targets."""

    left: Target
    right: Target

    word: ClassVar[str]
    combine: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def __post_init__(self) -> None:
        _check_target(type(self), self.left)
        _check_target(type(self), self.right)

    def select(self, batch: Batch, label: Classes, prediction: Classes) -> Tensor:
        left = self.left.select(batch, label, prediction)
        return type(self).combine(left, self.right.select(batch, label, prediction))

    def __str__(self) -> str:
        left = _operand(self.left)
        if isinstance(self.left, type(self)):  # is read first even without parentheses
            left = str(self.left)
        return f"{left} {self.word} {_operand(self.right)}"


class And(TargetPair):
    """Target that selects the samples selected by both of two targets."""

    word = "and"
    combine = torch.logical_and


class Or(TargetPair):
    """Target that selects the samples selected by at least one of two targets."""

    word = "or"
    combine = torch.logical_or


@dataclass(frozen=True)
class Not(Target):
    """Target that selects the samples not selected by another target."""

    target: Target

    def __post_init__(self) -> None:
        _check_target(Not, self.target)

    def select(self, batch: Batch, label: Classes, prediction: Classes) -> Tensor:
        return ~self.target.select(batch, label, prediction)

    def __str__(self) -> str:
        return f"not {_operand(self.target)}"


def _operand(target: Target) -> str:
    if isinstance(target, TargetPair):
        return f"({target})"
    return str(target)


def _check_target(kind: type[Target], target: object) -> None:
    if not isinstance(target, Target):
        raise ConfigurationError(
            f"`target`: {kind.__name__} was given {target!r}, which is not a Target.",
            "combine targets such as `Target.label(k)` and `Target.where(predicate)`.",
        )


def _required(target: Target, classes: Classes) -> Tensor:
    if classes is None:
        raise TargetError(
            f"`target`: '{target}' asks for classes, and the task has none.",
            "choose samples with `Target.where(predicate)` or `Target.all()`.",
        )
    return classes


def classes_in(target: Target) -> set[int]:
    """Returns the numbers of all classes that occur in a target."""
    classes: set[int] = set()
    for value in vars(target).values():
        if isinstance(value, Target):
            classes |= classes_in(value)
        elif isinstance(target, (Label, Confusion)):
            classes.add(value)
    return classes


def parse_target(target: str | Target) -> Target:
    """Parses the text of a target, as returned by `str(target)`. Returns a `Target` unchanged.

    `not` binds tighter than `and`, and `and` tighter than `or`. Predicates are written as
    addresses.

    Example:
        >>> target = Target.label(3) & ~Target.confusion(3, 5)
        >>> parse_target("label 3 and not confusion 3 -> 5") == target
        True
    """
    if isinstance(target, str):
        try:
            return _TargetParser(target).parse()
        except RecursionError as error:
            raise TargetError("`target`: the text is nested too deeply.", TARGET_HINT) from error
    is_target = isinstance(target, Target)
    check_kind("target", target, is_target, "Target", "Target.label(3) or 'label 3'")
    return target


def target_in(text: str) -> Target | None:
    """Parses a target of several words, such as `label 3`. Returns None for other text."""
    if len(text.split()) < 2:
        return None
    try:
        return parse_target(text)
    except TargetError:
        return None


class _TargetParser:
    """Recursive descent: `or` combines `and`s, which combine single conditions."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words: list[str] = [*TARGET_WORD.findall(text), ""]
        self.position = 0

    @property
    def word(self) -> str:
        return self.words[self.position]

    def parse(self) -> Target:
        target = self.parse_or()
        self.take("", "`and`, `or` or the end")
        return target

    def parse_or(self) -> Target:
        target = self.parse_and()
        while self.word == "or":
            self.position += 1
            target |= self.parse_and()
        return target

    def parse_and(self) -> Target:
        target = self.parse_condition()
        while self.word == "and":
            self.position += 1
            target &= self.parse_condition()
        return target

    def parse_condition(self) -> Target:
        word = self.take(r"not|\(|all|label|confusion|where", "a condition")
        if word == "not":
            return ~self.parse_condition()
        if word == "(":
            target = self.parse_or()
            self.take(r"\)", "`)`")
            return target
        if word == "label":
            return Label(self.parse_class())
        if word == "confusion":
            true = self.parse_class()
            self.take("->", "`->`")
            return Confusion(true, self.parse_class())
        if word == "where":
            expected = "the address of a function, such as `package.module:function`"
            return Where(self.take(r".*[.:].*", expected))
        if self.word == "failures":  # the text of `AllFailures` is "all failures"
            self.position += 1
        return AllFailures()

    def parse_class(self) -> int:
        return int(self.take(r"[0-9]{1,18}", "a class number from 0"))

    def take(self, pattern: str, expected: str) -> str:
        word = self.word
        if re.fullmatch(pattern, word):
            self.position += 1
            return word
        problem = f"`target='{shorten(self.text, 60)}'`: expected {expected}"
        if self.position:
            problem += f" after `{shorten(self.words[self.position - 1], 60)}`"
        end = f"`{shorten(word, 60)}`" if word else "the end"
        raise TargetError(f"{problem}, found {end}.", TARGET_HINT)
