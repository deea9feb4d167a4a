"""The paper's study: 66 settings x 10 seeds of 200 particles and 100 iterations."""

from __future__ import annotations

import time

import torch
from measure import show
from torch import nn

from lightning_nrl import Grid, ParticleSwarm, Settings, TensorSource
from lightning_nrl.study import sweep_module

ITERATIONS = 100


def sweep(iterations: str = str(ITERATIONS)) -> None:
    """The study by `sweep_module`, recounts included; nothing ends early.

    Fewer iterations make it short, and the time is scaled up. CPU time is what one core takes. A
    last Linear 32 -> 7 behind a hidden layer: 3,150 known samples, 1,000 for calibration and 1,000
    unseen.
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
