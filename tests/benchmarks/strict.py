"""Launches and waits, counted on the strict stand-in for CUDA of `tests/device`; no times."""

from __future__ import annotations

from collections import Counter

import strict_cuda  # before torch
import torch
from device_repairs import CASES, GPU, sources
from measure import EVALUATOR, recorded, show
from torch import Tensor, nn
from toy_repairs import trained

from lightning_nrl import repair_module
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search.scoring.scorer import make_scorer


def launches() -> None:
    """One call of a scorer: 100 particles, 50 weights, weighted samples."""
    torch.manual_seed(0)
    head = nn.Linear(64, 10)
    convolution = nn.Sequential(
        nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10)
    )
    rows = []
    for name, model, layer, shape, n in (
        ("last Linear 64 -> 10", head, "", (64,), 4289),
        ("convolution 8 -> 16", convolution, "0", (8, 16), 257),
        ("convolution 8 -> 16", convolution, "0", (8, 16), 1000),
        ("convolution 8 -> 16", convolution, "0", (8, 16), 4289),
    ):
        x, y = torch.randn(n, *shape, device=GPU), torch.randint(10, (n,), device=GPU)
        n_waits, n_launches = _of_one_call(model.eval().to(GPU), layer, x, y)
        rows.append([name, f"{n:,}", str(n_waits), f"{n_launches:,}"])
    show("One call, 100 particles", ["layer", "samples", "waits", "launches"], rows)


def _of_one_call(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> tuple[int, int]:
    space = find_layers(model, layer)
    where = torch.randperm(space.size)[:50]
    failed = torch.arange(len(x)) % 5 == 0
    weight = torch.arange(len(x), dtype=torch.float64)
    cache = recorded(model, space, x, y)
    scorer = make_scorer(cache, where, failed, ~failed, EVALUATOR, weight=weight)
    values = space.flat()[where.to(GPU)] + 0.1 * torch.randn(100, 50, device=GPU)
    with strict_cuda.watch() as seen:
        scorer(values)
    return seen.n_waits, seen.n_launches


def device(*names: str) -> None:
    """Whole repairs, and waits by place."""
    rows, places = [], Counter[str]()
    for name in names or CASES:
        make, settings = CASES[name]
        model = trained(make).to(GPU)
        with strict_cuda.watch() as seen:
            repair_module(model, sources(GPU), settings)
        moving = sum(n for place, n in seen.waits.items() if "data/batch" in place)
        judging = sum(
            n
            for place, n in seen.waits.items()
            if "evaluation/evaluator" in place or " at tasks/" in place
        )
        counts = (seen.n_launches, seen.n_waits, moving, judging, seen.n_waits - moving - judging)
        rows.append([name, *(f"{n:,}" for n in counts)])
        places += seen.waits
    show(
        "Repairs",
        ["repair", "launches", "waits", "of them moving batches", "evaluating", "elsewhere"],
        rows,
    )
    show(
        "Waits by place, of all",
        ["waits", "place"],
        [[f"{n:,}", place] for place, n in places.most_common(20)],
    )
