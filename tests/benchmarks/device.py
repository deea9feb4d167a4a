"""Launches and waits of repairs, by place, on the strict device; no times. `device.py swarm` counts one of them.

PYTHONPATH=tests/device:tests:. python tests/benchmarks/device.py
"""

from __future__ import annotations

import sys
from collections import Counter


def main(names: list[str]) -> None:
    import strict_cuda  # isort: skip  (before torch)
    from device_repairs import CASES, GPU, sources
    from toy_repairs import trained

    from lightning_nrl import repair_module

    print("| repair | launches | waits | of them moving batches | evaluating | elsewhere |")
    print("|---|---|---|---|---|---|")
    places: Counter[str] = Counter()
    for name in names or CASES:
        make, settings = CASES[name]
        model = trained(make).to(GPU)
        with strict_cuda.watch() as seen:
            repair_module(model, sources(GPU), settings)
        moving = sum(n for place, n in seen.waits.items() if "data/batch" in place)
        judging = sum(n for place, n in seen.waits.items() if "evaluation/evaluator" in place or " at tasks/" in place)
        rest = seen.n_waits - moving - judging
        print(f"| {name} | {seen.n_launches:,} | {seen.n_waits:,} | {moving:,} | {judging:,} | {rest:,} |", flush=True)
        places += seen.waits
    print("\nWaits by place, of all:\n")
    for place, n in places.most_common(20):
        print(f"{n:8,}  {place}")


if __name__ == "__main__":
    main(sys.argv[1:])
