"""Quadratic programmes, the programme of a last Linear layer, and coordinates of deeper layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_problems import make_problem

import lightning_nrl.methods.solvers.convex_head as convex_head
from lightning_nrl import TensorSource
from lightning_nrl._utils.state import snapshot
from lightning_nrl.methods.solvers.convex_head import ConvexHead, regularization_path
from lightning_nrl.methods.solvers.qp import solve_dual
from lightning_nrl.methods.solvers.whitening import fit_whitening, margin_gradients
from lightning_nrl.tasks import Multiclass


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
    assert not solve_dual(
        rows @ rows.T, torch.tensor([1.0, 1.0]), torch.tensor([torch.inf, torch.inf])
    ).is_feasible


def test_a_batch_by_hand() -> None:
    # Rows x >= 1 and y >= 2: |v|^2 / 2 = 2.5. Rows x >= 1 and -x >= 0: none, so the value passes
    # any limit.
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


def head(seed: int = 0, n: int = 60, n_classes: int = 3) -> ConvexHead:
    """Random features; the last samples are wrong, and the last feature is theirs for the most
    part.
    """
    generator = torch.Generator().manual_seed(seed)
    targeted = torch.arange(n) >= n - 6
    features = torch.randn(n, 5, generator=generator)
    features[:, 4] = torch.where(targeted, 2.0, 0.1 * features[:, 4])
    logits = features[:, :4] @ torch.randn(4, n_classes, generator=generator)
    label = logits.argmax(1)
    label[targeted] = logits[targeted].topk(2).indices[:, 1]
    return ConvexHead(features, logits, label, targeted)


@pytest.mark.parametrize("seed", range(4))
def test_passed_samples_stay_right_and_a_high_price_repairs_more(seed: int) -> None:
    own, repaired = head(seed), []
    for change in regularization_path(own, (0.1, 1.0, 30.0)):
        now = own.right(change)
        assert now[~own.targeted].all()
        repaired.append(int(now[own.targeted].sum()))
    assert repaired[0] <= repaired[-1] > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", ["ROWS_PER_BLOCK", "LOGITS_PER_BLOCK"])
def test_many_samples_or_logits_are_looked_at_part_by_part_where_a_margin_may_be_too_small(
    most: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = head(seed, n=600)
    expected = list(regularization_path(own, (0.1, 1.0, 30.0)))
    monkeypatch.setattr(convex_head, most, 100)
    monkeypatch.setattr(convex_head, "ROWS_OF_MANY", 64)
    # The samples among others, in another order.
    mixed = torch.randperm(700, generator=torch.Generator().manual_seed(seed))[:600]
    features, logits = torch.full((700, 5), torch.nan), torch.full((700, 3), torch.nan)
    features[mixed], logits[mixed] = own.features, own.logits
    many = replace(own, features=features, logits=logits, rows=mixed)
    found, n_left = list(regularization_path(many, (0.1, 1.0, 30.0))), 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        reached = many.reached(one, torch.ones_like(own.targeted))
        assert reached is not None
        left = torch.ones_like(own.targeted)
        left[reached] = False
        n_left += int(left.sum())
        assert (_margins(own, one)[left] >= own.required[left]).all()
        assert torch.equal(many.right(one), _margins(own, one) > 0)
    assert 0 < n_left < 3 * 600


def _margins(own: ConvexHead, change: torch.Tensor) -> torch.Tensor:
    """The least margin of each sample under a change."""
    logits = own.logits + own.features @ change.T.float()
    true = logits.gather(1, own.label[:, None])
    return (true - logits.scatter(1, own.label[:, None], -torch.inf)).amin(1)


def test_where_time_is_over_passed_samples_still_stay_right() -> None:
    own, asked = head(), []

    def is_over() -> bool:
        asked.append(True)
        return len(asked) >= 30  # in a Newton step of some round

    (change,) = regularization_path(own, (30.0,), is_over=is_over)
    assert len(asked) >= 30
    assert change.any()
    assert own.right(change)[~own.targeted].all()


class Images(nn.Sequential):
    def __init__(self, groups: int = 1) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, groups=groups),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(24, 3),
        )


def images(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(
        0, 3, (n,), generator=generator
    )


@pytest.mark.parametrize(("layer", "groups"), [("3", 1), ("3", 2), (["0", "6"], 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide", [8, 2048])
def test_slopes_are_gradients_in_whitened_coordinates(
    layer: Any, groups: int, bias: bool, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise of a small change is what the margins do under the state that belongs to it."""
    monkeypatch.setattr("lightning_nrl.methods.solvers.whitening.MAX_FULL_MOMENT", wide)
    model = Images(groups).double().eval()
    x, y = images()
    problem = make_problem(
        model, [TensorSource(x.double(), y, "all", passed=True, failed=True)], layer, bias=bias
    )
    whitening = fit_whitening(problem, 10**6)
    assert whitening.size == problem.space.size
    assert whitening.layers[0].root.ndim == (3 if wide == 2048 else 2)
    change = 1e-6 * torch.randn(
        whitening.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    _, gradients = margin_gradients(problem, torch.arange(60), whitening, {})

    def margins(state: Any) -> Tensor:
        weights = {**snapshot(model), **state}
        return (
            Multiclass()
            .margin(torch.func.functional_call(model, weights, (x.double(),)), y)
            .detach()
        )

    real = margins(whitening.state(change)) - margins({})
    torch.testing.assert_close(gradients @ change, real, rtol=1e-3, atol=1e-10)
