"""Batches run under other weights: the very bits of the deployed model, whether or not anything is replayed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from scoring_networks import REPLAYED, WHOLE, Case, make_problem
from torch import Tensor, nn

from lightning_nrl.analysis.sweep.batch_search import exact_batches
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Multiclass

CASES = {**REPLAYED, **{name: case for name, (case, _) in WHOLE.items()}}


def check(case: Case, dtype: torch.dtype = torch.float32, autocast: bool = False) -> list[bool]:
    """Compares logits under changed weights with the whole model's, batch by batch; says which were replayed."""
    problem = make_problem(case, n=13, dtype=dtype, include_bias=True)
    context = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
    batches = problem.batches(5, 5, 3)
    where, values = problem.candidates(3, 7)
    replayed = []
    found = exact_batches(Evaluator(problem.model, context=context), batches, problem.space)
    for (batch, rows), exact in zip(batches, found, strict=True):
        assert torch.equal(exact.chunk.rows, rows)
        assert torch.equal(exact.chunk.target, batch.target)
        assert exact.nbytes > 0
        for v in values:
            parameters = problem.space.changed(where, v)
            with torch.no_grad(), context():
                output = torch.func.functional_call(problem.model, parameters, batch.args, dict(batch.kwargs))
            with torch.no_grad():
                assert torch.equal(exact.logits(parameters), Multiclass().logits(output))
        replayed.append(exact.cache.is_replayable(exact.chunk))
    return replayed


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_whole_model_bit_for_bit(name: str) -> None:
    assert not all(check(CASES[name])) or name in REPLAYED


@pytest.mark.parametrize("name", ["head", "middle linear", "residual, both", "two inputs"])
def test_in_every_precision(name: str) -> None:
    assert all(check(REPLAYED[name], torch.float64))
    check(REPLAYED[name], torch.bfloat16)
    check(REPLAYED[name], autocast=True)


class Odd(nn.Module):
    """Gives other last bits while somebody looks at its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x))
        return y * (1 + 1e-6 * len(self.head._forward_hooks))


def test_what_replays_to_another_rounding_is_run_as_a_whole() -> None:
    assert check(Case(Odd, REPLAYED["head"].data, "head")) == [False, False, False]
