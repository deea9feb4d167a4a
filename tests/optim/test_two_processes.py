"""A fit, a polish and moves toward checkpoints in two processes of a real group, as in one."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from toy_problems import barely, broken, make_problem, normed, retrained, same, shares
from toy_repairs import known, trained
from two_processes import in_two_processes

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.methods import Apricot, Problem
from lightning_nrl.methods._solvers.distill import distill
from lightning_nrl.methods._solvers.polish import polish


def results(problem: Problem) -> dict[str, Any]:
    polished = polish(problem, barely(problem, retrained(problem.model)))
    moved = Apricot([retrained(problem.model, seed) for seed in range(2)], rate=0.005)(problem)
    assert moved.proposal is not None
    return {
        "fit": distill(problem),
        "polish": dict(polished.state),
        "counts": (polished.repaired, polished.broken, polished.rounds, polished.strength),
        "apricot": dict(moved.proposal.state),
        "moves": [(step.name, step.repaired, step.broken, step.note) for step in moved.steps],
    }


def work(folder: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    collective = Collective.current(torch.device("cpu"))
    problem = make_problem(trained(normed), shares(known(), rank, 2), collective=collective)
    torch.save(results(problem), f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two: Adam makes much of a difference in rounding where a weight has no effect
    try:
        return results(make_problem(trained(normed), known()))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("part", ["fit", "polish", "apricot"])
def test_both_ranks_have_the_weights_of_one_process(part: str, ranks: list[dict], alone: dict[str, Any]) -> None:
    first, second = (rank[part] for rank in ranks)
    assert same(first, second)
    assert first.keys() == alone[part].keys()
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    for name, value in alone[part].items():
        close(first[name], value)


def test_both_count_what_one_counts(ranks: list[dict], alone: dict[str, Any]) -> None:
    assert ranks[0]["counts"] == ranks[1]["counts"] == alone["counts"]
    assert alone["counts"][1] == 0 < alone["counts"][2]
    assert broken(make_problem(trained(normed), known()), ranks[0]["polish"]) == 0


def test_both_move_as_one_moves(ranks: list[dict], alone: dict[str, Any]) -> None:
    assert ranks[0]["moves"] == ranks[1]["moves"] == alone["moves"]
    ((name, repaired, n_broken, _),) = alone["moves"]
    assert (name, n_broken) == ("apricot", 0)
    assert repaired > 0
    assert broken(make_problem(trained(normed), known()), ranks[1]["apricot"]) == 0
    # How far a move goes is known from what all samples do, the same on every rank.
    assert same(ranks[0]["apricot"], alone["apricot"])
