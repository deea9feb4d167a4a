"""Many searches at once: the paper's study, 66 settings x 10 seeds of 200 particles and 100
iterations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from measure import EVALUATOR, recorded, show
from torch import nn

from lightning_nrl import Grid, ParticleSwarm, Settings, TensorSource
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search import WeightStats, search_many
from lightning_nrl.search.fitness import Fitness
from lightning_nrl.search.scoring.scorer import make_scorer
from lightning_nrl.study import sweep_module

ITERATIONS = 100


def study(
    swarms: int,
    particles: int,
    iterations: int,
    sampled: int,
    device: str = "cpu",
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Seconds for swarms with weights, passed samples, fitness and seed of their own; `around` is
    around the search.
    """
    n_failed, n_passed = 150, 3000
    torch.manual_seed(0)
    model = nn.Linear(32, 7).eval()
    x = torch.randn(n_failed + n_passed, 32).relu()
    y = model(x).argmax(1)
    failed = torch.arange(len(x)) < n_failed
    y[failed] = (y[failed] + 1) % 7
    space = find_layers(model.to(device), "")
    recording = recorded(model, space, x.to(device), y.to(device))
    sizes = [(16, 32, 53, 76)[s % 4] for s in range(swarms)]
    width = max(sizes)
    where = torch.stack([torch.randperm(space.size)[:width] for _ in range(swarms)])
    where[torch.arange(width) >= torch.tensor(sizes).unsqueeze(1)] = -1
    passed = torch.zeros(swarms, len(x), dtype=torch.bool)
    for row in passed:
        row[n_failed + torch.randperm(n_passed)[:sampled]] = True
    kinds = [
        Fitness(("eq1", "eq2")[s % 2], alpha=4.0 + s % 5, perfect_intact=s % 3 == 0)
        for s in range(swarms)
    ]
    began = time.perf_counter()
    scorer = make_scorer(recording, where, failed, passed, EVALUATOR)
    with around():
        search_many(
            scorer,
            space.flat()[where.clamp_min(0).to(device)],
            WeightStats.of(space.flat()),
            seeds=list(range(swarms)),
            fitness=kinds,
            searcher=ParticleSwarm(
                particles=particles, iterations=iterations, patience=iterations or 1
            ),
            sizes=sizes,
        )
    return time.perf_counter() - began


def many_swarms(iterations: str = str(ITERATIONS)) -> None:
    """The whole study as one call; fewer iterations make it short, and the time is scaled up. Wall
    clock.
    """
    n, rows = int(iterations), []
    for swarms, particles, sampled in (
        (660, 200, 500),
        (330, 200, 500),
        (660, 100, 500),
        (660, 200, 1000),
    ):
        few = study(swarms, particles, 0, sampled)
        seconds = few + (study(swarms, particles, n, sampled) - few) * ITERATIONS / n
        rows.append(
            [
                str(swarms),
                str(particles),
                str(150 + sampled),
                f"{seconds:.0f} s",
                f"{seconds / 60:.1f} min",
            ]
        )
    header = ["swarms", "particles", "samples", f"{ITERATIONS} iterations", ""]
    show(f"The paper's study, last Linear 32 -> 7 (measured over {n} iterations)", header, rows)


def sweep(iterations: str = str(ITERATIONS)) -> None:
    """The study by `sweep_module`, recounts included; nothing ends early. CPU time is what one core
    takes.

    A last Linear 32 -> 7 behind a hidden layer: 3,150 known samples, 1,000 for calibration and
    1,000 unseen.
    """
    kinds = {"fitness": ["eq1", "eq2"], "alpha": [4, 5, 6, 7, 8], "perfect_intact": [False, True]}
    common = {"n_passed": 500, "particles": 200}
    settings = [
        *Grid(**kinds, **common, n_weights=[16, 53, 76]).settings(),
        *Grid(fitness="lexicographic", **common, n_weights=[16, 32, 53, 64, 76, 90]).settings(),
    ]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 7)).eval()
    x = torch.randn(5150, 20)
    y = model(x).argmax(1)
    y[:150] = (y[:150] + 1) % 7
    y[4000:] = torch.where(torch.rand(1150) < 0.1, (y[4000:] + 1) % 7, y[4000:])

    def source(rows: slice, split: str, **marks: bool) -> TensorSource:
        return TensorSource(x[rows], y[rows], split, batch_size=64, **marks)

    known = [source(slice(150, 3150), "train", passed=True), source(slice(150), "new", failed=True)]
    aside = {
        "calibration": [source(slice(3150, 4150), "val")],
        "unseen": [source(slice(4150, 5150), "test")],
    }

    def seconds(n: int) -> float:
        base = Settings(method=ParticleSwarm(iterations=n, patience=max(1, n)))
        began = time.process_time()
        result = sweep_module(model, known, settings, seeds=10, base=base, **aside)
        assert len(result.runs) == 660
        return time.process_time() - began

    n = int(iterations)
    start = 0.0 if n == ITERATIONS else seconds(0)
    cpu = start + (seconds(n) - start) * ITERATIONS / n
    title = f"The paper's study, last Linear 32 -> 7 (measured over {n} iterations)"
    show(title, ["runs", "CPU"], [["660", f"{cpu / 60:.1f} min"]])
