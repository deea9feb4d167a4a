"""Peak memory of scoring for more and more particles under one budget. Run with `python tests/benchmarks/memory.py`.

The peak is that of all tensors made during one call, weighed as they are made and freed; what a scorer keeps from call
to call is added.
"""

from __future__ import annotations

import torch
from bench import ResNet27, recorded, show
from torch import nn

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search._scoring.memory import measure_allocations
from lightning_nrl.search._scoring.scorer import make_scorer

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNet27().eval()
    x, y = torch.randn(12, 3, 32, 32), torch.randint(0, 7, (12,))
    failed = torch.arange(12) % 5 == 0
    rows = []
    for layer in ("head", "stages.2.3.conv2", "stages.2.0.conv1"):
        space = find_layers(model, layer)
        recording = recorded(model, space, x, y)
        where = torch.randperm(space.size)[:300]
        for budget in (8 << 20, 64 << 20):
            peaks = []
            for p in (100, 400, 1600):
                values = (space.flat()[where] + 0.1 * torch.randn(p, len(where))).unsqueeze(0)
                scorer = make_scorer(recording, where, failed, ~failed, EVALUATOR, budget=budget)
                kept = sum(part.nbytes for part in (*scorer.groups[0].failed, *scorer.groups[0].passed))
                peaks.append(kept + measure_allocations(lambda s=scorer, v=values: s(v))[0])
            row = [f"{peak / 2**20:.1f} MiB" for peak in peaks]
            rows.append([layer, f"{budget >> 20} MiB", *row, f"{max(peaks) / budget:.2f}"])
    show("Peak memory", ["layer", "budget", "P = 100", "P = 400", "P = 1,600", "peak / budget"], rows)


if __name__ == "__main__":
    main()
