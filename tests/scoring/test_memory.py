"""What a piece of work takes, and what happens where it does not fit."""

from __future__ import annotations

import weakref

import pytest
import torch

from lightning_nrl._scoring.memory import measure_allocations, none_if_out_of_memory

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


class Large:
    """What did not fit."""


def test_what_did_not_fit_is_let_go_before_memory_is_given_back() -> None:
    made: list[weakref.ref[Large]] = []
    dead: list[bool] = []

    def work() -> int:
        large = Large()
        made.append(weakref.ref(large))
        raise torch.OutOfMemoryError("out of memory")

    assert none_if_out_of_memory(work, free_cache=lambda: dead.append(made[0]() is None)) is None
    assert dead == [True]


def test_work_that_fits_is_done_once_and_nothing_is_given_back() -> None:
    freed: list[bool] = []
    assert none_if_out_of_memory(lambda: 3, free_cache=lambda: freed.append(True)) == 3
    assert freed == []


@pytest.mark.parametrize(
    ("error", "last_try"),
    [(RuntimeError("another one"), False), (torch.OutOfMemoryError("out of memory"), True)],
    ids=["another error", "last try"],
)
def test_other_errors_and_those_of_the_last_try_are_raised(error: Exception, last_try: bool) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        none_if_out_of_memory(work, last_try=last_try)
