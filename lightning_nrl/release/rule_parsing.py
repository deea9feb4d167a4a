"""Rules as text, for command lines and YAML."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.gate.acceptance import read_number
from lightning_nrl.release.protected import ProtectedIntact
from lightning_nrl.release.rules import AtMostBroken, MaxNegativeFlipRate, NoSliceWorse, Rule

__all__ = ["RULE_EXAMPLES", "parse_rule", "parse_rules"]

RULE_EXAMPLES = (
    "instance",
    "accuracy",
    "tolerance:1%",
    "nfr:1%",
    "nfr:1%:99%",
    "slice-nfr:5%",
    "slices",
    "slices:count",
    "protected:ids.csv",
)


def parse_rules(rules: str | Rule | Sequence[str | Rule]) -> tuple[Rule, ...]:
    """Rules from what a user may write: one, or several.

    Raises:
        ConfigurationError: there is none, or one cannot be read.
    """
    listed = [rules] if isinstance(rules, (str, Rule)) else rules
    if not isinstance(listed, (list, tuple)) or not listed:
        raise ConfigurationError(
            explain(f"`rules={rules!r}` are no rules.", "give at least one, such as ['instance'].")
        )
    return tuple(parse_rule(rule) for rule in listed)


def parse_rule(rule: Any) -> Rule:
    """A rule from text; a rule is given back as it is.

    Args:
        rule: one of `RULE_EXAMPLES` with numbers of your own; all but `protected` may end with ` in SPLIT, SPLIT`.

    Raises:
        ConfigurationError: it is none of these.

    Example:
        >>> parse_rule("nfr:1%:99% in test")
        MaxNegativeFlipRate(limit=0.01, confidence=0.99, each_slice=False, splits=('test',))
    """
    if isinstance(rule, Rule):
        return rule
    text, _, named = str(rule).partition(" in ")
    kind, *given = (part.strip() for part in text.split(":"))
    splits = tuple(name.strip() for name in named.split(",")) if named else ()
    if kind == "protected" and given:
        return ProtectedIntact(str(rule).partition(":")[2].strip())
    if kind in ("instance", "accuracy", "tolerance"):
        return AtMostBroken(text, splits)
    numbers = [_number(part, rule) for part in given if part != "count"]
    if kind in ("nfr", "slice-nfr") and len(numbers) == len(given) and len(numbers) in (1, 2):
        limit, confidence = numbers if len(numbers) == 2 else (numbers[0], 0.95)
        return MaxNegativeFlipRate(limit, confidence, kind == "slice-nfr", splits)
    if kind == "slices" and given == ["count"]:
        return NoSliceWorse("count", splits=splits)
    if kind == "slices" and len(numbers) == len(given) <= 1:
        return NoSliceWorse("test", numbers[0] if numbers else 0.05, splits)
    names = [name.partition(":")[0] for name in RULE_EXAMPLES]
    near = difflib.get_close_matches(kind, names, n=1)
    meant = f", did you mean {near[0]!r}?" if near and near[0] != kind else "."
    raise ConfigurationError(
        explain(f"`rules`: {rule!r} is no rule{meant}", f"write one of {list(RULE_EXAMPLES)}, or a `Rule`.")
    )


def _number(text: str, rule: Any) -> float:
    try:
        return float(read_number(text))
    except ValueError as error:
        raise ConfigurationError(
            explain(f"`rules`: {text!r} in {rule!r} is no number.", f"write one of {list(RULE_EXAMPLES)}.")
        ) from error
