"""Memory of repairs of large models. Run with `python tests/benchmarks/large.py [NAME ...]`.

Each row is a process of its own, so that its peak is its own: of all memory that the process ever held (`ru_maxrss`),
less what it held when model and data were there. Needs torchvision and transformers; weights are random, the samples
nearest to another class are labelled as that. Some budgets are small on purpose.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench import show
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.methods import LocalSearch
from lightning_nrl.pipeline import SearchOptions, Settings, repair_module
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.search._scoring.recording import record

MIB = 2**20
SWARM = LocalSearch(ParticleSwarm(particles=20, iterations=5))


@dataclass(frozen=True)
class Case:
    """A model, data, and how much memory its search may use."""

    model: Callable[[], nn.Module]
    inputs: Callable[[Tensor], Tensor]  # of samples by their number
    layers: tuple[str, ...]
    n: int
    batch_size: int
    budget: int | None = None  # MiB; None: as by default
    method: Any = SWARM


@dataclass(frozen=True)
class Generated:
    """Samples that are made when they are read, so that data take no memory."""

    case: Case
    label: Tensor
    split: str = "train"
    passed: bool = True
    failed: bool = True

    @property
    def index(self) -> Tensor:
        return torch.arange(len(self.label))

    @property
    def positions(self) -> Tensor:
        return self.index

    def __iter__(self) -> Iterator[Batch]:
        return self.draw(self.index.split(self.case.batch_size))

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for position in batches:
            yield Batch((self.case.inputs(position),), self.label[position], position)


def images(pixels: int) -> Callable[[Tensor], Tensor]:
    """Smooth noise."""

    def make(number: Tensor) -> Tensor:
        small = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(i))) for i in number]
        return F.interpolate(torch.stack(small), size=pixels, mode="bilinear")

    return make


def tokens(number: Tensor) -> Tensor:
    return torch.stack([torch.randint(5, 1000, (64,), generator=torch.Generator().manual_seed(int(i))) for i in number])


def vision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        model: nn.Module = getattr(torchvision.models, name)(weights=None)
        if name.startswith("vit"):
            nn.init.normal_(model.heads.head.weight, std=0.05)  # zeros by default
        return model

    return make


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        size = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
        self.bert = BertForSequenceClassification(BertConfig(vocab_size=1000, num_labels=10, **size))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.bert(input_ids=ids).logits
        return logits


RESNET, VIT = ("layer4.2.conv3", "fc"), ("encoder.layers.encoder_layer_11.mlp.3", "heads.head")
BERT = ("bert.bert.encoder.layer.3.output.dense", "bert.classifier")
CASES = {
    "resnet50 64 px, fits": Case(vision("resnet50"), images(64), RESNET, 256, 32, 256),
    "resnet50 64 px, again": Case(vision("resnet50"), images(64), RESNET, 256, 32, 8),
    "resnet50 64 px, head": Case(vision("resnet50"), images(64), ("fc",), 256, 32, 256, method="convex"),
    "resnet50 224 px, again": Case(vision("resnet50"), images(224), RESNET, 16, 4, 6),
    "vit_b_16 224 px, again": Case(vision("vit_b_16"), images(224), VIT, 8, 2, 8),
    "bert 256 x 4, fits": Case(Bert, tokens, BERT, 400, 50, 512),
    "bert 256 x 4, again": Case(Bert, tokens, BERT, 400, 50, 32),
}


def labelled(case: Case, model: nn.Module) -> tuple[Generated, float]:
    """Each sample has the class that the model gives it, up to 16 of the nearest the next; and seconds for one pass."""
    source = Generated(case, torch.zeros(case.n, dtype=torch.int64))
    began = time.perf_counter()
    with torch.no_grad():
        best = [model(*batch.args).topk(2) for batch in source]
    seconds = time.perf_counter() - began
    margin, (first, second) = (
        torch.cat([b.values.diff(dim=1).abs()[:, 0] for b in best]),
        torch.cat([b.indices for b in best]).T,
    )
    near = margin.argsort()[: min(16, case.n // 4)]
    label = first.clone()
    label[near] = second[near]
    return Generated(case, label), seconds


def measured(name: str) -> list[str]:
    """One row of the table."""
    case = CASES[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = case.model().eval()
    source, seconds = labelled(case, model)
    few = next(source.draw([torch.arange(2)]))
    sample = record(Evaluator(model), [(few, few.position)], find_layers(model, case.layers), torch.ones(2).bool())
    per_sample = sum(group.nbytes for group in sample.groups) // 2
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    budget = None if case.budget is None else case.budget * MIB
    layer = case.layers if len(case.layers) > 1 else case.layers[0]
    search = SearchOptions(budget=budget)
    settings = Settings(layer=layer, method=case.method, search=search, max_time=500)
    report = repair_module(model, [source], settings).report
    whole = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = report.steps[-1].note.partition("activations of ")[2] if report.steps else "-"
    spent = report.seconds
    counts = f"{report.splits[0].repaired} : {report.splits[0].broken}"
    return [
        name,
        f"{case.n:,}",
        "default" if case.budget is None else f"{case.budget} MiB",
        f"{per_sample / 1000:,.1f} kB",
        kept or "in memory",
        f"{seconds:.1f} s",
        f"{spent.get('localize', 0):.1f} s",
        f"{spent.get('search', 0) + spent.get('solve', 0):.1f} s",
        f"{whole:.1f} s",
        f"{base / 1024:,.0f} + {(peak - base) / 1024:,.0f} MiB",
        counts,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"cases whose names begin so: {list(CASES)}")
    parser.add_argument("--one", action="store_true", help="measure one case in this process, print JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.names[0])))
        return
    rows = []
    for name in CASES:
        if given.names and not name.startswith(tuple(given.names)):
            continue
        done = subprocess.run([sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    columns = ["model", "samples", "budget", "a sample", "activations", "one pass", "record and localise", "search"]
    show("Large models and data", [*columns, "in all", "peak memory", "repaired : broken"], rows)


if __name__ == "__main__":
    main()
