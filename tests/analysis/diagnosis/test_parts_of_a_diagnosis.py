"""Neighbours, room, costs and advice on numbers that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

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
from lightning_nrl.analysis.diagnosis._layer_capacity import GradientSketches, layer_capacities
from lightning_nrl.analysis.diagnosis.diagnose import Timings, costs
from lightning_nrl.analysis.diagnosis.diagnosis_result import advise
from lightning_nrl.evaluation.head_features import doubtful, neighbours
from lightning_nrl.report._formatting import rough_percent, rough_time

RIGHT, UP = [1.0, 0.0], [0.0, 1.0]
PASSED = torch.tensor([RIGHT, RIGHT, RIGHT, UP, UP, [-2.0, 0.0], [-1.0, -2.0]])
"""Their mean is 0, so that likeness is by direction alone."""
LABEL = torch.tensor([0, 0, 1, 2, 2, 3, 3])


def test_neighbours_are_those_in_the_same_direction() -> None:
    near = neighbours(torch.tensor([[5.0, 0.1], [0.0, 9.0]]), torch.tensor([1, 2]), PASSED, LABEL, k=3)
    # The first has 0, 0, 1 beside it; the second 2, 2 and one of the first three.
    assert near.agreement.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert near.label.tolist() == [0, 2]
    assert near.share.tolist() == pytest.approx([2 / 3, 2 / 3])


def test_a_sample_is_no_neighbour_of_its_own() -> None:
    near = neighbours(PASSED[2:3], LABEL[2:3], PASSED, LABEL, itself=torch.tensor([2]), k=2)
    assert near.agreement.tolist() == [0.0]
    alone = neighbours(PASSED[:1], LABEL[:1], PASSED[:1], LABEL[:1], itself=torch.tensor([0]))
    assert alone.agreement.isnan().all()


@pytest.mark.parametrize(("lead", "doubted"), [(3.0, True), (1.0, False)])
def test_a_label_is_doubted_if_neighbours_agree_and_the_model_is_as_sure_as_usual(lead: float, doubted: bool) -> None:
    passed_logits = torch.tensor(
        [[2.0, 0.0], [4.0, 1.0], [0.0, 9.0]]
    )  # class 0 leads by 2 and by 3; the lower median: 2
    near = neighbours(
        torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([RIGHT, RIGHT, UP]), torch.tensor([0, 0, 1]), k=2
    )
    found = doubtful(near, torch.tensor([1]), torch.tensor([[lead, 0.0]]), passed_logits, torch.tensor([0, 0, 1]))
    assert found.tolist() == [doubted]


def test_the_layer_that_can_tell_samples_apart_has_room() -> None:
    # Two layers with one target (margin -2) and one passed sample (margin 2). In the first their gradients are at an
    # angle of 135 degrees: of the target's gain sin(135) is left, and -2 + 2 (v_1 + v_2) is to become 0.001 at the
    # least |v|: by 1.0005 / 2 on both axes, which the passed sample survives. In the other they are opposite.
    sketches = GradientSketches(
        torch.tensor([0, 1]),
        torch.tensor([-2.0, 2.0]),
        {"tells": torch.tensor([[2.0, 2.0], [-2.0, 0.0]]), "cannot": torch.tensor([[1.0, 0.0], [-1.0, 0.0]])},
    )
    found = layer_capacities(sketches, torch.tensor([True, False]), {"tells": 1.0, "cannot": 1.0}, keep=1e-3)
    assert found["tells"].share.item() == pytest.approx(math.sqrt(0.5), abs=1e-4)
    assert found["tells"].change.item() == pytest.approx(1.0005 / 2 * math.sqrt(2), rel=1e-4)
    assert found["cannot"].share.item() == pytest.approx(0, abs=1e-4)
    assert found["cannot"].change.item() == math.inf


def priced(pace: Timings, epochs: int | None = None) -> dict[str, float]:
    return {cost.method: round(cost.seconds, 6) for cost in costs(pace, epochs)}


def test_costs_by_hand_are_sorted_and_name_the_methods_that_are_compared() -> None:
    # Around every search 11 passes. 15 % of 30,000 candidates are scored: 4,500 looks at the head.
    pace = Timings(one_pass=1.0, head=0.001, alone=0.1, margins=True)
    found = priced(pace, epochs=10)
    assert found == {
        "convex": 11 + 16 * 0.1,
        "swarm": 11 + 4.5,
        "finetune-polish": 11 + 10 * 2.5 + 12,
        "linearized": 11 + 40,
        "auto": 11 + 10 * 2.5 + 12 + (4.5 + 16 * 0.1),
    }
    assert list(found.values()) == sorted(found.values())
    assert set(found) == set(COMPARED_BY_DEFAULT) - set(BASELINES)
    # Where training cannot go on, a fit visits each sample 16 times.
    assert priced(pace)["finetune-polish"] == 11 + 16 * 2.5 + 12


def test_methods_that_cannot_be_used_have_no_price() -> None:
    assert set(priced(Timings(1.0, 0.001, None, margins=False))) == {"swarm", "auto"}
    assert set(priced(Timings(1.0, None, None, margins=True))) == {"linearized", "finetune-polish", "auto"}


def test_numbers_in_words() -> None:
    assert [rough_percent(x) for x in (0.0, 0.00123, 0.0123, 0.0996, 0.5, 1.0, math.inf, math.nan)] == [
        "0%", "0.12%", "1.2%", "10%", "50%", "100%", "none", "-",
    ]  # fmt: skip
    assert [rough_time(x) for x in (0.2, 12.3, 99.4, 240, 7300)] == [
        "under 1 s", "about 12 s", "about 99 s", "about 4 min", "about 2.0 h",
    ]  # fmt: skip


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
