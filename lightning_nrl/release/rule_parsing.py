"""Parses release rules from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

from lightning_nrl._utils.checks import read_number
from lightning_nrl._utils.registry import Registry
from lightning_nrl.data.targets import target_in
from lightning_nrl.errors import ConfigurationError, check_choice
from lightning_nrl.gate import GATES
from lightning_nrl.release.protected import ProtectedIntact
from lightning_nrl.release.rules import AtMostBroken, Rule
from lightning_nrl.release.statistical_rules import (
    IsBetter,
    IsEquivalent,
    IsNonInferior,
    LimitRule,
    MaxCalibrationRise,
    MaxNegativeFlipRate,
    MinAccuracy,
    NoSliceWorse,
)

Require = Literal["not-worse", "better", "any"]
REQUIRED: Mapping[str, Rule | None] = {
    "not-worse": AtMostBroken("accuracy"),
    "better": IsBetter(),
    "any": None,
}
"""By the value of `require`: the rule that a release gate adds, for every split."""

RULES: Registry[Rule | None] = Registry(
    "rule", "a `Rule`", lambda value: isinstance(value, Rule), include=(GATES,)
)
"""Parsers of rules: functions of a `RuleText`, which return None if it is invalid.

The name of a gate is a rule, too: `AtMostBroken` with this gate.
"""


class RuleText(NamedTuple):
    """The text of a rule, `name:argument:argument in split, split`, and its parts."""

    text: str
    name: str
    arguments: list[str]
    splits: tuple[str, ...]

    def numbers(self) -> list[float]:
        hint = f"write one of {list(RULES.forms)}."
        place = f"`rules={self.text!r}`"
        return [float(read_number(place, argument, hint)) for argument in self.arguments]


def parse_rules(
    rules: str | Rule | Sequence[str | Rule], require: Require = "any"
) -> tuple[Rule, ...]:
    """Parses one or several rules, and adds `REQUIRED[require]` if it is not among them.

    Raises:
        ConfigurationError: there is no rule, or a rule cannot be read.
    """
    check_choice("require", require, REQUIRED)
    if isinstance(rules, (str, Rule)):
        rules = [rules]
    if not isinstance(rules, (list, tuple)) or not rules:
        raise ConfigurationError(
            f"`rules={rules!r}` contains no rule.", "give at least one, such as ['instance']."
        )
    parsed = list(map(parse_rule, rules))
    required = REQUIRED[require]
    if required is not None and required not in parsed:
        parsed.append(required)
    return tuple(parsed)


def parse_rule(rule: str | Rule) -> Rule:
    """Parses the text of a rule, such as one of the examples in `RULES.forms`.

    A `Rule` is returned unchanged. The text of every rule but `protected` may end with
    ` in SPLIT, SPLIT`.

    Raises:
        ConfigurationError: the text is invalid.

    Example:
        >>> parse_rule("nfr:1%:99% in test")
        MaxNegativeFlipRate(limit=0.01, confidence=0.99, each_slice=False, splits=('test',))
    """
    if isinstance(rule, Rule):
        return rule
    condition, _, split_names = rule.partition(" in ")
    name, *arguments = map(str.strip, condition.split(":"))
    splits: tuple[str, ...] = ()
    if split_names:
        splits = tuple(map(str.strip, split_names.split(",")))
    if name in GATES:
        return AtMostBroken(condition, splits)
    parsed = None
    if name in RULES:
        parsed = RULES.factory("rules", name)(RuleText(rule, name, arguments, splits))
    if parsed is None:
        raise RULES.unreadable(f"`rules`: {rule!r}", name)
    return parsed


@RULES.register("better")
def _is_better(text: RuleText) -> Rule | None:
    if text.arguments:
        return None
    return IsBetter(text.splits)


LIMIT_RULES: Mapping[str, Callable[[float, float, bool, tuple[str, ...]], LimitRule]] = {
    "nfr:1%": MaxNegativeFlipRate,
    "floor:95%": MinAccuracy,
    "non-inferior:1%": IsNonInferior,
    "equivalent:1%": IsEquivalent,
    "calibration:1%": MaxCalibrationRise,
}
"""Rules with a limit, by an example of their text."""


def _limit_rule(example: str, text: RuleText) -> Rule | None:
    numbers = text.numbers()
    if len(numbers) == 1:
        numbers.append(0.95)
    if len(numbers) != 2:
        return None
    limit, confidence = numbers
    each_slice = text.name.startswith("slice-")
    return LIMIT_RULES[example](limit, confidence, each_slice, text.splits)


for example in LIMIT_RULES:
    name = example.partition(":")[0]
    RULES.register(name, example, f"{example}:99%")(partial(_limit_rule, example))
    RULES.register(f"slice-{name}", f"slice-{example}")(partial(_limit_rule, example))


@RULES.register("slices", "slices", "slices:count")
def _no_slice_worse(text: RuleText) -> Rule | None:
    if text.arguments == ["count"]:
        return NoSliceWorse("count", splits=text.splits)
    if len(text.arguments) > 1:
        return None
    level = 0.05
    if text.arguments:
        (level,) = text.numbers()
    return NoSliceWorse("test", level, text.splits)


@RULES.register("protected", "protected:ids.csv", "protected:label 3")
def _protected(text: RuleText) -> Rule | None:
    if not text.arguments:
        return None
    # The name of a file or a predicate may contain " in ".
    protected = text.text.partition(":")[2].strip()
    target = target_in(protected)
    if target is None:
        return ProtectedIntact(protected)
    return ProtectedIntact(where=target)
