"""What a piece of work takes, and what happens where it does not fit."""

from __future__ import annotations

import pytest
import torch

from lightning_nrl._scoring.memory import measure_allocations

KIB = 256  # float32 numbers


def test_the_peak_is_what_was_held_at_once_and_the_total_what_was_ever_made() -> None:
    def work() -> None:
        first = torch.zeros(2 * KIB)
        del first
        held = torch.zeros(KIB), torch.zeros(3 * KIB)
        assert len(held) == 2

    assert measure_allocations(work) == (4096, 6144)


@pytest.mark.parametrize("size", [1_000, 1_000_000])
def test_a_view_of_what_was_there_before_takes_nothing_however_large_that_is(size: int) -> None:
    data = torch.zeros(size)
    assert measure_allocations(lambda: data[:KIB].view(2, -1).t() + 1) == (1024, 1024)


def test_a_view_keeps_what_was_made_inside_alive() -> None:
    def work() -> None:
        view = torch.zeros(KIB)[:1]
        assert len(view) == 1
        torch.zeros(KIB)

    assert measure_allocations(work) == (2048, 2048)
