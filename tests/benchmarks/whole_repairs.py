"""Whole repairs of very many samples: time and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from measure import show
from torch import Tensor, nn

from lightning_nrl import Settings, repair_module
from lightning_nrl.data.batch import Batch

MIB = 2**20


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
            inputs = (
                torch.stack([torch.sin(position * (k + 1) * 0.7311) for k in range(10)], 1).float()
                * 2
            )
            yield Batch((inputs,), self.label[position], position)


def samples(method: str = "auto", n_samples: str = "200000", seconds: str = "10") -> None:
    """A network of 10, 64 and 10 units, so that all there is to see are the samples. `seconds`: 0
    is
    no limit.

    The 16 samples nearest to another class have that one as their label. The repair's clock is the
    processor time of its one thread, as on a quiet machine. Memory is the most that the process
    held (`ru_maxrss`) less what it held with model and labels.
    """
    time.perf_counter = time.process_time
    n, limit = int(n_samples), float(seconds) or None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        best = [
            model(*batch.args).topk(2) for batch in Generated(torch.zeros(n, dtype=torch.int64))
        ]
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
