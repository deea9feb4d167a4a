"""Repairs that are tried on a device: methods, layers, tasks, each a second on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from toy_repairs import known, mlp, quick

from lightning_nrl import BoundOptions, ParticleSwarm, Settings, TensorSource
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.methods import Auto, Convex, FineTunePolish, LocalSearch, Polish
from lightning_nrl.pipeline import Outcome
from lightning_nrl.published import BUNDLES, bundle
from lightning_nrl.tasks import Multilabel, NamedHead, Regression, Segmentation, Sequence

GPU = torch.device("cuda")
QUICK_SWARM = ParticleSwarm(particles=8, iterations=20, patience=1000)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.second, self.head = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x[:, None])))
        return self.head((x + torch.relu(self.second(x))).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x[..., None])).mean(1))


def swarm(**rest: Any) -> Settings:
    return quick(**{"method": QUICK_SWARM, **rest})


def _published(name: str) -> LocalSearch:
    method = bundle(name)
    return replace(method, searcher=replace(method.searcher, iterations=12))


METHODS = {
    "auto": Settings(method=Auto(swarm=ParticleSwarm(particles=20, iterations=15))),
    "finetune-polish": Settings(method=FineTunePolish()),
    "convex": Settings(method=Convex()),
    **{name: Settings(method=_published(name)) for name in BUNDLES if name != "neurecover"},
}
CASES = {
    **{name: (mlp, settings) for name, settings in METHODS.items()},
    "swarm": (mlp, swarm()),
    "swarm with weights": (mlp, swarm(importance="focal")),
    "swarm with protected samples": (mlp, swarm(protected=lambda batch: batch[0][:, 0] > 1.5)),
    "swarm, convolution": (Conv, swarm(layer="first")),
    "swarm, two layers": (Conv, swarm(layer=["second", "head"])),
    "swarm, attention": (Attention, swarm(layer="block.linear1")),
    "swarm, a small budget": (
        Conv,
        swarm(layer="first", memory_limit=300_000, method=ParticleSwarm(particles=6, iterations=5)),
    ),
}
LONG_CASES = {
    "auto as it is": (mlp, Settings()),
    "polish": (mlp, Settings(method=Polish())),
    "sparse": (mlp, Settings(method=Convex(), bounds=BoundOptions(sparse=0.2))),
}
"""Half a minute each on the stand-in."""


def sources(device: torch.device | str | None = None, n: int = 90) -> list[TensorSource]:
    """Blobs in the plane on the CPU, each batch moved to the device, as a Trainer does."""
    return [replace(source, device=device) for source in known(n=n)]


def counted(outcome: Outcome) -> tuple[Any, ...]:
    """What a repair decided, without times."""
    report = outcome.report
    return report.status, [
        (s.split, s.kept, s.broken, s.repaired, s.failing) for s in report.splits
    ]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.other, self.classes = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.body(x))
        return {"classes": self.classes(x), "other": self.other(x)}


def _net(last: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, last))


def _pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))


TASKS = {
    "multilabel": (lambda: _net(3), Multilabel(), (6,), lambda o: (o > 0).float()),
    "regression": (
        lambda: nn.Sequential(_net(1), nn.Flatten(0)),
        Regression(0.2),
        (6,),
        lambda o: o,
    ),
    "segmentation": (_pixels, Segmentation(0.8), (1, 5, 5), lambda o: o.argmax(1)),
    "sequence": (lambda: _net(3), Sequence(), (4, 6), lambda o: o.argmax(-1)),
    "named head": (Named, NamedHead("classes"), (6,), lambda o: o["classes"].argmax(1)),
}
"""A network, its task, the shape of a sample, and the truth of which its output is sure."""


def untrained(name: str, device: torch.device) -> tuple[Evaluator, list[TensorSource]]:
    """A network that is right about its own answers, some inputs of which have been moved since."""
    make, task, shape, truth = TASKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = make().eval(), torch.randn(90, *shape)
    with torch.no_grad():
        y = truth(model(x))
    x[60:] += 0.4 * torch.randn(30, *shape, generator=torch.Generator().manual_seed(1))
    data = TensorSource(x, y, split="all", passed=True, failed=True, batch_size=40, device=device)
    return Evaluator(model.to(device), task), [data]
