"""Scoring against the whole real model, candidate by candidate."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scoring_networks import REPLAYED, WHOLE, Case, Problem, by_sample, floats, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.study.recount import exact_batches
from lightning_nrl.tasks import Multiclass

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)


def check(problem: Problem, tolerance: float, reason: str | None = None) -> None:
    """Same predictions on every candidate, same counts, losses within a tolerance."""
    recording = problem.recording(5, 6, 1)
    assert (recording.fallback_reason is None) == (reason is None)
    where, values = problem.candidates(7, 9)
    n = len(problem.target)
    failed = torch.arange(n) % 3 == 0
    scorer = problem.scorer(where, failed, ~failed, recording=recording)
    logits = problem.oracle(where, values).flatten(0, 1)
    target = problem.target.repeat(7)
    passed = Multiclass().passed(logits, target).view(7, n)
    loss = Multiclass().loss(logits, target).view(7, n).double()

    rows, found, losses = by_sample(scorer, values)
    order = rows.argsort()
    assert torch.equal(found[:, order], passed)
    torch.testing.assert_close(losses[:, order], loss, rtol=tolerance, atol=tolerance)
    scores = scorer(values)
    assert scores.patched.tolist() == passed[:, failed].sum(1).tolist()
    assert scores.intact.tolist() == passed[:, ~failed].sum(1).tolist()
    torch.testing.assert_close(
        scores.loss_failed.double(), loss[:, failed].mean(1), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        scores.loss_passed.double(), loss[:, ~failed].mean(1), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REPLAYED.values(), ids=REPLAYED)
def test_replayed_candidates_are_those_of_the_whole_model(case: Case, dtype: torch.dtype) -> None:
    check(make_problem(case, dtype=dtype), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "reason"), WHOLE.values(), ids=WHOLE)
def test_what_cannot_be_replayed_is_run_as_a_whole(
    case: Case, reason: str, dtype: torch.dtype
) -> None:
    with pytest.warns(UserWarning, match=reason):
        check(make_problem(case, dtype=dtype), DTYPES[dtype], reason)


@pytest.mark.parametrize(
    "name", ["head", "middle linear", "conv2d", "residual, first", "attention, batch first"]
)
def test_under_autocast_as_the_model_is_deployed(name: str) -> None:
    problem = make_problem(REPLAYED[name], n=40)
    recording = problem.recording(40, evaluator=Evaluator(problem.model, context=AUTOCAST))
    assert recording.fallback_reason is None
    where, values = problem.candidates(7, 9)
    everyone = torch.ones(40, dtype=torch.bool)
    _, passed, losses = by_sample(
        problem.scorer(where, everyone, ~everyone, recording=recording), values
    )
    with AUTOCAST():
        logits = problem.oracle(where, values).float()
    loss = F.cross_entropy(logits.flatten(0, 1), problem.target.repeat(7), reduction="none")
    torch.testing.assert_close(losses.float(), loss.view(7, 40), rtol=0.03, atol=0.03)
    top = logits.topk(2).values
    clear = top[..., 0] - top[..., 1] > 0.02
    assert torch.equal(passed[clear], (logits.argmax(2) == problem.target)[clear])
    assert clear.float().mean() > 0.8


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
    st.booleans(),
    st.data(),
)
def test_random_networks_have_the_same_predictions_and_losses(
    kinds: list[str], seed: int, k: int, dtype: torch.dtype, bias: bool, data: st.DataObject
) -> None:
    names = [*(f"convs.{i}" for i in range(len(kinds))), "middle", "head"]
    layers = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    n, p, classes = 9, 5, data.draw(st.sampled_from([1, 5]))
    problem = make_problem(
        Case(lambda: Stack(kinds, classes), floats(WIDTH, 5, 5), layers), n, dtype, seed, bias
    )
    problem = replace(problem, target=problem.target % max(2, classes))
    where, values = problem.candidates(p, k, seed)
    recording = problem.recording(4, 5)
    assert recording.fallback_reason is None
    mask = torch.arange(n) % 2 == 0
    rows, passed, losses = by_sample(
        problem.scorer(where, mask, ~mask, recording=recording), values
    )
    logits = problem.oracle(where, values, rows)
    if classes == 1:  # the logit of class 1 over a 0
        logits = F.pad(logits, (1, 0))
    loss = (
        F.cross_entropy(logits.flatten(0, 1), problem.target[rows].repeat(p), reduction="none")
        .view(p, n)
        .double()
    )
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses, loss, rtol=tolerance, atol=tolerance)
    top = logits.topk(2).values
    clear = (top[..., 0] - top[..., 1]) > 10 * tolerance
    right = logits.argmax(2) == problem.target[rows]
    assert torch.equal(passed[clear], right[clear])
    assert clear.float().mean() > 0.5  # else hardly a prediction was compared


class Odd(nn.Module):
    """Gives other last bits while somebody looks at its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x))
        return y * (1 + 1e-6 * len(self.head._forward_hooks))


PRECISE = ("head", "middle linear", "residual, both", "two inputs")
EXACT = {
    **{name: (case, torch.float32, False, None) for name, case in REPLAYED.items()},
    **{name: (case, torch.float32, False, None) for name, (case, _) in WHOLE.items()},
    **{f"{name}, double": (REPLAYED[name], torch.float64, False, True) for name in PRECISE},
    **{f"{name}, bfloat16": (REPLAYED[name], torch.bfloat16, False, None) for name in PRECISE},
    **{f"{name}, autocast": (REPLAYED[name], torch.float32, True, None) for name in PRECISE},
    "another rounding": (Case(Odd, floats(6), "head"), torch.float32, False, False),
}


@pytest.mark.parametrize(("case", "dtype", "autocast", "replayed"), EXACT.values(), ids=EXACT)
def test_batches_under_other_weights_are_those_of_the_deployed_model_bit_for_bit(
    case: Case, dtype: torch.dtype, autocast: bool, replayed: bool | None
) -> None:
    problem = make_problem(case, n=13, dtype=dtype, include_bias=True)
    context = partial(AUTOCAST, enabled=autocast)
    batches = problem.batches(5, 5, 3)
    where, values = problem.candidates(3, 7)
    found = exact_batches(Evaluator(problem.model, context=context), batches, problem.space)
    for (batch, rows), exact in zip(batches, found, strict=True):
        assert torch.equal(exact.chunk.rows, rows)
        assert torch.equal(exact.chunk.target, batch.target)
        assert replayed is None or exact.cache.is_replayable(exact.chunk) is replayed
        for v in values:
            parameters = problem.space.changed(where, v)
            with torch.no_grad(), context():
                output = torch.func.functional_call(
                    problem.model, parameters, batch.args, dict(batch.kwargs)
                )
            with torch.no_grad():
                assert torch.equal(exact.logits(parameters), Multiclass().logits(output))
