"""Scoring of candidates: time against lean code and plain passes, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from measure import EVALUATOR, ResNet27, compare, milliseconds, ratio, recorded, show
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search import Fitness
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.memory import peak_allocation
from lightning_nrl.search.scoring.scorer import make_scorer
from lightning_nrl.search.scoring.traced_model import with_cached_outputs


def head() -> None:
    """A last Linear 64 -> 10, 50 weights, 100 particles.

    The leanest code makes all logits with one matrix product, one log-softmax and one arg max.
    """

    def lean(values: Tensor) -> Tensor:
        """Counts and mean losses of I_neg and I_pos for each candidate, `4 x P`."""
        weights = weight.flatten().repeat(len(values), 1)
        weights[:, where] = values
        logits = (x @ weights.view(-1, weight.shape[1]).t()).view(len(x), len(values), -1) + bias
        loss = -logits.log_softmax(2)[torch.arange(len(x)), :, y]
        right = logits.argmax(2) == y.unsqueeze(1)
        return torch.stack(
            [
                right[failed].sum(0),
                right[~failed].sum(0),
                loss[failed].mean(0),
                loss[~failed].mean(0),
            ]
        )

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
        weight, bias = model.weight.detach(), model.bias.detach()
        full, counts = (
            make_scorer(recording, where, failed, ~failed, EVALUATOR, fitness=fitness)
            for fitness in (Fitness(), Fitness("eq2"))
        )
        for name, scale in (("spread widely", 1.0), ("near the original", 0.02)):
            values = space.flat()[where] + scale * torch.randn(100, 50)
            ways = (lean, lambda v, s=full: s(v), lambda v, s=counts: s(v))
            lean_s, full_s, counts_s = compare(
                [lambda w=way, v=values: w(v) for way in ways], times=21
            )
            times = [milliseconds(s) for s in (lean_s, full_s, counts_s)]
            rows.append(
                [
                    str(n),
                    name,
                    *times,
                    f"{ratio(full_s, lean_s):.2f}",
                    f"{ratio(counts_s, lean_s):.2f}",
                ]
            )
    header = [
        "samples",
        "particles",
        "lean",
        "all",
        "no passed loss",
        "ratio, all",
        "ratio, no passed loss",
    ]
    show("Last Linear 64 -> 10, 50 weights, 100 particles", header, rows)


def layers() -> None:
    """Convolutions of a 27-convolution residual network, 300 weights, 100 particles, 32 x 32
    pixels.

    Fewer samples where a run takes long, which changes no ratio: blocks stay the same.
    """
    n_particles, n_weights, rows = 100, 300, []
    torch.manual_seed(0)
    model = ResNet27().eval()
    for name, layer, n in (
        ("last block, second", "stages.2.3.conv2", 500),
        ("last stage, first block", "stages.2.0.conv1", 60),
        ("middle of the network", "stages.1.1.conv1", 30),
    ):
        x, y = torch.randn(n, 3, 32, 32), torch.randint(0, 7, (n,))
        failed = torch.arange(n) % 5 == 0
        space = find_layers(model, layer)
        recording = recorded(model, space, x, y)
        kernel = space.sites[0].weight_shape[1:].numel()
        sizes = (50, 100, 200, 400, 800)
        best = min(
            sizes,
            key=lambda r: statistics.median(floor(recording, r, n_particles)() for _ in range(5)),
        )
        run_floor = floor(recording, best, n_particles)
        for kind, where in (
            ("all channels", torch.randperm(space.size)[:n_weights]),
            ("few channels", torch.arange(n_weights) + kernel),
        ):
            values = space.flat()[where] + 0.1 * torch.randn(n_particles, n_weights)
            scorer = make_scorer(recording, where, failed, ~failed, EVALUATOR)
            floors, ours, wholes = [], [], []
            scorer(values[:5])
            for _ in range(5):
                floors.append(statistics.median(run_floor() for _ in range(5)) * n)
                began = time.process_time()
                scorer(values)
                ours.append(time.process_time() - began)
                began = time.process_time()
                with torch.no_grad():
                    functional_call(model, space.changed(where, values[0]), (x[:30],))
                wholes.append((time.process_time() - began) * n_particles * n / 30)
            units = len(scorer.passed[0].data.deltas[0].units)
            times = [milliseconds(s) for s in (floors, ours, wholes)]
            ratios = f"{ratio(ours, floors):.2f}", f"{ratio(wholes, ours):.0f} x"
            rows.append([f"{name}, {kind} ({units})", str(n), *times, *ratios])
    columns = [
        "convolution",
        "samples",
        "floor",
        "scoring",
        "functional_call, whole",
        "scoring / floor",
    ]
    show("27 convolutions, 300 weights, 100 particles", [*columns, "faster than whole"], rows)


def floor(recording: ActivationCache, rows: int, particles: int) -> Callable[[], float]:
    """Seconds for all particles on one sample, from one block of `rows`: the least that exact
    scoring
    needs.

    One copy of the layer's output per candidate and sample, then a plain forward of what comes
    after it; what else that needs is copied outside the clock.
    """
    group = recording.groups[0]
    plan = group.plan
    copies = min(particles, rows)
    n = max(1, rows // copies)
    stored = group.take(slice(0, n), torch.device("cpu"))
    source, made = iter(stored), []
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
            return (time.process_time() - began) * particles / (n * copies)

    return run


def memory() -> None:
    """Peak memory of scoring for more and more particles under one budget.

    The peak is that of all tensors made during one call; what a scorer keeps from call to call is
    added.
    """
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
                values = space.flat()[where] + 0.1 * torch.randn(p, len(where))
                scorer = make_scorer(recording, where, failed, ~failed, EVALUATOR, budget=budget)
                kept = sum(part.nbytes for part in (*scorer.failed, *scorer.passed))
                peaks.append(kept + peak_allocation(lambda s=scorer, v=values: s(v)))
            row = [f"{peak / 2**20:.1f} MiB" for peak in peaks]
            rows.append([layer, f"{budget >> 20} MiB", *row, f"{max(peaks) / budget:.2f}"])
    show(
        "Peak memory", ["layer", "budget", "P = 100", "P = 400", "P = 1,600", "peak / budget"], rows
    )
