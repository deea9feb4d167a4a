"""The verdict on a repair: the promise, the evidence by a sign test, and the advice."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import Any

import pytest

from lightning_nrl.evaluation.sample_results import GroupCounts, TargetCounts
from lightning_nrl.evaluation.stats import sign_test, upper_limit
from lightning_nrl.records import PricePoint, Rung, SplitReport, Step, UpdateSplit
from lightning_nrl.report import RepairReport

KNOWN = SplitReport("train", "known", TargetCounts(1038, 0, 5, 15, 20, 5))
REPORT = RepairReport(
    "repaired", "5 pass now.", ("head",), "all", "instance", "Multiclass", (KNOWN,)
)
FILES = {
    "patch": "logs/my repair/repair.patch.safetensors",
    "checkpoint": "logs/my repair/repaired.ckpt",
}


def unseen(repaired: int, broken: int, name: str = "test") -> SplitReport:
    return SplitReport(name, "unseen", TargetCounts(300 - broken, broken, repaired, 100 - repaired))


def held_out(repaired: int, broken: int, kept: bool = True) -> Rung:
    counts = TargetCounts(100 - broken, broken, repaired, 100 - repaired)
    return Rung("search", 5, 5, 0, 64, 1.0, held_out=counts, kept=kept)


def judged(*splits: SplitReport, **changes: Any) -> RepairReport:
    return replace(REPORT, splits=(KNOWN, *splits), **changes)


@pytest.mark.parametrize(
    ("repaired", "broken"), [(0, 0), (3, 3), (6, 0), (0, 6), (5, 0), (14, 16), (3, 20), (120, 14)]
)
def test_the_p_value_is_twice_the_smaller_tail_of_a_fair_coin(repaired, broken):
    n = repaired + broken
    tail = sum(comb(n, k) for k in range(min(repaired, broken) + 1)) / 2**n
    assert sign_test(repaired, broken) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@pytest.mark.parametrize(
    ("flips", "evidence", "tone"),
    [
        ((6, 0), "better", "good"),  # p = 2 / 64
        ((5, 0), "no difference shown", "warn"),  # p = 2 / 32
        ((14, 16), "no difference shown", "warn"),
        ((3, 20), "worse", "bad"),
    ],
)
def test_unseen_data_decide_and_harm_is_never_green(flips, evidence, tone):
    report = judged(unseen(*flips), rungs=(held_out(60, 0),))
    verdict = report.verdict
    assert (verdict.evidence, verdict.tone, verdict.source) == (evidence, tone, "unseen")
    assert (verdict.repaired, verdict.broken, verdict.n) == (*flips, 400)
    assert verdict.promise == "kept: none of 1,038 known samples that were right broke"
    assert verdict.headline == f"Repaired: promise kept, {evidence} on unseen data"
    assert f'<h1 class="{tone}">{verdict.headline}</h1>' in report.to_html()


def test_unseen_splits_are_counted_together():
    verdict = judged(unseen(4, 0), unseen(4, 0, "night")).verdict
    assert (verdict.evidence, verdict.repaired, verdict.n) == ("better", 8, 800)
    assert verdict.p_value == pytest.approx(2 / 2**8)


def test_one_unseen_split_that_is_worse_is_not_hidden_by_the_others():
    verdict = judged(unseen(40, 2), unseen(1, 12, "night")).verdict
    assert (verdict.evidence, verdict.repaired, verdict.broken) == ("worse", 1, 12)
    assert verdict.headline == "Repaired: promise kept, worse on unseen data (night)"
    assert verdict.p_value == pytest.approx(2 * 2 * (1 + 13) / 2**13)  # of two splits
    assert judged(unseen(40, 2), unseen(2, 3, "night")).verdict.evidence == "better"


def test_prices_and_rounds_of_a_kept_rung_count_as_choices():
    for n_choices in (1, 3):
        search = replace(held_out(3, 0, kept=False), n_choices=5)
        rungs = search, replace(held_out(9, 0), name="exact", n_choices=n_choices)
        verdict = judged(rungs=rungs).verdict
        assert verdict.p_value == pytest.approx((1 + n_choices) * 2 / 2**9)


@pytest.mark.parametrize(
    "changes", [{"chosen_strength": 0.05}, {"steps": (Step("fit", 1, 0, 0.1, kind="sparse"),)}]
)
def test_held_out_counts_of_weights_that_are_not_written_are_no_evidence(changes):
    assert judged(rungs=(held_out(35, 4),), chosen_strength=1.0).verdict.evidence == "better"
    verdict = judged(rungs=(held_out(35, 4),), **changes).verdict
    assert (verdict.source, verdict.evidence) == ("none", "no difference shown")
    assert verdict.headline == "Repaired: promise kept, not counted on unseen data"


def test_groups_are_tested_instead_of_samples():
    # 3 patients got better and 2 worse, though 14 samples were repaired and 2 broke.
    patients = GroupCounts(39, 3, 20, 4, better=3, worse=2, squared_net=60)
    split = unseen(14, 2)
    split = replace(split, counts=replace(split.counts, groups=patients))
    report = judged(split, unseen_groups=patients)
    verdict = report.verdict
    assert (verdict.evidence, verdict.repaired, verdict.n) == ("no difference shown", 14, 400)
    assert verdict.p_value == 1.0
    assert dict(verdict.facts)["evidence"] == (
        "no difference shown: 14 repaired, 2 broken of 400 unseen samples "
        "(sign test of groups, 3 better, 2 worse, p = 1)"
    )
    assert report.unseen_limit == upper_limit(3, 39)
    assert "(here 3 of 39 groups)" in " ".join(report.to_markdown().split())
    # A group in two splits is the same one: the sum over the splits is not 78.
    both = judged(split, replace(split, split="night"), unseen_groups=patients)
    assert both.unseen_limit == upper_limit(3, 39)
    assert both.unseen.counts.repaired == 28


def test_one_unseen_split_with_worse_groups_is_not_hidden():
    worse = GroupCounts(39, 9, 20, 0, better=0, worse=9, squared_net=9)
    night = unseen(0, 9, "night")
    night = replace(night, counts=replace(night.counts, groups=worse))
    better = GroupCounts(39, 9, 40, 20, better=30, worse=9, squared_net=39)
    verdict = judged(unseen(40, 2), night, unseen_groups=better).verdict
    assert (verdict.evidence, verdict.groups) == ("worse", worse)
    assert verdict.p_value == pytest.approx(2 * 2 / 2**9)  # of two splits


def test_the_held_out_estimate_counts_groups():
    counts = replace(held_out(5, 1).held_out, groups=GroupCounts(40, 3, 12, 3, 2, 3, 9))
    report = judged(rungs=(replace(held_out(5, 1), held_out=counts),))
    text = " ".join(report.to_markdown().split())
    assert "3 of 12 groups with failures repaired (25%; 7.2% to 53%" in text
    assert "3 of 40 groups with passed samples broken (7.5%; 2.1% to 18%" in text
    assert report.verdict.p_value == sign_test(2, 3)


def test_near_copies_are_named_beside_the_held_out_estimate():
    hint = "HINT: say which samples belong together"
    report = judged(rungs=(held_out(5, 1),), near_copies=True)
    assert hint in " ".join(report.to_markdown().split())
    assert hint not in judged(rungs=(held_out(5, 1),)).to_markdown()
    assert hint not in judged(near_copies=True).to_markdown()


def test_without_unseen_data_the_held_out_samples_of_the_kept_rung_are_the_evidence():
    verdict = judged(rungs=(held_out(0, 50, kept=False), held_out(12, 1))).verdict
    assert (verdict.source, verdict.evidence, verdict.tone) == ("held-out", "better", "good")
    assert verdict.p_value == pytest.approx(2 * 2 * (1 + 13) / 2**13)  # one of two rungs
    assert 'unseen="test"' in verdict.advice
    verdict = judged().verdict
    assert (verdict.source, verdict.n, verdict.tone) == ("none", 0, "warn")
    assert 'unseen="test"' in verdict.advice
    assert "no unseen data were given" in dict(verdict.facts)["evidence"]


def test_an_update_is_compared_with_the_model_that_it_replaces():
    update = UpdateSplit(unseen(50, 20), unseen(3, 20))
    verdict = judged(unseen(30, 0), update=(update,), rungs=(held_out(30, 0),)).verdict
    assert (verdict.evidence, verdict.repaired, verdict.broken) == ("worse", 3, 20)
    assert verdict.headline.endswith("worse on unseen data than the replaced model")
    assert verdict.advice == "do not ship the new model; keep the one that it would replace"
    nothing = judged(unseen(0, 0), update=(update,), status="nothing to repair").verdict
    assert (nothing.evidence, nothing.tone) == ("worse", "bad")
    same = UpdateSplit(unseen(3, 3), unseen(3, 3))
    assert judged(unseen(0, 0), update=(same,), status="nothing to repair").verdict.tone == "warn"
    known = UpdateSplit(KNOWN, KNOWN)
    assert judged(update=(known,), rungs=(held_out(30, 0),)).verdict.source == "none"


@pytest.mark.parametrize(
    ("status", "tone"),
    [("nothing to repair", "good"), ("not repaired", "warn"), ("refused", "warn")],
)
def test_unchanged_weights_are_no_repair_and_no_evidence(status, tone):
    verdict = judged(unseen(0, 0), status=status).verdict
    assert (verdict.kept, verdict.source, verdict.tone) == (False, "none", tone)
    assert verdict.headline == f"{status.capitalize()}: the weights are unchanged"


def test_the_promise_says_what_breaks():
    known = replace(KNOWN, counts=TargetCounts(1028, 10, 5, 15, 20, 5))
    refused = judged(status="refused", candidate=(known,)).verdict
    assert "would break 10 of 1,038 known samples" in refused.promise
    promise = replace(REPORT, splits=(known,), gate="tolerance:1%").verdict.promise
    assert promise == (
        "kept: 10 of 1,038 known samples that were right broke, within the gate `tolerance:1%`"
    )


@pytest.mark.parametrize(
    ("point", "named"),
    [
        # Twice as many targets and as many points; one target or one repair fewer.
        (PricePoint(0.01, 9, 10, 10, held_out(30, 10).held_out), True),
        (PricePoint(0.01, 9, 9, 9, held_out(30, 10).held_out), False),
        (PricePoint(0.01, 9, 10, 10, held_out(29, 10).held_out), False),
        # Two points more, since 24 of 200 instead of 20 are net repairs; less.
        (PricePoint(0.01, 9, 6, 6, held_out(34, 10).held_out), True),
        (PricePoint(0.01, 9, 6, 6, held_out(33, 10).held_out), False),
        # Within the gate; not held out.
        (PricePoint(0.01, 0, 20, 20, held_out(90, 0).held_out), False),
        (PricePoint(0.01, 9, 20, 20), False),
    ],
)
def test_a_dear_promise_names_the_gate_that_repairs_more(point, named):
    rungs = (held_out(30, 10),)
    for allowed, gate in ((0.01, "tolerance:1%"), (1.0, "tolerance:9")):
        price = (replace(point, allowed=allowed),)
        advice = judged(unseen(9, 0), rungs=rungs, price=price).verdict.advice
        assert (f'`gate="{gate}"`' in advice) is named
    assert "looser" not in judged(unseen(3, 20), rungs=rungs, price=(point,)).verdict.advice


def test_a_difference_that_more_data_would_show_says_how_many():
    # 12 to 4 is not enough (p = 0.08), 24 to 8 is (p = 0.007).
    assert "2 times as many" in judged(unseen(12, 4)).verdict.advice
    assert "hardly" in judged(unseen(7, 7)).verdict.advice


def test_harm_says_how_to_go_back():
    revert = (
        "--patch 'logs/my repair/repair.patch.safetensors' --ckpt 'logs/my repair/repaired.ckpt'"
    )
    advice = judged(unseen(3, 20), files=FILES).verdict.advice
    assert f"`lightning-nrl revert {revert} --out original.ckpt`" in advice
    assert "checkpoint from before the repair" in judged(unseen(3, 20)).verdict.advice
