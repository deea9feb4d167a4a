"""Results by hand: which samples passed, and what else is to be said of them."""

from __future__ import annotations

from typing import Any

import torch

from lightning_nrl.evaluation import SampleResults


def sample_table(
    passed: list[bool], sizes: dict[str, int] | None = None, **columns: Any
) -> SampleResults:
    """One row a sample, half of them of the split `train` and half of `new` unless sizes say
    otherwise.
    """
    n, ok = len(passed), torch.tensor(passed, dtype=torch.bool)
    sizes = sizes or {"train": n // 2, "new": n - n // 2}
    given = {
        "splits": tuple(sizes),
        "sizes": tuple(sizes.values()),
        "index": torch.cat([torch.arange(size) for size in sizes.values()]),
        "label": torch.zeros(n, dtype=torch.int64),
        "prediction": (~ok).long(),
        "loss": torch.zeros(n),
        "passed": ok,
        "targeted": torch.zeros_like(ok),
        "margin": torch.zeros(n),
    }
    return SampleResults(**{**given, **columns})
