"""Parses release rules from text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_nrl._utils.checks import read_number
from lightning_nrl._utils.registry import Registry
from lightning_nrl.data.targets import target_in
from lightning_nrl.errors import ConfigurationError, check_choice
from lightning_nrl.updates.rules import (
    AtMostBroken,
    IsBetter,
    MaxNegativeFlipRate,
    NoSliceWorse,
    ProtectedIntact,
    Rule,
)

Require = Literal["not-worse", "better", "any"]
REQUIRED: Mapping[str, Rule | None] = {
    "not-worse": AtMostBroken("accuracy"),
    "better": IsBetter(),
    "any": None,
}
"""By the value of `require`: the rule that a release gate adds to the user's rules. It applies to
every split.
"""

RULES: Registry[Rule | None] = Registry("rule", "a `Rule`", lambda value: isinstance(value, Rule))
"""Parsers of rules: functions of the text, its parts after the name, and the splits. Invalid text
gives None.
"""


def parse_rules(
    rules: str | Rule | Sequence[str | Rule], require: Require = "any"
) -> tuple[Rule, ...]:
    """Parses one or several rules, and adds `REQUIRED[require]` if it is not among them.

    Raises a `ConfigurationError` if there is no rule, or if a rule cannot be read.
    """
    check_choice("require", require, tuple(REQUIRED))
    listed = [rules] if isinstance(rules, (str, Rule)) else rules
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ConfigurationError(
            f"`rules={rules!r}` contains no rule.", "give at least one, such as ['instance']."
        )
    parsed = tuple(parse_rule(rule) for rule in listed)
    added = REQUIRED[require]
    return parsed if added is None or added in parsed else (*parsed, added)


def parse_rule(rule: Any) -> Rule:
    """Parses the text of a rule, such as one of the examples in `RULES.forms`. Returns a `Rule`
    unchanged.

    The text of every rule but `protected` may end with ` in SPLIT, SPLIT`. Invalid text raises a
    `ConfigurationError`.

    Example:
        >>> parse_rule("nfr:1%:99% in test")
        MaxNegativeFlipRate(limit=0.01, confidence=0.99, each_slice=False, splits=('test',))
    """
    if isinstance(rule, Rule):
        return rule
    text, _, named = str(rule).partition(" in ")
    kind, *given = (part.strip() for part in text.split(":"))
    splits = tuple(name.strip() for name in named.split(",")) if named else ()
    made = RULES.factory("rules", kind)(str(rule), given, splits) if kind in RULES else None
    if made is None:
        raise RULES.unreadable(f"`rules`: {rule!r}", kind)
    return made


@RULES.register("tolerance", "tolerance:1%")
@RULES.register("accuracy")
@RULES.register("instance")
def _at_most_broken(text: str, given: Sequence[str], splits: tuple[str, ...]) -> Rule:
    return AtMostBroken(text.partition(" in ")[0], splits)


@RULES.register("better")
def _is_better(text: str, given: Sequence[str], splits: tuple[str, ...]) -> Rule | None:
    return None if given else IsBetter(splits)


@RULES.register("slice-nfr", "slice-nfr:5%")
@RULES.register("nfr", "nfr:1%", "nfr:1%:99%")
def _max_nfr(text: str, given: Sequence[str], splits: tuple[str, ...]) -> Rule | None:
    numbers = [_number(part, text) for part in given]
    if len(numbers) not in (1, 2):
        return None
    confidence = numbers[1] if len(numbers) == 2 else 0.95
    return MaxNegativeFlipRate(numbers[0], confidence, text.startswith("slice-"), splits)


@RULES.register("slices", "slices", "slices:count")
def _no_slice_worse(text: str, given: Sequence[str], splits: tuple[str, ...]) -> Rule | None:
    if "count" in given:
        return NoSliceWorse("count", splits=splits) if len(given) == 1 else None
    numbers = [_number(part, text) for part in given]
    return (
        NoSliceWorse("test", numbers[0] if numbers else 0.05, splits) if len(numbers) <= 1 else None
    )


@RULES.register("protected", "protected:ids.csv", "protected:label 3")
def _protected(text: str, given: Sequence[str], splits: tuple[str, ...]) -> Rule | None:
    what = text.partition(":")[2].strip()
    target = target_in(what)
    return (
        (ProtectedIntact(what) if target is None else ProtectedIntact(where=target))
        if given
        else None
    )


def _number(text: str, rule: str) -> float:
    return float(read_number(f"`rules={rule!r}`", text, f"write one of {list(RULES.forms)}."))
