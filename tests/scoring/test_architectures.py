"""Random small networks: every candidate is what the whole real model says it is."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from scoring_networks import Case, by_sample, floats, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.search._scoring.scorer import make_scorer

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

WIDTH = 4
BLOCKS = (
    "conv",
    "grouped",
    "depthwise",
    "strided",
    "dilated",
    "residual",
    "in place",
    "joined",
    "norm",
    "gate",
    "pool",
)


class Stack(nn.Module):
    """Blocks of several kinds in a row, then pooling and a head."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds
        options = {
            "grouped": {"groups": 2},
            "depthwise": {"groups": WIDTH},
            "strided": {"stride": 2},
            "dilated": {"dilation": 2, "padding": 2},
        }
        self.convs = nn.ModuleList(
            nn.Conv2d(WIDTH, WIDTH, 3, **({"padding": 1} | options.get(kind, {}))) for kind in kinds
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in kinds)
        self.joins = nn.ModuleList(nn.Conv2d(2 * WIDTH, WIDTH, 1) for _ in kinds)
        self.act = nn.ReLU(inplace=True)
        self.middle, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for kind, conv, norm, join in zip(self.kinds, self.convs, self.norms, self.joins, strict=True):
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
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.integers(1, 40),
    st.sampled_from([torch.float64, torch.float32]),
    st.booleans(),
    st.data(),
)
def test_same_predictions_and_losses(
    kinds: list[str], seed: int, k: int, dtype: torch.dtype, bias: bool, data: st.DataObject
) -> None:
    names = [*(f"convs.{i}" for i in range(len(kinds))), "middle", "head"]
    layers = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    n, p = 9, 5
    problem = make_problem(Case(lambda: Stack(kinds), floats(WIDTH, 5, 5), layers), n, dtype, seed, bias)
    where, values = problem.candidates(p, k, seed)
    recording = problem.recording(4, 5)
    assert recording.fallback_reason is None
    mask = torch.arange(n) % 2 == 0
    rows, passed, losses = by_sample(make_scorer(recording, where, mask, ~mask, EVALUATOR), values)
    logits = problem.oracle(where, values, rows)
    target = problem.target[rows].repeat(p)
    loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="none").view(p, n).double()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses, loss, rtol=tolerance, atol=tolerance)
    top = logits.topk(2).values
    clear = (top[..., 0] - top[..., 1]) > 10 * tolerance
    right = logits.argmax(2) == problem.target[rows]
    assert torch.equal(passed[clear], right[clear])
    assert clear.float().mean() > 0.5  # else hardly a prediction was compared
