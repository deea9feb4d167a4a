"""The whole of the paper's study as one call: 66 settings x 10 seeds of 200 particles, 100 iterations, 650 samples.

A last Linear 32 -> 7; each swarm has its own localised weights, sampled passed data, fitness and seed. Wall clock. Run
with `python tests/benchmarks/many_swarms.py`; a number of iterations as argument makes it short and scales the time up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from bench import recorded, show
from torch import nn

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search import ParticleSwarm, WeightStats, search_many
from lightning_nrl.search._scoring.scorer import make_scorer
from lightning_nrl.search.fitness import Fitness

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

SETTINGS, SEEDS, PARTICLES, ITERATIONS = 66, 10, 200, 100
FAILED, PASSED, SAMPLED = 150, 3000, 500


def study(
    settings: int,
    seeds: int,
    particles: int,
    iterations: int,
    sampled: int,
    device: str = "cpu",
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Seconds for `settings x seeds` swarms; the search is made inside of `around`."""
    torch.manual_seed(0)
    model = nn.Linear(32, 7).eval()
    x = torch.randn(FAILED + PASSED, 32).relu()
    y = model(x).argmax(1)
    failed = torch.arange(len(x)) < FAILED
    y[failed] = (y[failed] + 1) % 7
    space = find_layers(model.to(device), "")
    recording = recorded(model, space, x.to(device), y.to(device))
    swarms = settings * seeds
    sizes = [(16, 32, 53, 76)[s % 4] for s in range(swarms)]
    width = max(sizes)
    where = torch.stack([torch.randperm(space.size)[:width] for _ in range(swarms)])
    where[torch.arange(width) >= torch.tensor(sizes).unsqueeze(1)] = -1
    passed = torch.zeros(swarms, len(x), dtype=torch.bool)
    for row in passed:
        row[FAILED + torch.randperm(PASSED)[:sampled]] = True
    kinds = [Fitness(("eq1", "eq2")[s % 2], alpha=4.0 + s % 5, perfect_intact=s % 3 == 0) for s in range(swarms)]
    began = time.perf_counter()
    scorer = make_scorer(recording, where, failed, passed, EVALUATOR)
    with around():
        search_many(
            scorer,
            space.flat()[where.clamp_min(0).to(device)],
            WeightStats.of(space.flat()),
            seeds=list(range(swarms)),
            fitness=kinds,
            searcher=ParticleSwarm(particles=particles, iterations=iterations, patience=iterations or 1),
            sizes=sizes,
        )
    return time.perf_counter() - began


def main() -> None:
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else ITERATIONS
    rows = []
    for settings, particles, sampled in ((66, 200, 500), (33, 200, 500), (66, 100, 500), (66, 200, 1000)):
        few = study(settings, SEEDS, particles, 0, sampled)
        seconds = few + (study(settings, SEEDS, particles, iterations, sampled) - few) * ITERATIONS / iterations
        swarms, samples = settings * SEEDS, FAILED + sampled
        rows.append([str(swarms), str(particles), str(samples), f"{seconds:.0f} s", f"{seconds / 60:.1f} min"])
    header = ["swarms", "particles", "samples", f"{ITERATIONS} iterations", ""]
    show(f"The paper's study, last Linear 32 -> 7 (measured over {iterations} iterations)", header, rows)


if __name__ == "__main__":
    main()
