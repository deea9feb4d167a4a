"""The ladder and the price of the guarantee, as a reader has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.report import PricePoint, Rung
from lightning_nrl.report.ladder import choice_text, estimate_text, price_table, price_text, rungs_table

HELD_OUT = TargetCounts(kept=96, broken=4, repaired=12, failing=8, targeted=15, repaired_in_target=10)

HARM = TargetCounts(kept=70, broken=30, repaired=2, failing=18, targeted=15, repaired_in_target=2)

SEARCH = Rung("search", 5, 6, 0, 64, 1.25, HELD_OUT)
TRAINING = Rung("training", 20, 31, 2, 27_163, 30.0)


def test_a_column_for_each_rung_the_taken_one_marked() -> None:
    table = rungs_table((replace(SEARCH, taken=True), TRAINING))
    assert table.columns == (("search", "taken"), ("training", ""))
    assert {row.label: row.cells for row in table.rows} == {
        "targets repaired": ("5", "20"),
        "known samples repaired": ("6", "31"),
        "known samples broken": ("0", "2"),
        "held-out failures repaired": ("12 of 20", "-"),
        "held-out passed samples broken": ("4 of 100", "-"),
        "held-out accuracy, points": ("+6.7", "-"),
        "weights changed": ("64", "27,163"),
        "seconds": ("1.2", "30.0"),
    }


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (replace(TRAINING, held_out=HELD_OUT), "held-out samples speak against `training`"),
        (replace(TRAINING, repaired_in_target=4, held_out=HELD_OUT), "`training` repairs fewer targets"),
        (TRAINING, "`training` breaks more than the gate allows"),
        (replace(TRAINING, repaired_in_target=0), "`training` repairs no target"),
        (replace(TRAINING, repaired_in_target=0, held_out=HELD_OUT), "`training` repairs no target"),
        (replace(TRAINING, repaired_in_target=0, held_out=HARM), "held-out samples speak against `training`"),
    ],
)
def test_the_choice_says_what_is_against_the_rungs_that_change_more(last: Rung, why: str) -> None:
    assert choice_text((replace(SEARCH, taken=True), last), "") == f"`search` is taken: {why}."


def test_the_last_rung_is_taken_unless_something_is_against_it() -> None:
    last = replace(TRAINING, held_out=HELD_OUT, taken=True)
    assert choice_text((SEARCH, last), "").startswith("`training` is taken")


def test_without_estimates_the_choice_is_what_the_method_says() -> None:
    assert choice_text((TRAINING,), "none") == choice_text((replace(TRAINING, taken=True),), "none") == "none"


def test_the_price_is_a_row_for_each_level_that_buys_something_and_a_sentence() -> None:
    price = (PricePoint(0.0, 0, 5, 7), PricePoint(0.01, 9, 20, 28, HELD_OUT), PricePoint(1.0, 9, 20, 28, HELD_OUT))
    none, some = price_table(price).rows
    assert (none.label, none.cells) == ("none may break", ("5", "7", "0", "-", "-", "-"))
    assert (some.label, some.cells) == ("1.00 % may break", ("20", "28", "9", "12 of 20", "4 of 100", "+6.7"))
    assert price_text(price).startswith("15 targets: 20 instead of 5")
    assert price_text(price).endswith("if 9 known samples might break")
    assert price_text(price[:1]).startswith("nothing")
    assert price_text(price[1:]) == ""


def test_an_estimate_stands_beside_what_was_counted_on_unseen_data() -> None:
    repaired = "12 of 20 failures repaired (60%; 39% to 78% at 90 % confidence)"
    broken = "4 of 100 passed samples broken (4.0%; 1.4% to 8.9% at 90 % confidence)"
    expected = f"{repaired}, {broken}, +6.7 points"
    counted = (
        "; counted on unseen data: 3 of 4 failures repaired (75%), 1 of 6 passed samples broken (17%), +20.0 points"
    )
    assert estimate_text(HELD_OUT) == expected
    assert estimate_text(HELD_OUT, FlipCounts(kept=5, broken=1, repaired=3, failing=1)) == expected + counted
    assert estimate_text(None) == ""
