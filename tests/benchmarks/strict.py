"""Launches and waits, counted on the strict stand-in for CUDA of `tests/device`; no times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import strict_cuda  # before torch
from device_repairs import CASES, GPU, sources
from measure import show
from swarms import study
from toy_repairs import trained

from lightning_nrl import repair_module
from lightning_nrl.search.scoring import chunk_scorer, scorer

FEWER = 20
"""A share of the particles in blocks of that share of the bytes: as many launches as with all, in
minutes on a CPU.
"""


def launches(*swarms: str) -> None:
    """An iteration of the paper's study."""
    scorer.GPU_BLOCK_BYTES = chunk_scorer.GPU_BLOCK_BYTES // FEWER

    def counted(n: int, iterations: int) -> tuple[int, int]:
        found = []

        @contextmanager
        def around() -> Iterator[None]:
            with strict_cuda.watch() as seen:
                yield
            found.append((seen.n_launches, seen.n_waits))

        study(n, 200 // FEWER, iterations, 500, "cuda", around)
        return found[0]

    rows = []
    for n in swarms or ("660",):
        (few, waits), (more, more_waits) = counted(int(n), 10), counted(int(n), 20)
        rows.append([n, f"{(more - few) / 10:,.0f}", f"{(more_waits - waits) / 10:.1f}"])
    show("An iteration of 200 particles a swarm", ["swarms", "launches", "waits"], rows)


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
