"""What a last layer can do for one target at a time, as another solver finds it."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_nrl.analysis.diagnosis.fixability import (
    FEATURE_RIDGE,
    FULFILLED_FRACTION,
    REQUIRED_MARGIN,
    LayerSamples,
    find_fixability,
)
from lightning_nrl.methods.solvers.qp import solve_dual


@st.composite
def problems(draw: st.DrawFn) -> tuple[LayerSamples, LayerSamples]:
    """Random features; labels are what a random layer says, other ones for the targets."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    classes, width = draw(st.integers(2, 4)), draw(st.integers(2, 6))
    x = torch.randn(draw(st.integers(5, 40)) + 4, width, generator=generator)
    logits = x @ torch.randn(width, classes, generator=generator)
    label = logits.argmax(1)
    label[:4] = (label[:4] + 1) % classes
    whole = LayerSamples(x, logits, label)
    return whole.at(torch.arange(4, len(x))), whole.at(torch.arange(4))


def smallest(passed: LayerSamples, target: LayerSamples, root: Tensor, share: float = 1.0) -> float:
    """The smallest change under all rows at once, each of which is to give this share of what is
    asked of it.
    """
    rows, missing = [], []
    for features, logits, label in (passed, target):
        for h, z, y in zip(features @ root, logits, label.tolist(), strict=True):
            for rival in {*range(len(z))} - {y}:
                row = torch.zeros(len(z), len(h), dtype=torch.float64)
                row[y], row[rival] = h, -h
                rows.append(row.flatten())
                margin = required = float(z[y] - z[rival])
                if features is not passed.features:
                    required = math.inf
                missing.append(share * min(REQUIRED_MARGIN, 0.5 * required) - margin)
    a, b = torch.stack(rows), torch.tensor(missing, dtype=torch.float64)
    change = a.T @ solve_dual(a @ a.T, b, torch.full_like(b, torch.inf), torch.zeros_like(b))
    is_feasible = bool((a @ change > b - 1e-5 * b.abs().max()).all())
    return float(change.norm()) if is_feasible else math.inf


@settings(max_examples=5, deadline=None)
@given(problems())
def test_another_solver_with_all_rows_at_once_agrees(problem):
    passed, targets = (
        LayerSamples(*(x.double() if x.is_floating_point() else x for x in part))
        for part in problem
    )
    x, logits, _ = passed
    best = logits.topk(2).values
    # A tenth of what is asked of a smaller margin is less than the other solver resolves.
    assume(float((best[:, 0] - best[:, 1]).amin()) > 1e-4)
    found, moment = find_fixability(passed, targets), x.T @ x / len(x)
    assert not (found.fixable & found.unfixable).any()
    # With fewer passed samples than features there are directions that never occur.
    moment.diagonal().add_(FEATURE_RIDGE * moment.diagonal().mean())
    root = torch.linalg.inv(torch.linalg.cholesky(moment)).T
    # Its tolerance is 1e-7 of the most that a row asks; rows along such a feature are up to 1,000
    # times as long.
    resolved = 1e-6 * found.limit
    for at in range(4):
        target = targets.at(torch.tensor([at]))
        if found.fixable[at]:
            for x, logits, label in (passed, target):
                assert torch.equal((logits + x @ found.change[at].T.double()).argmax(1), label)
        size = smallest(passed, target, root)
        if found.unfixable[at]:
            assert size > 0.99 * found.limit
        if size < 0.5 * found.limit:
            assert found.fixable[at]
            # The optimum under some of the rows, and all of them give nearly what is asked.
            least = smallest(passed, target, root, FULFILLED_FRACTION)
            assert 0.998 * least - resolved <= found.size[at].item() <= 1.002 * size + resolved
