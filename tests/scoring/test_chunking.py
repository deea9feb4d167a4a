"""How samples are cut: what a block may take does not depend on how many there are, and too little memory is no end."""

from __future__ import annotations

import pytest
import torch
from scoring_networks import REPLAYED, make_problem

from lightning_nrl.search._scoring.chunk_scorer import ChunkScorer, make_chunk_scorers
from lightning_nrl.search._scoring.sparse_delta import make_layer_deltas
from lightning_nrl.tasks import Multiclass


def cut(
    name: str, n: int, *, budget: int = 1 << 20, room: int = 0, weight: torch.Tensor | None = None
) -> list[ChunkScorer]:
    problem = make_problem(REPLAYED[name], n=n)
    where, _ = problem.candidates(1, 6)
    cache = problem.recording(n)
    everyone = torch.ones(n, dtype=torch.bool)
    deltas = make_layer_deltas(problem.space, where)
    return make_chunk_scorers(cache, deltas, where, everyone, Multiclass(), budget=budget, room=room, weight=weight)


@pytest.mark.parametrize("name", ["conv2d", "middle linear", "residual, second"])
def test_blocks_do_not_shrink_as_data_grow(name: str) -> None:
    few, many = (cut(name, n, budget=50_000) for n in (12, 1200))
    assert few[0].rows == many[0].rows > 1


def test_chunks_hold_all_samples_in_order() -> None:
    parts = cut("middle linear", 300, budget=50_000)
    assert len(parts) > 1
    assert torch.cat([part.chunk.rows for part in parts]).tolist() == list(range(300))


@pytest.mark.parametrize("name", ["head", "middle linear"])
def test_where_memory_runs_out_chunks_are_halved_and_nothing_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ChunkScorer.keep

    def tight(self: ChunkScorer, room: int) -> None:
        if len(self.chunk) > 2:
            raise torch.OutOfMemoryError("out of memory")
        keep(self, room)

    monkeypatch.setattr(ChunkScorer, "keep", tight)
    parts = cut(name, 12, room=1 << 20)
    assert torch.cat([part.chunk.rows for part in parts]).tolist() == list(range(12))
    assert {part.nbytes for part in parts} == {0}
    assert len(parts[0].chunk) == 6
