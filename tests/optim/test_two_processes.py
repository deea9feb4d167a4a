"""A fit, a polish and moves toward checkpoints in two processes of a real group, as in one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

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


def test_both_ranks_have_the_weights_and_counts_of_one_process(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two: Adam makes much of a difference in rounding where a weight has no effect
    try:
        problem = make_problem(trained(normed), known())
        alone = results(problem)
    finally:
        torch.set_num_threads(threads)
    for part in ("fit", "polish", "apricot"):
        assert same(first[part], second[part])
        for name, value in alone[part].items():
            torch.testing.assert_close(first[part][name], value, rtol=1e-3, atol=1e-4)
    # How far a move goes is known from what all samples do, the same on every rank.
    assert same(first["apricot"], alone["apricot"])
    assert first["counts"] == second["counts"] == alone["counts"]
    assert first["moves"] == second["moves"] == alone["moves"]
    assert alone["counts"][1] == 0 < alone["counts"][2]
    assert broken(problem, first["polish"]) == broken(problem, second["apricot"]) == 0
