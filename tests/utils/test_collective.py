from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor
from two_processes import in_two_processes

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.errors import EvaluationError, OtherRankError, ReplayError

CPU = torch.device("cpu")


def work(folder: str) -> None:
    """What each of two ranks does; what it got is written to a file for the tests to look at."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    collective = Collective.current(CPU)
    values = torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([10.0, 20.0])
    kept = values.clone()
    got = {
        "who": [collective.rank, collective.world_size],
        "sum": collective.sum(values),
        "untouched": torch.equal(values, kept),
        "sum_int": collective.sum(torch.tensor([rank + 1])),
        "sum_bool": collective.sum(torch.tensor([True, rank == 1])),
        "sum_bfloat16": collective.sum(torch.tensor([1.5], dtype=torch.bfloat16)),
        "sum_scalar": collective.sum(torch.tensor(float(rank))),
        "ragged": collective.gather(torch.arange(3) if rank == 0 else torch.arange(10, 15)),
        "empty": collective.gather(torch.zeros(0, dtype=torch.int64) if rank == 0 else torch.tensor([7, 8])),
        "both_empty": collective.gather(torch.zeros(0)),
        "bool": collective.gather(torch.tensor([True, False]) if rank == 0 else torch.tensor([True])),
        "bfloat16": collective.gather(torch.tensor([0.5 + rank], dtype=torch.bfloat16)),
        "table": collective.gather(torch.arange(6.0).view(2, 3).T + 100 * rank),
        "mixed": collective.gather(torch.zeros(0) if rank == 0 else torch.tensor([0.1], dtype=torch.float64)),
        "any": [collective.any(False), collective.any(rank == 1), collective.any(True)],
        "mps": str(Collective.current(torch.device("mps")).device),
        "cuda": str(Collective.current(torch.device("cuda", rank)).device),
    }
    torch.save(got, f"{folder}/{rank}.pt")
    if rank == 1:
        os._exit(3)  # as a rank that is killed
    began = time.monotonic()
    try:
        collective.sum(values)
    except OtherRankError as error:
        torch.save([str(error), time.monotonic() - began], f"{folder}/alone.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collective")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    with pytest.raises(RuntimeError, match=re.escape("[0, 3]")):
        in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


def test_current_knows_the_process_group(ranks: list[dict]) -> None:
    assert [got["who"] for got in ranks] == [[0, 2], [1, 2]]


@pytest.mark.parametrize("device", ["mps", "cuda"])
def test_gloo_exchanges_on_the_cpu(ranks: list[dict], device: str) -> None:
    assert [got[device] for got in ranks] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sum", torch.tensor([11.0, 22.0])),
        ("sum_int", torch.tensor([3])),
        ("sum_bool", torch.tensor([2, 1])),
        ("sum_bfloat16", torch.tensor([3.0], dtype=torch.bfloat16)),
        ("sum_scalar", torch.tensor(1.0)),
    ],
)
def test_sum_is_the_same_on_every_rank(ranks: list[dict], name: str, expected: Tensor) -> None:
    for got in ranks:
        assert same([got[name]], [expected])


def test_sum_leaves_its_argument_alone(ranks: list[dict]) -> None:
    assert [got["untouched"] for got in ranks] == [True, True]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ragged", [torch.tensor([0, 1, 2]), torch.tensor([10, 11, 12, 13, 14])]),
        ("empty", [torch.zeros(0, dtype=torch.int64), torch.tensor([7, 8])]),
        ("both_empty", [torch.zeros(0), torch.zeros(0)]),
        ("bool", [torch.tensor([True, False]), torch.tensor([True])]),
        ("bfloat16", [torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor([1.5], dtype=torch.bfloat16)]),
        (
            "table",
            [
                torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]),
                torch.tensor([[100.0, 103.0], [101.0, 104.0], [102.0, 105.0]]),
            ],
        ),
        ("mixed", [torch.zeros(0), torch.tensor([0.1], dtype=torch.float64)]),
    ],
)
def test_gather_gives_every_rank_all_rows(ranks: list[dict], name: str, expected: list[Tensor]) -> None:
    for got in ranks:
        assert same(got[name], expected)


def test_any_asks_all_ranks(ranks: list[dict]) -> None:
    assert [got["any"] for got in ranks] == [[False, True, True], [False, True, True]]


@pytest.mark.usefixtures("ranks")
def test_where_a_rank_has_died_the_others_end_with_a_message(folder: Path) -> None:
    message, seconds = torch.load(folder / "alone.pt")
    assert message.startswith("another rank has ended or does not answer: ")
    assert "HINT: look at that rank's own error" in message
    assert seconds < 30


def test_one_process_exchanges_nothing() -> None:
    alone = Collective.current(CPU)
    x = torch.tensor([1.0, 2.0])
    assert alone == Collective()
    assert alone.sum(x) is x
    assert alone.gather(x)[0] is x
    assert [alone.any(True), alone.any(False)] == [True, False]


def test_one_process_counts_bools_too() -> None:
    counts = Collective().sum(torch.tensor([True, False]))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [1, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_process_leaves_tensors_on_their_device() -> None:
    alone = Collective.current(torch.device("cuda", 0))
    assert alone.sum(torch.ones(2, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({}, ["done", "done", "done"]),
        ({1: ReplayError("no\nway")}, ["ReplayError: no\nway"] * 3),
        ({1: ReplayError("b"), 2: EvaluationError("c")}, ["ReplayError: b"] * 3),
        ({1: OSError("b")}, ["OtherRankError", "OSError: b", "OtherRankError"]),
        ({1: OSError("b"), 2: ReplayError("c")}, ["OtherRankError", "OSError: b", "OtherRankError"]),
    ],
)
def test_where_one_rank_fails_all_fail_in_one_way(errors: dict[int, Exception], expected: list[str]) -> None:
    def outcome(collective: Collective) -> str:
        def task() -> str:
            if collective.rank in errors:
                raise errors[collective.rank]
            return "done"

        try:
            return collective.all_or_none(task, "it failed elsewhere.")
        except OtherRankError:
            return "OtherRankError"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    assert on_ranks(3, outcome) == expected


def test_the_first_rank_that_has_a_text_says_it_to_all() -> None:
    assert on_ranks(3, lambda ranks: ranks.first_text(["", "é", "no"][ranks.rank])) == ["é"] * 3
    assert Collective().first_text("") == ""
