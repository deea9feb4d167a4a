"""The ladder and the price of the guarantee, as a reader has them."""

from __future__ import annotations

from lightning_nrl.evaluation.flips import TargetCounts
from lightning_nrl.report import PricePoint, Rung
from lightning_nrl.report.ladder import estimate_text, price_table, price_text, rungs_table

HELD_OUT = TargetCounts(kept=96, broken=4, repaired=12, failing=8, targeted=15, repaired_in_target=10)


def test_a_row_for_each_rung_the_taken_one_marked() -> None:
    rungs = (Rung("search", 5, 6, 0, 64, 1.25), Rung("training", 20, 31, 0, 27_163, 30.0, HELD_OUT, taken=True))
    first, second = rungs_table(rungs).rows
    assert (first.label, first.cells) == ("search", ("5", "6", "0", "-", "-", "64", "1.2"))
    assert (second.label, second.cells) == ("training, taken", ("20", "31", "0", "12", "4", "27,163", "30.0"))


def test_the_price_is_a_row_for_each_level_and_a_sentence() -> None:
    price = (PricePoint(0.0, 0, 5, 7), PricePoint(0.01, 9, 20, 28, HELD_OUT), PricePoint(1.0, 71, 20, 28))
    labels = [row.label for row in price_table(price).rows]
    assert labels == ["none may break", "1.00 % may break", "any may break"]
    assert price_table(price).rows[1].cells == ("9", "20", "28", "12", "4")
    assert price_text(price) == "20 targets would be repaired instead of 5 if 9 known samples might break"
    assert price_text(price[:1]).startswith("nothing")
    assert price_text(price[1:]) == ""


def test_an_estimate_is_said_in_counts_and_points() -> None:
    expected = (
        "12 of 20 failures repaired, 4 of 100 passed samples broken, +6.7 points, of known samples that were held out"
    )
    assert estimate_text(HELD_OUT) == expected
    assert estimate_text(None) == ""
