"""On a GPU: nothing waits for the device, blocks stay large, and what does not fit is kept in
pinned memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from scoring_networks import REPLAYED, Problem, make_problem
from torch import nn

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search.scoring.scorer import make_scorer

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

N = 1200
GPU = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_waits() -> Iterator[None]:
    """Inside, what makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(name: str, n: int = N) -> Problem:
    problem = make_problem(REPLAYED[name], n=n)
    model = problem.model.to(GPU)
    assert isinstance(problem.data, tuple)
    layer = REPLAYED[name].layer
    return replace(
        problem,
        model=model,
        space=find_layers(model, layer),
        data=tuple(x.to(GPU) for x in problem.data),
    )


@pytest.mark.parametrize("name", ["head", "middle linear", "conv2d"])
def test_an_iteration_never_waits_for_the_device_whatever_samples_weigh(name):
    problem = on_gpu(name)
    where, values = problem.candidates(9, 6)
    failed = torch.arange(N) % 3 == 0
    weight = torch.arange(N, dtype=torch.float64)
    scorer = make_scorer(problem.recording(N), where, failed, ~failed, EVALUATOR, weight=weight)
    values = values.to(GPU)
    with no_waits():
        scores = scorer(values)
    assert scores.cost is not None


def test_all_samples_in_front_of_a_last_layer_are_one_chunk():
    problem = on_gpu("head")
    where, _ = problem.candidates(1, 6)
    failed = torch.arange(N) % 3 == 0
    scorer = make_scorer(problem.recording(N), where, failed, ~failed, EVALUATOR)
    assert (len(scorer.failed), len(scorer.passed)) == (1, 1)


def test_a_recording_that_does_not_fit_keeps_its_beginning_on_the_device_and_pins_the_rest():
    problem = on_gpu("middle linear", n=12)
    where, values = problem.candidates(3, 6)
    failed = torch.arange(12) % 3 == 0
    whole = problem.recording(4, 4, 4)
    size = whole.groups[0].nbytes
    parted = problem.recording(4, 4, 4, budget=size // 2)
    assert [group.device.type for group in parted.groups] == ["cuda", "cpu"]
    assert [group.rows.tolist() for group in parted.groups] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7, 8, 9, 10, 11],
    ]
    assert all(x.is_pinned() for x in parted.groups[1].tensors)
    expected, actual = (
        make_scorer(cache, where, failed, ~failed, EVALUATOR)(values.to(GPU))
        for cache in (whole, parted)
    )
    assert actual.patched.tolist() == expected.patched.tolist()
    assert actual.intact.tolist() == expected.intact.tolist()
