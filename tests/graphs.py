"""Batches of graphs as in torch_geometric, without it, and a module that classifies them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Graphs:
    """The nodes of several graphs, one after the other; `batch` says whose each is. It cannot be
    cut.
    """

    def __init__(self, x: Tensor, batch: Tensor, y: Tensor) -> None:
        self.x, self.batch, self.y = x, batch, y

    @property
    def num_nodes(self) -> int:
        return len(self.x)

    def keys(self) -> list[str]:
        return ["x", "batch", "y"]

    def __getitem__(self, key: str) -> Tensor:
        return {"x": self.x, "batch": self.batch, "y": self.y}[key]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Graphs:
        return Graphs(self.x.to(device), self.batch.to(device), self.y.to(device))

    def clone(self) -> Graphs:
        return Graphs(self.x.clone(), self.batch.clone(), self.y.clone())


class GraphData(Dataset):
    """Graphs of 2 to 5 nodes of three classes, some of them hard to tell."""

    def __init__(self, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.y = torch.randint(0, 3, (n,), generator=g)
        self.x = [
            torch.randn(int(torch.randint(2, 6, (1,), generator=g)), 4, generator=g)
            + 0.8 * nn.functional.one_hot(y, 4)
            for y in self.y
        ]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> Graphs:
    batch = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(x) for x, _ in samples]))
    return Graphs(torch.cat([x for x, _ in samples]), batch, torch.stack([y for _, y in samples]))


def graph_loader(n: int, seed: int, batch_size: int = 16) -> DataLoader:
    return DataLoader(GraphData(n, seed), batch_size, collate_fn=collate)


class GraphNet(nn.Module):
    """Nodes, their mean, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.graph, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, data: Graphs) -> Tensor:
        return self.pooled(data.x, data.batch)

    def pooled(self, x: Tensor, batch: Tensor) -> Tensor:
        nodes = self.node(x).relu()
        sums = nodes.new_zeros(int(batch.max()) + 1, 8).index_add(0, batch, nodes)
        return self.head(self.graph(sums / torch.bincount(batch)[:, None]).relu())
