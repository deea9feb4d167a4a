"""The two solvers of quadratic programmes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nrl.methods._solvers.qp import solve_dual


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), m=st.integers(1, 12), hard=st.booleans())
def test_a_solution_fulfils_its_conditions(seed: int, m: int, hard: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 5, generator=generator).double()
    # Asked of some x, so that hard rows do not contradict each other.
    asked = rows @ torch.randn(5, generator=generator).double() - torch.rand(m, generator=generator)
    limit = torch.rand(m, generator=generator).double()
    if hard:
        limit[::2] = torch.inf
    found = solve_dual(rows @ rows.T, asked, limit)
    slack = rows @ (rows.T @ found.values) - asked
    assert found.is_feasible
    assert found.is_solved
    tolerance = 1e-5 * max(1.0, float(asked.abs().max()))
    lacking = torch.where(limit.isinf(), 0.0, limit) @ (-slack).clamp_min(0)
    minimum = 0.5 * float((rows.T @ found.values).square().sum()) + float(lacking)
    assert float(found.value) == pytest.approx(minimum, abs=10 * tolerance)
    assert ((found.values >= 0) & (found.values <= limit * (1 + 1e-12))).all()
    assert (slack[found.values < limit * (1 - 1e-9)] > -tolerance).all()
    assert (slack[found.values > 0] < tolerance).all()


def test_hard_rows_that_contradict_each_other_are_told() -> None:
    rows = torch.tensor([[1.0], [-1.0]])
    assert not solve_dual(rows @ rows.T, torch.tensor([1.0, 1.0]), torch.tensor([torch.inf, torch.inf])).is_feasible


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_when_time_is_over_the_best_so_far_is_given(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=generator).double()
    asked, limit = torch.rand(40, generator=generator).double() + 0.5, torch.full((40,), 2.0).double()
    left = iter(range(steps))
    found = solve_dual(rows @ rows.T, asked, limit, is_over=lambda: next(left, None) is None)
    whole = solve_dual(rows @ rows.T, asked, limit)
    assert not found.is_solved
    assert whole.is_solved
    assert found.is_feasible
    assert ((found.values >= 0) & (found.values <= limit)).all()
    assert 0 <= float(found.value) < float(whole.value) or float(found.value) == pytest.approx(float(whole.value))


def test_an_empty_programme_is_solved() -> None:
    nothing = torch.zeros(0)
    assert solve_dual(torch.zeros(0, 0), nothing, nothing).is_solved


def test_a_batch_by_hand() -> None:
    # Rows x >= 1 and y >= 2: |v|^2 / 2 = 2.5. Rows x >= 1 and -x >= 0: none, so the value passes any limit.
    gram = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64)
    bound = torch.tensor([[1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    found = solve_dual(gram, bound, max_value=100.0)
    assert found.values[0].tolist() == pytest.approx([1, 2])
    assert found.value[0].item() == pytest.approx(2.5)
    assert found.value[1] > 100
    assert found.is_feasible.tolist() == [True, False]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), m=st.integers(1, 8))
def test_both_solvers_agree(seed: int, m: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, m, 10, generator=generator).double()
    required = torch.randn(3, m, generator=generator).double()
    batch = solve_dual(rows @ rows.mT, required)
    for own, asked, values, value in zip(rows, required, batch.values, batch.value, strict=True):
        alone = solve_dual(own @ own.T, asked)
        torch.testing.assert_close(own.T @ values, own.T @ alone.values, atol=1e-4, rtol=1e-4)
        assert float(value) == pytest.approx(float(alone.value), rel=1e-4, abs=1e-6)


def test_a_batch_without_rows_is_solved() -> None:
    found = solve_dual(torch.zeros(2, 0, 0), torch.zeros(2, 0))
    assert (found.value.tolist(), found.is_solved.tolist()) == ([0.0, 0.0], [True, True])
