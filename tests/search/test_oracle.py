"""Scoring against the whole real model, candidate by candidate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scoring_networks import REPLAYED, WHOLE, Case, Problem, by_sample, floats, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.search.scoring.activation_cache import ActivationCache

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)


def check(
    problem: Problem,
    recording: ActivationCache,
    tolerance: float,
    *,
    k: int = 9,
    seed: int = 0,
    context: Callable[[], Any] = nullcontext,
    gap: float = -1.0,
) -> None:
    """Same losses up to a tolerance, and the same predictions where two logits differ by `gap`."""
    n = len(problem.target)
    where, values = problem.candidates(7, k, seed)
    failed = torch.arange(n) % 3 == 0
    scorer = problem.scorer(where, failed, ~failed, recording=recording)
    rows, passed, losses = by_sample(scorer, values)
    with context():
        logits = problem.oracle(where, values, rows).double()
    if logits.shape[2] == 1:  # the logit of class 1 over a 0
        logits = F.pad(logits, (1, 0))
    target = problem.target[rows].expand(7, n)
    expected = F.cross_entropy(logits.mT, target, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    top = logits.topk(2).values
    clear = top[..., 0] - top[..., 1] > gap
    assert torch.equal(passed[clear], (logits.argmax(2) == target)[clear])
    assert clear.float().mean() > 0.5  # else hardly a prediction was compared
    scores, is_failed = scorer(values), failed[rows]
    for role, count, loss in (
        (is_failed, scores.patched, scores.loss_failed),
        (~is_failed, scores.intact, scores.loss_passed),
    ):
        assert count.tolist() == passed[:, role].sum(1).tolist()
        torch.testing.assert_close(loss.double(), losses[:, role].mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*REPLAYED, *WHOLE])
def test_candidates_score_as_in_the_whole_model(name, dtype):
    case, reason = WHOLE[name] if name in WHOLE else (REPLAYED[name], None)
    problem = make_problem(case, dtype=dtype)
    with pytest.warns(UserWarning, match=reason) if reason else nullcontext():
        recording = problem.recording(5, 6, 1)
    assert (recording.fallback_reason is None) == (reason is None)
    check(problem, recording, DTYPES[dtype])


@pytest.mark.parametrize(
    "name", ["head", "middle linear", "conv2d", "residual, first", "attention, batch first"]
)
def test_under_autocast_as_the_model_is_deployed(name):
    problem = make_problem(REPLAYED[name], n=40)
    recording = problem.recording(40, evaluator=Evaluator(problem.model, context=AUTOCAST))
    assert recording.fallback_reason is None
    check(problem, recording, 0.03, context=AUTOCAST, gap=0.02)


WIDTH = 4
BLOCKS = {
    "plain": {},
    "grouped": {"groups": 2},
    "depthwise": {"groups": WIDTH},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2, "padding": 2},
    **{kind: {} for kind in ("residual", "in place", "joined", "norm", "gate", "pool")},
}


class Stack(nn.Module):
    """Blocks of several kinds in a row, then pooling and a head."""

    def __init__(self, kinds: list[str], classes: int = 5) -> None:
        super().__init__()
        self.kinds = kinds
        self.convs = nn.ModuleList(
            nn.Conv2d(WIDTH, WIDTH, 3, **{"padding": 1} | BLOCKS[kind]) for kind in kinds
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in kinds)
        self.joins = nn.ModuleList(nn.Conv2d(2 * WIDTH, WIDTH, 1) for _ in kinds)
        self.act = nn.ReLU(inplace=True)
        self.middle, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        for kind, conv, norm, join in zip(
            self.kinds, self.convs, self.norms, self.joins, strict=True
        ):
            h = conv(x)
            if kind == "residual":
                x = F.relu(norm(h) + x)
            elif kind == "in place":
                h = self.act(norm(h))
                h += x
                x = h
            elif kind == "joined":
                x = torch.tanh(join(torch.cat([x, F.gelu(h)], 1)))
            elif kind == "norm":
                x = F.layer_norm(h, h.shape[1:])
            elif kind == "gate":
                x = x * torch.sigmoid(h.mean((2, 3), keepdim=True))
            elif kind == "pool":
                x = F.max_pool2d(h, 2, stride=1, padding=1)
            else:
                x = F.silu(norm(h))
        return self.head(torch.relu(self.middle(x.flatten(2).mean(2))))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.integers(1, 40),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from([1, 5]),
    st.data(),
)
def test_random_networks_have_the_same_predictions_and_losses(kinds, seed, k, dtype, classes, data):
    names = [*(f"convs.{i}" for i in range(len(kinds))), "middle", "head"]
    layers = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    case = Case(lambda: Stack(kinds, classes), floats(WIDTH, 5, 5), layers)
    problem = make_problem(case, 9, dtype, seed, include_bias=seed % 2 == 0)
    problem = replace(problem, target=problem.target % max(2, classes))
    recording = problem.recording(4, 5)
    assert recording.fallback_reason is None
    check(problem, recording, 1e-5, k=k, seed=seed, gap=1e-4)
