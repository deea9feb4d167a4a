"""Whole repairs: time and memory of a polish and of a convex search, and of very many samples."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from measure import ResNet27, show
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl import Settings, Target, TensorSource, repair_module
from lightning_nrl.data.batch import Batch
from lightning_nrl.methods import Convex, Method, Polish
from lightning_nrl.search._scoring.memory import measure_allocations

MIB = 2**20
WEAK = 3


def patterned(n: int, patterns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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
    for rows in torch.randperm(len(x)).split(128):
        step(model, optimizer, x[rows], y[rows])
    model.eval()


def repair(share: str = "1") -> None:
    """A polish, and a convex search of the head: 27 convolutions, 6,600 images.

    The network learns patterns under noise, meets a pattern that it has hardly seen, and is repaired for it. Times are
    wall clock beside one epoch of plain training on the same images; memory is the peak of all tensors made on the way
    beside that of one training step with 128 images.
    """
    torch.manual_seed(0)
    n, n_new = round(4600 * float(share)), round(2000 * float(share))
    generator = torch.Generator().manual_seed(0)
    patterns = 0.3 * F.interpolate(torch.randn(7, 3, 8, 8, generator=generator), scale_factor=4)
    x, y = patterned(n, patterns, generator)
    seen = (y != WEAK) | (torch.rand(n, generator=generator) < 0.05)
    x, y = x[seen], y[seen]
    x_new, y_new = patterned(n_new + n - len(x), patterns, generator)
    model = ResNet27()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(4):
        epoch(model, optimizer, x, y)
    new = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-3)
    began = time.perf_counter()
    epoch(new, optimizer, torch.cat([x, x_new]), torch.cat([y, y_new]))
    plain = time.perf_counter() - began
    spare = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(spare.parameters(), lr=1e-3)
    step(spare, optimizer, x[:128], y[:128])
    floor, _ = measure_allocations(lambda: step(spare, optimizer, x[:128], y[:128]))

    def repaired(method: Method, layer: str) -> list[str]:
        source = TensorSource(x, y, split="train", passed=True)
        news = TensorSource(x_new, y_new, split="new", failed=True)
        settings = Settings(target=Target.label(WEAK), method=method, layer=layer)
        began = time.perf_counter()
        report = repair_module(copy.deepcopy(model), [source, news], settings=settings).report
        whole = time.perf_counter() - began
        peak, _ = measure_allocations(lambda: repair_module(copy.deepcopy(model), [source, news], settings=settings))
        known = report.pooled("known")
        counts = f"{known.kept + known.broken:,}", f"{known.repaired_in_target} of {known.targeted}", str(known.broken)
        stages = (f"{k} {v:.1f} s" for k, v in report.seconds.items() if k not in ("collect", "judge"))
        return [*counts, ", ".join(stages), f"{whole:.1f} s", f"{whole / plain:.1f}", f"{peak / floor:.2f}"]

    rows = [
        ["polish of one more epoch", *repaired(Polish(new), "auto")],
        ["convex, the head", *repaired(Convex(), "head")],
    ]
    header = ["repair", "known passed", "repaired", "known broken", "stages", "all", "/ one epoch", "peak / step"]
    show(f"Whole repairs; one epoch: {plain:.1f} s, one step: {floor / MIB:.0f} MiB", header, rows)


@dataclass(frozen=True)
class Generated:
    """Samples that are made when they are read, so that data take no memory."""

    label: Tensor
    split: str = "train"
    passed: bool = True
    failed: bool = True

    @property
    def index(self) -> Tensor:
        return torch.arange(len(self.label))

    positions = index

    def __iter__(self) -> Iterator[Batch]:
        return self.draw(self.index.split(4096))

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for position in batches:
            inputs = torch.stack([torch.sin(position * (k + 1) * 0.7311) for k in range(10)], 1).float() * 2
            yield Batch((inputs,), self.label[position], position)


def samples(method: str = "auto", n_samples: str = "200000", seconds: str = "10") -> None:
    """A network of 10, 64 and 10 units, so that all there is to see are the samples. `seconds`: 0 is no limit.

    The 16 samples nearest to another class have that one as their label. The repair's clock is the processor time of
    its one thread, as on a quiet machine. Memory is the most that the process held (`ru_maxrss`) less what it held with
    model and labels.
    """
    time.perf_counter = time.process_time
    n, limit = int(n_samples), float(seconds) or None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        best = [model(*batch.args).topk(2) for batch in Generated(torch.zeros(n, dtype=torch.int64))]
    margin = torch.cat([-b.values.diff(dim=1)[:, 0] for b in best])
    first, second = torch.cat([b.indices for b in best]).T
    near = margin.argsort()[:16]
    source = Generated(first.index_put((near,), second[near]))
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[1]) * resource.getpagesize()
    began = time.perf_counter()
    report = repair_module(model, [source], Settings(method=method, max_time=limit)).report
    taken = time.perf_counter() - began
    more = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    memory = f"{more / MIB:,.0f} MiB", f"{more / n:,.0f} B"
    counts = f"{report.splits[0].repaired} : {report.splits[0].broken}"
    row = [method, f"{n:,}", f"{limit or 0:g} s", f"{taken:.1f} s", *memory, counts]
    columns = ["method", "samples", "asked", "taken", "memory", "a sample", "repaired : broken"]
    show("Very many samples", columns, [row])
