"""Convolutions of a 27-convolution residual network: scoring against the floor, and against `functional_call`.

300 weights, 100 particles, 32 x 32 pixels. The floor is one copy of the layer's output per candidate and
sample, then a plain forward of what comes after it at its best batch size; what else that needs is copied outside the
clock. Run with `python tests/benchmarks/layers.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from bench import ResNet27, milliseconds, ratio, recorded, show
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search._scoring.activation_cache import ActivationCache
from lightning_nrl.search._scoring.scorer import make_scorer
from lightning_nrl.search._scoring.traced_model import with_cached_outputs

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

P, K = 100, 300
LAYERS = {
    "last block, second": ("stages.2.3.conv2", 500),
    "last stage, first block": ("stages.2.0.conv1", 60),
    "middle of the network": ("stages.1.1.conv1", 30),
}
"""Layers and numbers of samples; fewer where a run takes long, which changes no ratio: blocks stay the same."""


def floor(recording: ActivationCache, rows: int) -> Callable[[], float]:
    """Seconds for 100 particles on one sample, from one block of `rows`."""
    group = recording.groups[0]
    plan = group.plan
    assert plan is not None
    copies = min(P, rows)
    n = max(1, rows // copies)
    stored = group.take(slice(0, n), torch.device("cpu"))
    source = iter(stored)
    made = []
    for leaf in plan.leaves:
        if leaf.layout is None:
            made.append(leaf.value)
        elif not leaf.repeats:
            made.append(next(source))
        elif leaf.live:
            made.append(next(source).repeat(copies, *[1] * (leaf.value.ndim - 1)))
        else:
            made.append(leaf.layout.expand(leaf.value, n * copies))
    (args, kwargs), outputs, (_, y) = pytree.tree_unflatten(made, plan.spec)

    @torch.no_grad()
    def run() -> float:
        again = with_cached_outputs(
            plan.calls, plan.modules, outputs, plan.first.module, lambda: y.repeat(copies, 1, 1, 1)
        )
        with again:
            began = time.process_time()
            recording.model.model(*args, **kwargs)
            return (time.process_time() - began) * P / (n * copies)

    return run


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNet27().eval()
    rows = []
    for name, (layer, n) in LAYERS.items():
        x, y = torch.randn(n, 3, 32, 32), torch.randint(0, 7, (n,))
        failed = torch.arange(n) % 5 == 0
        space = find_layers(model, layer)
        recording = recorded(model, space, x, y)
        kernel = space.sites[0].weight_shape[1:].numel()
        best = min((50, 100, 200, 400, 800), key=lambda r: statistics.median(floor(recording, r)() for _ in range(5)))
        run_floor = floor(recording, best)
        for kind, where in (
            ("all channels", torch.randperm(space.size)[:K]),
            ("few channels", torch.arange(K) + kernel),
        ):
            values = space.flat()[where] + 0.1 * torch.randn(P, K)
            scorer = make_scorer(recording, where, failed, ~failed, EVALUATOR)
            floors, ours, wholes = [], [], []
            scorer(values[:5].unsqueeze(0))
            for _ in range(5):
                floors.append(statistics.median(run_floor() for _ in range(5)) * n)
                began = time.process_time()
                scorer(values.unsqueeze(0))
                ours.append(time.process_time() - began)
                began = time.process_time()
                with torch.no_grad():
                    functional_call(model, space.changed(where, values[0]), (x[:30],))
                wholes.append((time.process_time() - began) * P * n / 30)
            units = len(scorer.groups[0].passed[0].deltas[0].units)
            rows.append(
                [
                    f"{name}, {kind} ({units})",
                    str(n),
                    *(milliseconds(s) for s in (floors, ours, wholes)),
                    f"{ratio(ours, floors):.2f}",
                    f"{ratio(wholes, ours):.0f} x",
                ]
            )
    header = [
        "convolution",
        "samples",
        "floor",
        "scoring",
        "functional_call, whole",
        "scoring / floor",
        "faster than whole",
    ]
    show(f"27 convolutions, {K} weights, {P} particles", header, rows)


if __name__ == "__main__":
    main()
