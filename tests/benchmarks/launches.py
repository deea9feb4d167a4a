"""Launches and waits of an iteration of the paper's study, counted on the strict stand-in for CUDA of `tests/device`.

A twentieth of the particles in blocks of a twentieth of the bytes: as many launches as with all of them, in minutes on
a CPU. Run with `python tests/benchmarks/launches.py`; numbers of swarms as arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "device"))
import strict_cuda  # before torch
from bench import show
from many_swarms import PARTICLES, study

from lightning_nrl.search._scoring import chunk_scorer, scorer

FEWER = 20


def counted(swarms: int, iterations: int) -> tuple[int, int]:
    """Launches and waits of a search."""
    found = []

    @contextmanager
    def around() -> Iterator[None]:
        with strict_cuda.watch() as seen:
            yield
        found.append((seen.n_launches, seen.n_waits))

    study(swarms, 1, PARTICLES // FEWER, iterations, 500, "cuda", around)
    return found[0]


def main() -> None:
    scorer.GPU_BLOCK_BYTES = chunk_scorer.GPU_BLOCK_BYTES // FEWER
    rows = []
    for swarms in [int(given) for given in sys.argv[1:]] or [660]:
        (launches, waits), (more, more_waits) = counted(swarms, 10), counted(swarms, 20)
        rows.append([str(swarms), f"{(more - launches) / 10:,.0f}", f"{(more_waits - waits) / 10:.1f}"])
    show(f"An iteration of {PARTICLES} particles a swarm", ["swarms", "launches", "waits"], rows)


if __name__ == "__main__":
    main()
