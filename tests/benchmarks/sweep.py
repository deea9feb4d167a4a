"""The paper's study by `sweep_module`: 66 settings x 10 seeds of 200 particles, 100 iterations, recounts included.

A last Linear 32 -> 7 behind a hidden layer: 3,150 known samples (150 failures, 500 passed ones sampled by each run),
1,000 for calibration and 1,000 unseen. Nothing ends early. CPU time is what one core takes, however busy. Run with
`python tests/benchmarks/sweep.py`; a number of iterations as argument makes it short and scales the time up.
"""

from __future__ import annotations

import sys
import time

import torch
from bench import show
from torch import nn

from lightning_nrl import Grid, ParticleSwarm, Settings, TensorSource
from lightning_nrl.analysis.sweep import run_sweep as study
from lightning_nrl.analysis.sweep import sweep_module

SEEDS, ITERATIONS = 10, 100
GRID = Grid(
    fitness=["eq1", "eq2"],
    alpha=[4, 5, 6, 7, 8],
    perfect_intact=[False, True],
    n_weights=[16, 53, 76],
    n_passed=500,
    particles=200,
)
SIX = Grid(fitness="lexicographic", n_weights=[16, 32, 53, 64, 76, 90], n_passed=500, particles=200)


def data() -> tuple[nn.Module, list[TensorSource], TensorSource, TensorSource]:
    """A random network; labels are what it says, but for 150 failures and some noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 7)).eval()
    x = torch.randn(5150, 20)
    y = model(x).argmax(1)
    y[:150] = (y[:150] + 1) % 7
    y[4000:] = torch.where(torch.rand(1150) < 0.1, (y[4000:] + 1) % 7, y[4000:])

    def source(rows: slice, split: str, **marks: bool) -> TensorSource:
        return TensorSource(x[rows], y[rows], split, batch_size=64, **marks)

    known = [source(slice(150, 3150), "train", passed=True), source(slice(150), "new", failed=True)]
    return model, known, source(slice(3150, 4150), "val"), source(slice(4150, 5150), "test")


def counted(iterations: int) -> tuple[float, float, float]:
    """Wall, CPU and counting seconds of the whole sweep."""
    model, known, calibration, unseen = data()
    settings = [*GRID.settings(), *SIX.settings()]
    assert len(settings) == 66
    spent, count = [0.0], study._with_counts

    def timed(*arguments: object) -> object:
        began = time.process_time()
        found = count(*arguments)  # type: ignore[arg-type]
        spent[0] += time.process_time() - began
        return found

    study._with_counts = timed  # type: ignore[assignment]
    base = Settings(method=ParticleSwarm(iterations=iterations, patience=max(1, iterations)))
    began, cpu = time.perf_counter(), time.process_time()
    result = sweep_module(model, known, settings, seeds=SEEDS, base=base, calibration=[calibration], unseen=[unseen])
    study._with_counts = count
    assert len(result.runs) == 660
    return time.perf_counter() - began, time.process_time() - cpu, spent[0]


def main() -> None:
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else ITERATIONS
    start: tuple[float, float, float] = (0.0, 0.0, 0.0) if iterations == ITERATIONS else counted(0)
    end = counted(iterations)
    cpu = start[1] + (end[1] - start[1]) * ITERATIONS / iterations
    # On a busy machine the wall time of a part says nothing of the whole.
    wall = f"{end[0] / 60:.1f} min" if iterations == ITERATIONS else "not measured"
    header = ["runs", "wall", "CPU", "of it counting"]
    rows = [["660", wall, f"{cpu / 60:.1f} min", f"{end[2]:.0f} s"]]
    show(f"The paper's study, last Linear 32 -> 7 (measured over {iterations} iterations)", header, rows)


if __name__ == "__main__":
    main()
