"""A whole search with and without giving up candidates that break too many, on a trained network.

A small convolutional network learns scikit-learn's digits, then meets noise. Both searches find the same repair; the
ratio is of processor time. Run with `python tests/benchmarks/search.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from bench import compare, milliseconds, ratio, recorded, show
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search import ParticleSwarm, SearchResult, WeightStats, search
from lightning_nrl.search._scoring.scorer import make_scorer

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(20):
        for part in torch.randperm(300).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval()


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def main() -> None:
    torch.set_num_threads(1)
    model = trained()
    x, y = (t[:500].clone() for t in digits())
    x[300:] += 0.4 * torch.randn(x[300:].shape)
    with torch.no_grad():
        loss = F.cross_entropy(model(x), y, reduction="none")
        right = model(x).argmax(1) == y
    failed = ~right & (torch.arange(len(x)) >= 300)
    rows = []
    for layer in ("5", "2"):
        space = find_layers(model, layer)
        recording = recorded(model, space, x, y)
        where = torch.randperm(space.size)[:64].sort().values
        scorer = make_scorer(recording, where, failed, right, EVALUATOR, fragility=loss)

        def run(gives_up: bool, scorer=scorer, space=space, where=where) -> SearchResult:  # type: ignore[no-untyped-def]
            return search(
                replace(scorer, gives_up=gives_up),
                space.flat()[where],
                WeightStats.around(space, where),
                searcher=ParticleSwarm(iterations=100),
            )

        quitting, finishing = run(True), run(False)
        finish_s, quit_s = compare([lambda r=run: r(False), lambda r=run: r(True)], times=5)
        found = [f"{int(r.history.patched[-1])} of {int(failed.sum())}" for r in (finishing, quitting)]
        name = f"{layer}: {type(space.sites[0].module).__name__}"
        rows.append([name, milliseconds(finish_s), milliseconds(quit_s), f"{ratio(quit_s, finish_s):.2f}", *found])
    header = ["layer", "all finished", "giving up", "ratio", "repaired, all finished", "repaired, giving up"]
    show(f"100 iterations of 100 particles, {int(right.sum())} passed samples", header, rows)


if __name__ == "__main__":
    main()
