"""Scoring against the whole real model, candidate by candidate."""

from __future__ import annotations

import pytest
import torch
from scoring_networks import REPLAYED, WHOLE, Case, Problem, by_sample, make_problem
from torch import nn

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.search._scoring.activation_cache import ActivationCache
from lightning_nrl.search._scoring.scorer import make_scorer
from lightning_nrl.tasks import Multiclass

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check(
    problem: Problem, recording: ActivationCache, tolerance: float, p: int = 7, k: int = 9, seed: int = 0
) -> None:
    """Same predictions on every candidate, same counts, losses within a tolerance."""
    where, values = problem.candidates(p, k, seed)
    n = len(problem.target)
    failed = torch.arange(n) % 3 == 0
    scorer = make_scorer(recording, where, failed, ~failed, EVALUATOR)
    logits = problem.oracle(where, values).flatten(0, 1)
    target = problem.target.repeat(p)
    passed = Multiclass().passed(logits, target).view(p, n)
    loss = Multiclass().loss(logits, target).view(p, n).double()

    rows, found, losses = by_sample(scorer, values)
    order = rows.argsort()
    assert torch.equal(found[:, order], passed)
    torch.testing.assert_close(losses[:, order], loss, rtol=tolerance, atol=tolerance)
    scores = scorer(values.unsqueeze(0))
    assert scores.patched.tolist() == [passed[:, failed].sum(1).tolist()]
    assert scores.intact.tolist() == [passed[:, ~failed].sum(1).tolist()]
    torch.testing.assert_close(scores.loss_failed[0].double(), loss[:, failed].mean(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scores.loss_passed[0].double(), loss[:, ~failed].mean(1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REPLAYED.values(), ids=REPLAYED)
def test_replayed_candidates_are_those_of_the_whole_model(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype=dtype)
    recording = problem.recording(5, 6, 1)
    assert recording.fallback_reason is None
    check(problem, recording, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "reason"), WHOLE.values(), ids=WHOLE)
def test_what_cannot_be_replayed_is_run_as_a_whole(case: Case, reason: str, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype=dtype)
    with pytest.warns(UserWarning, match=reason):
        recording = problem.recording(5, 6, 1)
    assert recording.fallback_reason is not None
    check(problem, recording, DTYPES[dtype])


@pytest.mark.parametrize("name", ["head", "middle linear", "conv2d", "residual, first", "attention, batch first"])
def test_under_autocast_as_the_model_is_deployed(name: str) -> None:
    problem = make_problem(REPLAYED[name], n=40)

    def context() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    recording = problem.recording(40, context=context)
    assert recording.fallback_reason is None
    where, values = problem.candidates(7, 9)
    everyone = torch.ones(40, dtype=torch.bool)
    _, passed, losses = by_sample(make_scorer(recording, where, everyone, ~everyone, EVALUATOR), values)
    with context():
        logits = problem.oracle(where, values).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), problem.target.repeat(7), reduction="none")
    torch.testing.assert_close(losses.float(), loss.view(7, 40), rtol=0.03, atol=0.03)
    top = logits.topk(2).values
    clear = top[..., 0] - top[..., 1] > 0.02
    assert torch.equal(passed[clear], (logits.argmax(2) == problem.target)[clear])
    assert clear.float().mean() > 0.8
