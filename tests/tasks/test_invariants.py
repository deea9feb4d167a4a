"""What holds for every task, whatever a model returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_nrl.tasks import (
    Binary,
    Multiclass,
    Multilabel,
    Ordinal,
    Regression,
    Segmentation,
    Sequence,
    Task,
)

SHARES = st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0])
Sample = tuple[Task, Tensor, Tensor]


def logits(generator: torch.Generator, *shape: int) -> Tensor:
    """Halves, so that there are ties."""
    return torch.randint(-6, 7, shape, generator=generator) / 2


def whole(generator: torch.Generator, n: int, *shape: int, ignored: bool = True) -> Tensor:
    """Labels from 0 to below n, a few of them ignored, the first of a sample never."""
    label = torch.randint(0, n, shape, generator=generator)
    if ignored:
        label[torch.rand(shape, generator=generator) < 0.2] = -100
        label[:, :1] = label[:, :1].clamp_min(0)
    return label


@st.composite
def multilabel(draw: Any, g: torch.Generator) -> Sample:
    task = Multilabel(draw(st.sampled_from([0.2, 0.5, 0.9])), wrong=draw(st.integers(0, 1)))
    label = whole(g, 2, 6, 5)
    label[:, 1] = label[:, 1].clamp_min(0)
    return task, logits(g, 6, 5), label


@st.composite
def regression(draw: Any, g: torch.Generator) -> Sample:
    task = Regression(
        draw(st.sampled_from([0.5, 0.7, 2.0])), relative=draw(st.sampled_from([0.0, 0.25]))
    )
    return task, logits(g, 6, 3), logits(g, 6, 3)


@st.composite
def sequence(draw: Any, g: torch.Generator) -> Sample:
    t = draw(st.integers(1, 8))
    return Sequence(draw(SHARES)), logits(g, 6, t, 3), whole(g, 3, 6, t)


@st.composite
def segmentation(draw: Any, g: torch.Generator) -> Sample:
    c, height = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    task = Segmentation(draw(SHARES), classes=draw(st.sampled_from([None, (1,)])))
    return task, logits(g, 6, c, height, 5), whole(g, max(2, c), 6, height, 5)


@st.composite
def multiclass(draw: Any, g: torch.Generator) -> Sample:
    c = draw(st.integers(2, 5))
    return Multiclass(), logits(g, 6, c), whole(g, c, 6, ignored=False)


@st.composite
def binary(draw: Any, g: torch.Generator) -> Sample:
    return (
        Binary(),
        logits(g, *draw(st.sampled_from([(6,), (6, 1)]))),
        whole(g, 2, 6, ignored=False),
    )


@st.composite
def ordinal(draw: Any, g: torch.Generator) -> Sample:
    task = Ordinal(conditional=draw(st.booleans()))
    return task, logits(g, 6, 3), whole(g, 4, 6, ignored=False)


ALL = [multiclass, binary, multilabel, ordinal, regression, sequence, segmentation]


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_a_margin_is_above_0_where_a_sample_passed_and_0_only_on_ties(make, data, seed):
    task, output, target = data.draw(make(torch.Generator().manual_seed(seed)))
    task.check(output, target)
    margin, passed = task.margin(output, target), task.passed(output, target)
    assert torch.equal((margin > 0)[margin != 0], passed[margin != 0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), c=st.integers(1, 4))
def test_right_is_what_arg_max_gives_in_all_tasks_with_classes(seed, c):
    g = torch.Generator().manual_seed(seed)
    output, label = logits(g, 50, c), whole(g, max(2, c), 50, ignored=False)
    right = (output[:, 0] > 0 if c == 1 else output.argmax(1)) == label
    assert torch.equal(Multiclass().passed(output, label), right)
    assert torch.equal(Segmentation(1.0).passed(output[:, :, None], label[:, None]), right)
    if c > 1:
        assert torch.equal(Sequence().passed(output[:, None], label[:, None]), right)


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31), class_major=st.booleans())
def test_what_is_computed_in_one_call_is_what_each_gives(make, data, seed, class_major):
    g = torch.Generator().manual_seed(seed)
    task, output, target = data.draw(make(g))
    margin = task.margin(output, target)
    reserve = torch.where(torch.rand(6, generator=g) < 0.5, margin, logits(g, 6))
    # In another layout too, as swarms give it.
    laid_out = output.movedim(-1, 0).contiguous().movedim(0, -1) if class_major else output
    passed, loss = task.passed_and_loss(laid_out, target, reserve)
    assert torch.equal(passed, task.passed(output, target) & (margin >= reserve))
    assert torch.equal(loss, task.loss(output, target))
    assert torch.equal(
        task.passed_and_loss(laid_out, target, with_loss=False)[0], task.passed(output, target)
    )


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_samples_are_judged_one_by_one(make, data, seed):
    task, output, target = data.draw(make(torch.Generator().manual_seed(seed)))
    for judge in (task.passed, task.loss, task.margin):
        one_by_one = torch.cat([judge(output[i : i + 1], target[i : i + 1]) for i in range(6)])
        torch.testing.assert_close(judge(output, target), one_by_one)


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_steps_along_the_margin_make_it_grow(make, data, seed):
    task, output, target = data.draw(make(torch.Generator().manual_seed(seed)))
    for _ in range(200):
        at = output.clone().requires_grad_()
        (slope,) = torch.autograd.grad(task.margin(at, target).sum(), at)
        assert slope.isfinite().all()
        if task.passed(output, target).all():
            return
        output = output + 0.2 * slope.sign()
    raise AssertionError("no step made the last sample right")


@pytest.mark.parametrize("make", ALL)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_the_divergence_is_0_from_oneself_and_never_below(make, data, seed):
    task, output, target = data.draw(make(torch.Generator().manual_seed(seed)))
    shifted = output.roll(1, 0)
    for truth in (None, target):
        assert (task.divergence(output, output, truth).abs() <= 1e-6).all()
        assert (task.divergence(output, shifted, truth) >= -1e-6).all()


def mean_iou(prediction: Tensor, truth: Tensor, ignored: int = -100) -> float:
    """Of one image, by sets of pixels."""
    shares = []
    for c in sorted(set(truth.flatten().tolist()) - {ignored}):
        counted = truth != ignored
        hit = ((prediction == c) & (truth == c) & counted).sum()
        shares.append(float(hit / (((prediction == c) | (truth == c)) & counted).sum()))
    return sum(shares) / len(shares)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_the_iou_is_that_of_sets_of_pixels(data, seed):
    g = torch.Generator().manual_seed(seed)
    output, target = logits(g, 4, 3, 3, 4), whole(g, 3, 4, 3, 4)
    threshold = data.draw(SHARES)
    expected = [
        mean_iou(o.argmax(0), t) >= threshold - 1e-6 for o, t in zip(output, target, strict=True)
    ]
    assert Segmentation(threshold).passed(output, target).tolist() == expected
