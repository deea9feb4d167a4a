"""torch-uncertainty's ClassificationRoutine: one network, and its own metrics."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_uncertainty.routines import ClassificationRoutine
from uses import Project, digits, main


def make_module() -> ClassificationRoutine:
    convolutions = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*convolutions, nn.Linear(512, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    return ClassificationRoutine(network, num_classes=10, loss=nn.CrossEntropyLoss(), optim_recipe=optimizer)


def project() -> Project:
    data = {split: TensorDataset(*tensors) for split, tensors in digits().items()}
    return Project(
        package="torch_uncertainty",
        lightning=L,
        make_module=make_module,
        make_data=lambda: (DataLoader(data["train"], 50, shuffle=True), DataLoader(data["val"], 50)),
        metric="val/cls/Acc",
    )


if __name__ == "__main__":
    main(__doc__, project)
