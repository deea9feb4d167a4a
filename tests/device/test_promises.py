"""What is promised of a device: few waits, few launches, blocks that do not shrink, memory that may
run out.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from device_repairs import CASES, GPU, Conv, counted, sources
from toy_repairs import mlp, quick, trained

from lightning_nrl import ParticleSwarm, repair_module
from lightning_nrl.methods import local_search
from lightning_nrl.methods.solvers.descent import Descent
from lightning_nrl.search.search_log import SearchLog

STRICT = sys.modules.get("strict_cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
counting = pytest.mark.skipif(STRICT is None, reason="counts on the strict device")

SEARCHES = [
    "swarm with weights",
    "swarm with protected samples",
    "swarm, convolution",
    "swarm, attention",
]


def waits_raise(yes: bool) -> None:
    torch.cuda.set_sync_debug_mode("error" if yes else "default")


@contextmanager
def watched_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Between two looks of a search at its log, nothing may wait; gives the iterations at which it
    looked.
    """
    looks = []
    read = SearchLog.read

    def look(log: SearchLog) -> Any:
        waits_raise(False)
        course = read(log)
        looks.append(log.done)
        waits_raise(log.done + 10 < len(log._rows))
        return course

    monkeypatch.setattr(SearchLog, "read", look)
    try:
        yield looks
    finally:
        waits_raise(False)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_waits_once_in_ten_iterations(name, monkeypatch):
    make, settings = CASES[name]
    with watched_looks(monkeypatch) as looks:
        repair_module(trained(make).to(GPU), sources(GPU), settings)
    assert looks == [0, 10, 20]


def test_a_step_of_training_never_waits(monkeypatch):
    step, steps = Descent.step, []

    def watched(*args: Any, **rest: Any) -> None:
        # The first one makes the state of the optimizer.
        waits_raise(len(steps) > 0)
        try:
            step(*args, **rest)
        finally:
            waits_raise(False)
        steps.append(1)

    monkeypatch.setattr(Descent, "step", watched)
    repair_module(trained().to(GPU), sources(GPU), CASES["finetune-polish"][1])
    assert len(steps) > 10


@contextmanager
def grabbed(
    monkeypatch: pytest.MonkeyPatch, around: Callable[[], AbstractContextManager[Any]]
) -> Iterator[list[Any]]:
    """The scorers of searches, and what `around` gave while each of them ran."""
    real, found = local_search.search, []

    def search(scorer: Any, *args: Any, **rest: Any) -> Any:
        with around() as seen:
            result = real(scorer, *args, **rest)
        found.append((scorer, seen, result))
        return result

    monkeypatch.setattr(local_search, "search", search)
    yield found


@pytest.mark.parametrize(("name", "n"), [("convolution", 600), ("head", 1500)])
def test_blocks_do_not_shrink_with_the_data(name, n, monkeypatch):
    make, layer = (Conv, "first") if name == "convolution" else (mlp, "auto")
    settings = quick(layer=layer, method=ParticleSwarm(particles=100, iterations=1))
    rows = []
    with grabbed(monkeypatch, nullcontext) as found:
        for size in (n // 10, n):
            repair_module(trained(make).to(GPU), sources(GPU, size), settings)
            scorer = found[-1][0]
            rows.append(min(part.rows for part in (*scorer.failed, *scorer.passed)))
    assert rows[1] > 0.9 * rows[0]


LAUNCHES = {"convolution": 250, "weights": 240}
"""At most, an iteration of one swarm on two splits; 1.1 times what was counted."""


@counting
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_an_iteration(name, monkeypatch):
    make, layer = (Conv, "first") if name == "convolution" else (mlp, "auto")
    more = {"importance": "focal"} if name == "weights" else {}
    counts = []
    with grabbed(monkeypatch, STRICT.watch) as found:
        for iterations in (2, 6):
            method = ParticleSwarm(particles=10, iterations=iterations, patience=100)
            repair_module(
                trained(make).to(GPU), sources(GPU, 120), quick(layer=layer, method=method, **more)
            )
            counts.append(found[-1][1].n_launches)
    assert (counts[1] - counts[0]) / 4 <= LAUNCHES[name]


@counting
def test_memory_that_runs_out_once_changes_nothing():
    make, settings = CASES["swarm"]
    model = trained(make).to(GPU)
    alone = repair_module(model, sources(GPU), settings)
    for after in (0, 640, 1500):
        with STRICT.failing(after):
            found = repair_module(model, sources(GPU), settings)
        assert counted(found) == counted(alone)


@counting
def test_memory_that_does_not_suffice_leaves_the_weights_and_says_so():
    make, settings = CASES["swarm"]
    model = trained(make).to(GPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as seen, STRICT.failing(1200, times=100_000):
        warnings.simplefilter("always")
        outcome = repair_module(model, sources(GPU), settings)
    assert outcome.report.status == "not repaired"
    assert "memory ran out while" in outcome.report.reason
    assert any("memory ran out" in str(warning.message) for warning in seen)
    assert not outcome.write(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
