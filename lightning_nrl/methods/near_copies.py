"""Tells if held-out samples look like copies of used samples, such as frames of one video."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrl._utils.preserve import shuffled
from lightning_nrl.evaluation.head_features import HeadRecord, head_features
from lightning_nrl.evaluation.layers import last_linear
from lightning_nrl.methods import Problem
from lightning_nrl.methods.held_out import draw_held_out_rows

MAX_COMPARED, FEWEST_COMPARED = 200, 20  # held-out samples that are compared
MAX_CANDIDATES = 10_000  # used samples from which they are compared with one, to limit memory
# Largest median ratio of distances that tells of copies. Measured: 0.3 to 0.6 with windows of a
# signal that overlap by 75 % or more, 0.2 with frames of videos, 0.9 to 4 with independent images
# and tables, shuffled or sorted by class.
COPY_DISTANCE = 0.7


@torch.no_grad()
def has_near_copies(problem: Problem, record: HeadRecord | None) -> bool:
    """True if held-out samples look like copies of used samples beside them in the data set.

    Divides the distance of a held-out and a used sample in successive positions by the distance to
    a random used sample of the same class, both between head features. These are recorded unless
    `record` has them. False if groups are given or too few samples are held out.
    """
    evaluator, before = problem.evaluator, problem.before
    if before.group is not None:
        return False
    held_out = draw_held_out_rows(problem)
    if held_out is None:
        return False
    used = problem.came_with_failures & problem.without(held_out).used
    is_pair = (before.index.diff() == 1) & (held_out[1:] & used[:-1] | used[1:] & held_out[:-1])
    first = _draw(is_pair, MAX_COMPARED)
    candidates = _draw(used, MAX_CANDIDATES)
    is_like = before.label[first, None] == before.label[candidates]
    random = torch.rand(is_like.shape, generator=torch.Generator().manual_seed(0))
    like = candidates[(is_like * random).argmax(1)]
    rows = torch.stack([first, first + 1, like], 1)[is_like.any(1)]
    if len(rows) < FEWEST_COMPARED:
        return False
    _, head = last_linear(evaluator.model, evaluator.called)
    features = head_features(evaluator, problem.known, head, before, rows, record)
    if features is None:
        return False
    x = features.inputs[torch.searchsorted(features.rows, rows)].flatten(2)
    near, far = (x[:, :1] - x[:, 1:]).norm(dim=2).T
    return bool((near < COPY_DISTANCE * far).float().mean() > 0.5)


def _draw(mask: Tensor, most: int) -> Tensor:
    rows = mask.nonzero()[:, 0]
    return shuffled(rows, torch.Generator().manual_seed(0))[:most]
