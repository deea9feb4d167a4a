"""The programme of a last Linear layer, and the solver under it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_nrl.methods._solvers.convex_head as convex_head
from lightning_nrl.methods._solvers.convex_head import ConvexHead, regularization_path


def head(seed: int = 0, n: int = 60, n_classes: int = 3) -> ConvexHead:
    """Random features; the last samples are wrong, and the last feature is theirs for the most part."""
    generator = torch.Generator().manual_seed(seed)
    targeted = torch.arange(n) >= n - 6
    features = torch.randn(n, 5, generator=generator)
    features[:, 4] = torch.where(targeted, 2.0, 0.1 * features[:, 4])
    logits = features[:, :4] @ torch.randn(4, n_classes, generator=generator)
    label = logits.argmax(1)
    label[targeted] = logits[targeted].topk(2).indices[:, 1]
    return ConvexHead(features, logits, label, targeted)


class Products(TorchDispatchMode):
    """Writes down the dtypes of all that is multiplied as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.mv):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def test_all_matrices_are_of_numbers_that_a_gpu_multiplies() -> None:
    with Products() as products:
        changes = list(regularization_path(head(), (0.5, 8.0)))
    assert any(change.any() for change in changes)
    assert products.dtypes <= {torch.float32, torch.float64}


@pytest.mark.parametrize("seed", range(4))
def test_passed_samples_stay_right_and_a_high_price_repairs_more(seed: int) -> None:
    own, repaired = head(seed), []
    for change in regularization_path(own, (0.1, 1.0, 30.0)):
        now = own.right(change)
        assert now[~own.targeted].all()
        repaired.append(int(now[own.targeted].sum()))
    assert repaired[0] <= repaired[-1] > 0


@pytest.mark.parametrize("seed", range(4))
def test_many_samples_are_looked_at_part_by_part_where_a_margin_may_be_too_small(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = head(seed, n=600)
    expected = list(regularization_path(own, (0.1, 1.0, 30.0)))
    monkeypatch.setattr(convex_head, "ROWS_PER_BLOCK", 100)
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


def test_a_column_of_ones_is_put_beside_the_features_where_they_are_used() -> None:
    own = head()
    beside, within = replace(own, ones=True), replace(own, features=F.pad(own.features, (0, 1), value=1.0))
    for one, other in zip(*(regularization_path(each, (0.5, 8.0)) for each in (beside, within)), strict=True):
        assert one.shape == (3, 6)
        assert torch.equal(one, other)


def test_where_time_is_over_passed_samples_still_stay_right() -> None:
    own, asked = head(), []

    def is_over() -> bool:
        asked.append(True)
        return len(asked) >= 30  # in a Newton step of some round

    (change,) = regularization_path(own, (30.0,), is_over=is_over)
    assert len(asked) >= 30
    assert change.any()
    assert own.right(change)[~own.targeted].all()


def test_without_a_target_that_counts_nothing_changes() -> None:
    own = head()
    assert not any(change.any() for change in regularization_path(own, (1.0, 4.0), ~own.targeted))


def test_passed_features_have_a_second_moment_of_one_when_whitened() -> None:
    own = head()
    white = own.white(~own.targeted)
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(5).double(), atol=0.05, rtol=0)


def test_only_the_rows_asked_for_are_whitened() -> None:
    own, rows = head(), torch.tensor([7, 3])
    torch.testing.assert_close(own.white(rows), own.features[rows].double() @ own.root)


def test_a_price_may_be_beyond_single_precision() -> None:
    """Targets whose features are tiny beside those of passed samples cost that much."""
    own = head()
    tiny = replace(own, features=torch.where(own.targeted[:, None], 1e-22 * own.features, own.features))
    missing, white = (tiny.required - tiny.narrowest)[tiny.targeted], tiny.white(tiny.targeted)
    assert 30.0 * float((missing / (2 * white.square().sum(1))).median()) > torch.finfo(torch.float32).max
    (change,) = regularization_path(tiny, (30.0,))
    assert change.isfinite().all()
    assert tiny.right(change)[~own.targeted].all()
