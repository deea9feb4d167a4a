"""A last Linear 64 -> 10, 50 weights, 100 particles: scoring against the leanest torch code for the same result.

The leanest code makes all logits with one matrix product, one log-softmax and one arg max. Run with
`python tests/benchmarks/head.py`.
"""

from __future__ import annotations

import torch
from bench import compare, milliseconds, ratio, recorded, show
from torch import Tensor, nn

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search._scoring.scorer import make_scorer

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""


def lean(weight: Tensor, bias: Tensor, where: Tensor, values: Tensor, x: Tensor, y: Tensor, failed: Tensor) -> Tensor:
    """Counts and mean losses of I_neg and I_pos for each candidate, `4 x P`."""
    weights = weight.flatten().repeat(len(values), 1)
    weights[:, where] = values
    logits = (x @ weights.view(-1, weight.shape[1]).t()).view(len(x), len(values), -1) + bias
    loss = -logits.log_softmax(2)[torch.arange(len(x)), :, y]
    right = logits.argmax(2) == y.unsqueeze(1)
    return torch.stack([right[failed].sum(0), right[~failed].sum(0), loss[failed].mean(0), loss[~failed].mean(0)])


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for n in (257, 4289):
        torch.manual_seed(0)
        model = nn.Linear(64, 10).eval()
        nn.init.normal_(model.weight)
        x = torch.randn(n, 64).relu()
        y = model(x).argmax(1)
        failed = torch.arange(n) < 57
        y[failed] = (y[failed] + 1) % 10
        space = find_layers(model, "")
        recording = recorded(model, space, x, y)
        where = torch.randperm(space.size)[:50]
        for name, scale in (("spread widely", 1.0), ("near the original", 0.02)):
            values = space.flat()[where] + scale * torch.randn(100, 50)
            full, counts = (
                make_scorer(recording, where, failed, ~failed, EVALUATOR, passed_loss=flag) for flag in (True, False)
            )
            weight, bias = model.weight.detach(), model.bias.detach()
            lean_s, full_s, counts_s = compare(
                [
                    lambda w=weight, b=bias, i=where, v=values, x=x, y=y, f=failed: lean(w, b, i, v, x, y, f),
                    lambda s=full, v=values: s(v.unsqueeze(0)),
                    lambda s=counts, v=values: s(v.unsqueeze(0)),
                ],
                times=21,
            )
            times = [milliseconds(s) for s in (lean_s, full_s, counts_s)]
            rows.append([str(n), name, *times, f"{ratio(full_s, lean_s):.2f}", f"{ratio(counts_s, lean_s):.2f}"])
    header = ["samples", "particles", "lean", "all", "no passed loss", "ratio, all", "ratio, no passed loss"]
    show("Last Linear 64 -> 10, 50 weights, 100 particles", header, rows)


if __name__ == "__main__":
    main()
