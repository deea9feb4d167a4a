"""What the benchmarks share: a network like the paper's, timing that compares fairly, a table."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.recording import record

EVALUATOR = Evaluator(nn.Identity())  # for scorers, to which the task and the ranks alone matter


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(inside, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if inside != out or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class ResNet27(nn.Module):
    """27 convolutions in three stages of four blocks, 32 x 32 pixels, 7 classes."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = (width, 2 * width, 4 * width)
        self.stages = nn.ModuleList()
        inside = width
        for i, out in enumerate(widths):
            blocks = [
                Block(inside if j == 0 else out, out, 2 if i and j == 0 else 1) for j in range(4)
            ]
            self.stages.append(nn.Sequential(*blocks))
            inside = out
        self.head = nn.Linear(inside, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def recorded(model: nn.Module, space: ParameterSpace, x: Tensor, y: Tensor) -> ActivationCache:
    """All samples recorded, in batches of 100."""
    batches = [(Batch((x[r],), y[r], r), r) for r in torch.arange(len(x)).split(100)]
    return record(Evaluator(model), batches, space, torch.ones(len(x), dtype=torch.bool))


def compare(runs: Sequence[Callable[[], object]], times: int = 7) -> list[list[float]]:
    """Processor seconds of each function, run in turn so that a busy machine slows all alike; one
    warm-up each.
    """
    seconds = [[] for _ in runs]
    for i in range(times + 1):
        for function, found in zip(runs, seconds, strict=True):
            began = time.process_time()
            function()
            if i:
                found.append(time.process_time() - began)
    return seconds


def ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f} ms"


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table in markdown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"\n{title}")
    threads = torch.get_num_threads()
    print(f"{cores} {platform.machine()} cores, torch {torch.__version__}, {threads} thread(s)\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
