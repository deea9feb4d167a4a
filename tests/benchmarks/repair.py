"""Time and memory of whole repairs: a polish, and a convex search of the head. 27 convolutions, 6,600 images.

The network learns patterns under noise, meets a pattern that it has hardly seen, and is repaired for it. Times are wall
clock beside that of one epoch of plain training on the same images; memory is the peak of all tensors made on the way
beside that of one training step with 128 images. Run with `python tests/benchmarks/repair.py [share of the images]`.
"""

from __future__ import annotations

import copy
import sys
import time

import torch
from bench import ResNet27, show
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl import Settings, Target, TensorSource, repair_module
from lightning_nrl.methods import Convex, Method, Polish
from lightning_nrl.search._scoring.memory import measure_allocations

TRAIN, NEW, BATCH = 4600, 2000, 128
WEAK = 3


def images(n: int, patterns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patterns of varying strength over noise, `n x 3 x 32 x 32`, and which pattern it is, `n`."""
    label = torch.randint(0, len(patterns), (n,), generator=generator)
    strength = 0.25 + torch.rand(n, 1, 1, 1, generator=generator)
    return strength * patterns[label] + torch.randn(n, 3, 32, 32, generator=generator), label


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    model.train()
    for rows in torch.randperm(len(x)).split(BATCH):
        step(model, optimizer, x[rows], y[rows])
    model.eval()


def main(share: float = 1.0) -> None:
    torch.manual_seed(0)
    n, n_new = round(TRAIN * share), round(NEW * share)
    generator = torch.Generator().manual_seed(0)
    patterns = 0.3 * F.interpolate(torch.randn(7, 3, 8, 8, generator=generator), scale_factor=4)
    x, y = images(n, patterns, generator)
    seen = (y != WEAK) | (torch.rand(n, generator=generator) < 0.05)
    x, y = x[seen], y[seen]
    x_new, y_new = images(n_new + n - len(x), patterns, generator)
    model = ResNet27()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(4):
        epoch(model, optimizer, x, y)
    both = torch.cat([x, x_new]), torch.cat([y, y_new])
    new = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-3)
    began = time.perf_counter()
    epoch(new, optimizer, *both)
    plain = time.perf_counter() - began
    spare = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(spare.parameters(), lr=1e-3)
    step(spare, optimizer, x[:BATCH], y[:BATCH])
    floor, _ = measure_allocations(lambda: step(spare, optimizer, x[:BATCH], y[:BATCH]))

    def repaired(method: Method, layer: str) -> list[str]:
        source = TensorSource(x, y, split="train", passed=True)
        news = TensorSource(x_new, y_new, split="new", failed=True)
        settings = Settings(target=Target.label(WEAK), method=method, layer=layer)
        began = time.perf_counter()
        report = repair_module(copy.deepcopy(model), [source, news], settings=settings).report
        whole = time.perf_counter() - began
        peak, _ = measure_allocations(lambda: repair_module(copy.deepcopy(model), [source, news], settings=settings))
        known = report.pooled("known")
        stages = {k: v for k, v in report.seconds.items() if k not in ("collect", "judge")}
        return [
            f"{known.kept + known.broken:,}",
            f"{known.repaired_in_target} of {known.targeted}",
            str(known.broken),
            ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items()),
            f"{whole:.1f} s",
            f"{whole / plain:.1f}",
            f"{peak / floor:.2f}",
        ]

    rows = [
        ["polish of one more epoch", *repaired(Polish(new), "auto")],
        ["convex, the head", *repaired(Convex(), "head")],
    ]
    header = ["repair", "known passed", "repaired", "known broken", "stages", "all", "/ one epoch", "peak / step"]
    show(f"Whole repairs; one epoch: {plain:.1f} s, one step: {floor / 2**20:.0f} MiB", header, rows)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
