"""Cutting planes (Kelley 1960): of very many rows few ever bind, so only those that a solution violates are added.

The rows here are margins of a linear layer: a pair of a sample and a rival class, over which the label's logit must
lie by some margin. With features h, label y and rival c, a change D of the weights moves that margin by (D_y - D_c) h.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def add_cutting_planes(
    solve: Callable[[], None],
    add_violated: Callable[[], bool],
    max_rounds: int,
    is_over: Callable[[], bool] = lambda: False,
) -> bool:
    """Solves and adds violated rows in turns; True if none is violated at the end.

    `add_violated` adds the rows that the solution violates most (the separation oracle), and says if there were any.
    """
    for _ in range(max_rounds):
        solve()
        if not add_violated():
            return True
        if is_over():
            break
    return False


def margins_over_rivals(logits: Tensor, label: Tensor) -> Tensor:
    """The label's logit above each other one, `n x C`; infinite at the label itself."""
    own = label[:, None]
    return (logits.gather(1, own) - logits).scatter(1, own, float("inf"))


def pair_sides(label: Tensor, rival: Tensor, like: Tensor) -> Tensor:
    """1 at the label and -1 at the rival of each pair, `... x C`, in the dtype of `like`, which has C classes last.

    GPUs multiply no matrices of whole numbers.
    """
    n_classes = like.shape[-1]
    return (F.one_hot(label, n_classes) - F.one_hot(rival, n_classes)).to(like.dtype)


def pair_gram(features: Tensor, sides: Tensor) -> Tensor:
    """Inner products of pairs as rows in the layer's weights, `... m x m`, from `... m x d` and `... m x C`."""
    return (sides @ sides.mT) * (features @ features.mT)


def sum_of_pairs(features: Tensor, sides: Tensor, multipliers: Tensor) -> Tensor:
    """The change of the weights that is the sum of pairs by their multipliers, `... C x d`; the same in every run."""
    return (sides * multipliers[..., None]).mT @ features
