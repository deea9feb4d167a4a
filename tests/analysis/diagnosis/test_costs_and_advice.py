"""Costs and advice on numbers that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lightning_nrl.analysis.baselines import BASELINES
from lightning_nrl.analysis.comparison import COMPARED_BY_DEFAULT
from lightning_nrl.analysis.diagnosis import (
    Cost,
    Diagnosis,
    DoubtfulLabel,
    HeldOutCheck,
    LayerCapacity,
    NeighbourMixing,
    TargetFinding,
)
from lightning_nrl.analysis.diagnosis.diagnose import advise, costs


def priced(*measured: Any) -> dict[str, float]:
    return {cost.method: round(cost.seconds, 6) for cost in costs(*measured)}


def test_costs_by_hand_are_sorted_and_name_the_methods_that_are_compared() -> None:
    # Around every search 11 passes. 15 % of 30,000 candidates are scored: 4,500 looks at the head.
    pace = (1.0, 0.001, 0.1, False)
    found = priced(*pace, 10)
    assert found == {
        "convex": 11 + 16 * 0.1,
        "swarm": 11 + 4.5,
        "finetune-polish": 11 + 10 * 3 + 12,
        "linearized": 11 + 40,
        "auto": 11 + 10 * 3 + 12 + (4.5 + 16 * 0.1),
    }
    assert list(found.values()) == sorted(found.values())
    assert set(found) == set(COMPARED_BY_DEFAULT) - set(BASELINES)
    # Where training cannot go on, a fit visits each sample 16 times.
    assert priced(*pace)["finetune-polish"] == 11 + 16 * 3 + 12


def test_methods_that_cannot_be_used_have_no_price() -> None:
    assert set(priced(1.0, 0.001, math.nan, True)) == {"swarm", "auto"}
    assert set(priced(1.0, math.nan, math.nan, False)) == {"linearized", "finetune-polish", "auto"}


WHOLE = "Use the default, method='auto', on the whole network, about 10 s:"
LAST = "the last layer (head)"
KNOWN = {"samples": 100, "passed": 90, "failed": 10, "targeted": 4}
COSTS = tuple(Cost(method, 10.0, "") for method in ("convex", "linearized", "auto"))
DEEP, HEAD = LayerCapacity("conv", "Conv2d", 9, 0.7, 0.01), LayerCapacity("head", "Linear", 9, 0.5, 0.03)
FAR_HEAD = LayerCapacity("head", "Linear", 9, 0.1, 0.09)
HARMLESS, HARMFUL = HeldOutCheck(4, 9, 0.1, 3, 1.0, 0.9), HeldOutCheck(4, 9, 2.0, 3, 1.0, 0.1)
DOUBT = DoubtfulLabel("new", 7, 0, 1, 1.0, 3.0)


def targets(*fixable: str, margin: float = -1.0) -> list[TargetFinding]:
    return [TargetFinding("new", i, 0, 1, margin, verdict) for i, verdict in enumerate(fixable)]


def advice_on(
    found: list[TargetFinding],
    check: HeldOutCheck | None = None,
    layers: list[LayerCapacity] | None = None,
    known: dict[str, int] = KNOWN,
    **further: Any,
) -> str:
    own = Diagnosis("", "", "", known, "head", tuple(found), (), check, layers=tuple(layers or ()), costs=COSTS)
    return advise(replace(own, **further))


@pytest.mark.parametrize(
    ("found", "check", "doubts", "layers", "words"),
    [
        (targets("yes", "yes", "yes", "no"), HARMLESS, [], [DEEP, HEAD], "Use method='convex', about 10 s"),
        (targets("yes", "yes", "no", "no"), HARMLESS, [], [DEEP, HEAD], f"{WHOLE} {LAST} is not enough"),
        (
            targets(*4 * ["yes"]),
            HARMFUL,
            [],
            [DEEP, HEAD],
            f"{WHOLE} {LAST} would break too much on other data",
        ),
        (
            targets(*4 * ["yes"]),
            None,
            [],
            [DEEP, HEAD],
            f"{WHOLE} what {LAST} would break on other data is not known",
        ),
        (
            targets(*4 * ["yes"]),
            HARMLESS,
            [],
            [DEEP, FAR_HEAD],
            f"{WHOLE} {LAST} would have to change much more",
        ),
        (targets(*4 * ["not tried"]), None, [], [], "Use the default, method='auto', about 10 s."),
        (targets(*4 * ["yes"]), HARMLESS, [DOUBT], [DEEP, HEAD], "Look at labels first: those of 1 of 4 targets"),
        (
            targets(*4 * ["no"]),
            None,
            [],
            [LayerCapacity("conv", "Conv2d", 9, 0.0, 0.8)],
            "Get more data like the targets",
        ),
        (
            targets(*4 * ["no"]),
            None,
            [],
            [LayerCapacity("conv", "Conv2d", 9, 0, math.inf)],
            "Get more data like the targets",
        ),
        (targets(*4 * ["not tried"], margin=math.nan), None, [], [], "Use method='auto', which is the swarm here"),
    ],
)
def test_the_advice_follows_the_figures(
    found: list[TargetFinding],
    check: HeldOutCheck | None,
    doubts: list[DoubtfulLabel],
    layers: list[LayerCapacity],
    words: str,
) -> None:
    mixing = NeighbourMixing(2, (4, 0, 0), (0, 0, 9))
    assert advice_on(found, check, layers, mixing=mixing, doubts=tuple(doubts)).startswith(words)


def test_without_targets_or_passed_samples_there_is_nothing_to_advise() -> None:
    assert advice_on([], known={**KNOWN, "targeted": 0}).startswith("Nothing to repair")
    assert advice_on(targets("no"), known={**KNOWN, "passed": 0}).startswith("Get data")


def test_an_advice_gives_its_reasons_in_figures() -> None:
    advice = advice_on(targets("yes", "yes", "yes", "no"), HARMLESS, [DEEP, HEAD])
    assert "it can fix 3 of 4 targets at zero known regressions" in advice
    assert "fixing one repairs 1.0 other targets and breaks 0.1 passed samples" in advice
    assert "a change of conv by 1.0% of its norm, of head by 3.0%" in advice
