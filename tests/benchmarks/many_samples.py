"""Time and memory of repairs of very many samples. Run with `python tests/benchmarks/many_samples.py [METHOD ...]`.

A small network, so that all there is to see are the samples: 10 inputs, 64 hidden units, 10 classes. Samples are made
when they are read; each has the class that the model gives it, the 16 nearest to another class that one instead. Each
row is a process of its own. Memory is the most that the process held (`ru_maxrss`) less what it held with model and
labels, for each sample. With `--processor` the repair's clock is the processor time of its one thread, which is what a
quiet machine's clock would show, so that other processes do not matter.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

if "--processor" in sys.argv:
    time.perf_counter = time.process_time

import torch
from bench import show
from large import Case, labelled
from torch import Tensor, nn

from lightning_nrl.pipeline import Settings, repair_module

MIB = 2**20


def network() -> nn.Module:
    """What a head gets of each sample are 64 numbers."""
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 10))


def numbers(number: Tensor) -> Tensor:
    """Inputs that are made of a sample's number."""
    return torch.stack([torch.sin(number * (k + 1) * 0.7311) for k in range(10)], 1).float() * 2


def held() -> int:
    """Bytes that the process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measured(method: Any, n: int, max_time: float | None, batch_size: int) -> list[str]:
    """One row of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = Case(network, numbers, (), n, batch_size)
    model = case.model().eval()
    source, _ = labelled(case, model)
    base, began, processor = held(), time.perf_counter(), time.process_time()
    report = repair_module(model, [source], Settings(method=method, max_time=max_time)).report
    wall, processor = time.perf_counter() - began, time.process_time() - processor
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print({name: round(seconds, 1) for name, seconds in report.seconds.items()}, file=sys.stderr)
    for step in report.steps:
        print(f"    {step.name}: {step.repaired} : {step.broken}, {step.seconds} s, {step.note}", file=sys.stderr)
    return [
        method,
        f"{n:,}",
        "none" if max_time is None else f"{max_time:g} s",
        f"{wall:.1f} s",
        f"{processor:.1f} s",
        f"{(peak - base) / MIB:,.0f} MiB",
        f"{(peak - base) / n:,.0f} B",
        f"{report.splits[0].repaired} : {report.splits[0].broken}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=["auto", "convex"])
    parser.add_argument("--samples", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--max-time", type=float, nargs="+", default=[10, 60], help="seconds; 0: no limit")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--processor", action="store_true", help="keep time by the processor time of the process")
    parser.add_argument("--one", action="store_true", help="measure one row in this process, print JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.methods[0], given.samples[0], given.max_time[0] or None, given.batch_size)))
        return
    rows = []
    for method in given.methods:
        for n in given.samples:
            for seconds in given.max_time:
                own = [f"--samples={n}", f"--max-time={seconds}", f"--batch-size={given.batch_size}", "--one", method]
                own += ["--processor"] * given.processor
                command = [sys.executable, __file__, *own]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], file=sys.stderr, flush=True)
    columns = ["method", "samples", "asked", "taken", "processor", "memory", "a sample", "repaired : broken"]
    show("Very many samples", columns, rows)


if __name__ == "__main__":
    main()
