from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from lightning_nrl._utils.device import none_if_out_of_memory, twice_if_out_of_memory
from lightning_nrl.errors import DeviceMemoryError


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


def failing(times: int, error: Exception) -> Callable[[], int]:
    left = [times]

    def work() -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return 7

    return work


def test_work_is_tried_once_more_and_then_memory_is_the_reason() -> None:
    out = torch.OutOfMemoryError("CUDA out of memory.\nA long story.")
    assert twice_if_out_of_memory(failing(1, out), "it ran") == 7
    with pytest.raises(DeviceMemoryError, match=r"^memory ran out while it ran: CUDA out of memory\.\nHINT"):
        twice_if_out_of_memory(failing(2, out), "it ran")
    with pytest.raises(DeviceMemoryError):
        twice_if_out_of_memory(failing(1, out), "it ran", alone=False)
    with pytest.raises(RuntimeError, match="another"):
        twice_if_out_of_memory(failing(1, RuntimeError("another one")), "it ran")
