"""Quadratic programmes, the programme of a last Linear layer, and coordinates of deeper layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_nrl.methods.solvers.convex_head as convex_head
from lightning_nrl.methods.solvers.convex_head import ConvexHead, regularization_path
from lightning_nrl.methods.solvers.qp import solve_dual, solve_duals


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), m=st.integers(1, 12), hard=st.booleans())
def test_a_solution_fulfils_its_conditions(seed, m, hard):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 5, generator=generator).double()
    # Required of some x, so that hard rows do not contradict each other.
    x = torch.randn(5, generator=generator).double()
    required = rows @ x - torch.rand(m, generator=generator)
    limit = torch.rand(m, generator=generator).double()
    if hard:
        limit[::2] = torch.inf
    values = solve_dual(rows @ rows.T, required, limit, torch.zeros(m))
    slack = rows @ (rows.T @ values) - required
    tolerance = 1e-5 * max(1.0, float(required.abs().max()))
    assert ((values >= 0) & (values <= limit * (1 + 1e-12))).all()
    assert (slack[values < limit * (1 - 1e-9)] > -tolerance).all()
    assert (slack[values > 0] < tolerance).all()


def test_a_batch_by_hand():
    # Rows x >= 1 and y >= 2: |v|^2 / 2 = 2.5. Rows x >= 1 and -x >= 0 contradict each other, so the
    # value exceeds any limit.
    gram = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64)
    required = torch.tensor([[1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    values, value = solve_duals(gram, required, max_value=100.0)
    assert values[0].tolist() == pytest.approx([1, 2])
    assert value[0].item() == pytest.approx(2.5)
    assert value[1] > 100


def make_head(seed: int = 0, n: int = 60) -> ConvexHead:
    """Random features; the last samples are wrong, and the last feature is mostly theirs."""
    generator = torch.Generator().manual_seed(seed)
    targeted = torch.arange(n) >= n - 6
    features = torch.randn(n, 5, generator=generator)
    features[:, 4] = torch.where(targeted, 2.0, 0.1 * features[:, 4])
    logits = features[:, :4] @ torch.randn(4, 3, generator=generator)
    label = logits.argmax(1)
    label[targeted] = logits[targeted].topk(2).indices[:, 1]
    return ConvexHead(features, logits, torch.arange(n), label, targeted, torch.ones(n), False)


def path(
    head: ConvexHead, *strengths: float, is_over: Callable[[], bool] = lambda: False
) -> list[Tensor]:
    used = torch.ones_like(head.targeted)
    return list(regularization_path(head, strengths, used, is_over, math.inf))


@pytest.mark.parametrize("seed", range(4))
def test_passed_samples_stay_right_and_a_high_price_repairs_more(seed):
    head = make_head(seed)
    repaired = []
    for change in path(head, 0.1, 1.0, 30.0):
        right = head.right(change)
        assert right[~head.targeted].all()
        repaired.append(int(right[head.targeted].sum()))
    assert repaired[0] <= repaired[-1] > 0


@pytest.mark.parametrize("limit", ["ROWS_PER_BLOCK", "LOGITS_PER_BLOCK"])
def test_large_data_are_read_only_where_a_margin_may_be_too_small(limit, monkeypatch):
    head = make_head(n=600)
    expected = path(head, 0.1, 1.0, 30.0)
    right = [head.right(change) for change in expected]
    monkeypatch.setattr(convex_head, limit, 100)
    monkeypatch.setattr(convex_head, "ROWS_OF_MANY", 64)
    # The samples among others, in another order.
    rows = torch.randperm(700, generator=torch.Generator().manual_seed(0))[:600]
    features = torch.full((700, 5), torch.nan)
    logits = torch.full((700, 3), torch.nan)
    features[rows], logits[rows] = head.features, head.logits
    large = replace(head, features=features, logits=logits, rows=rows)
    n_read = 0
    for i, change in enumerate(path(large, 0.1, 1.0, 30.0)):
        torch.testing.assert_close(change, expected[i], rtol=1e-4, atol=1e-6)
        assert torch.equal(large.right(change), right[i])
        n_read += len(large.reached(change, torch.ones_like(head.targeted)))
    assert 0 < n_read < 3 * 600


@pytest.mark.parametrize("rank", [4, 60])
def test_the_root_of_few_samples_is_exact_if_they_are_all(rank, monkeypatch):
    head = make_head()
    wide = replace(head, features=torch.cat([head.features, torch.zeros(60, 60)], 1))
    expected = path(wide, 0.1, 1.0, 30.0)
    monkeypatch.setattr(convex_head, "MAX_MOMENT_RANK", rank)
    for i, change in enumerate(path(replace(wide), 0.1, 1.0, 30.0)):
        assert wide.right(change)[~wide.targeted].all()
        if rank == 60:
            torch.testing.assert_close(change, expected[i], rtol=1e-4, atol=1e-6)


def test_passed_samples_stay_right_when_time_runs_out():
    head = make_head()
    calls = itertools.count()
    (change,) = path(head, 30.0, is_over=lambda: next(calls) >= 30)  # in a Newton step
    assert next(calls) >= 30
    assert change.any()
    assert head.right(change)[~head.targeted].all()
