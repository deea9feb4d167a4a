"""Scoring of token sequences in front of a last Linear, against lean code: one batched product, then `Sequence`.

3,700 sequences of 60 tokens, half of them padding, 96 -> 7, 100 weights, 20 particles; what is counted is who keeps a
margin. Run with `python tests/benchmarks/sequences.py`.
"""

from __future__ import annotations

import torch
from bench import compare, milliseconds, ratio, show
from torch import Tensor, nn

from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search._scoring.recording import record
from lightning_nrl.search._scoring.scorer import make_scorer
from lightning_nrl.tasks import Sequence

N, TOKENS, CLASSES = 3_700, 60, 7


def lean(model: nn.Linear, where: Tensor, values: Tensor, x: Tensor, y: Tensor, reserve: Tensor) -> Tensor:
    """How many sequences keep their margin under each candidate."""
    task, kept = Sequence(), []
    for value in values:
        weights = torch.cat([model.weight.flatten(), model.bias]).index_put((where,), value)
        weight, bias = weights.split([model.weight.numel(), CLASSES])
        logits = torch.nn.functional.linear(x, weight.view_as(model.weight), bias)
        kept.append((task.passed(logits, y) & (task.margin(logits, y) >= reserve)).sum())
    return torch.stack(kept)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, task = nn.Linear(96, CLASSES).eval(), Sequence()
    x = torch.randn(N, TOKENS, 96)
    y = model(x).argmax(2)
    y[torch.arange(TOKENS) >= torch.randint(8, TOKENS, (N, 1))] = -100
    reserve = task.margin(model(x), y).clamp_max(0.01) / 2
    evaluator, everyone, space = Evaluator(model, task), torch.ones(N, dtype=torch.bool), find_layers(model, "")
    batches = [(Batch((x[r],), y[r], r), r) for r in torch.arange(N).split(100)]
    recording = record(evaluator, batches, space, everyone)
    where = torch.randperm(space.size)[:100]
    scorer = make_scorer(recording, where, ~everyone, everyone, evaluator, passed_loss=False, reserve=reserve)
    rows = []
    for name, scale in (("spread widely", 0.02), ("near the original", 0.002)):
        values = space.flat()[where] + scale * torch.randn(20, 100)
        lean_s, ours_s = compare(
            [lambda v=values: lean(model, where, v, x, y, reserve), lambda v=values: scorer(v[None])], times=5
        )
        rows.append([name, milliseconds(lean_s), milliseconds(ours_s), f"{ratio(ours_s, lean_s):.2f}"])
    show("3,700 sequences of 60 tokens, 20 particles", ["particles", "lean", "scoring", "ratio"], rows)


if __name__ == "__main__":
    main()
