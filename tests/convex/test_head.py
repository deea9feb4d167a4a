"""The programme of a last Linear layer, and the solver under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nrl._convex.head import ConvexHead, regularization_path


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
        now = own.changed(change).argmax(1) == own.label
        assert now[~own.targeted].all()
        repaired.append(int(now[own.targeted].sum()))
    assert repaired[0] <= repaired[-1] > 0


def test_where_time_is_over_passed_samples_still_stay_right() -> None:
    own, asked = head(), []

    def is_over() -> bool:
        asked.append(True)
        return len(asked) >= 30  # in a Newton step of some round

    (change,) = regularization_path(own, (30.0,), is_over=is_over)
    assert len(asked) >= 30
    assert change.any()
    assert (own.changed(change).argmax(1) == own.label)[~own.targeted].all()


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
