"""Runs one benchmark on one thread: `python tests/benchmarks/bench.py NAME [ARGUMENT ...]`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

CASES = {
    "head": ("scoring", "last layer against the leanest torch code"),
    "layers": (
        "scoring",
        "convolutions against a plain forward pass, and against `functional_call`",
    ),
    "memory": ("scoring", "peak memory of scoring"),
    "samples": ("whole_repairs", "repairs of very many samples [method samples seconds]"),
    "sweep": ("sweeps", "the paper's study by `sweep_module`; long [iterations]"),
    "history": ("history", "what `TrainingHistory` adds to an epoch"),
    "bounds": ("bounds", "how often each bound is missed"),
    "strengths": ("strengths", "how often the limit of a chosen strength is missed"),
}
"""The module that holds each, and what it measures."""


def main() -> None:
    name, *given = sys.argv[1:] or ["--help"]
    if name not in CASES:
        raise SystemExit(
            "\n".join([__doc__ or "", "", *(f"{n:12} {words}" for n, (_, words) in CASES.items())])
        )
    import_module("torch").set_num_threads(1)
    module = import_module(CASES[name][0])
    getattr(module, name)(*given)


if __name__ == "__main__":
    main()
