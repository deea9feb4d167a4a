"""lightly's LinearClassifier on a frozen backbone, here random convolutions."""

from __future__ import annotations

import pytorch_lightning as L
from lightly.utils.benchmarking import LinearClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from uses import Project, digits, main


def make_module() -> LinearClassifier:
    backbone = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2))
    return LinearClassifier(backbone, batch_size_per_device=50, lr=0.5, feature_dim=288, num_classes=10)


def project() -> Project:
    data = {split: TensorDataset(*tensors) for split, tensors in digits().items()}
    return Project(
        package="lightly",
        lightning=L,
        make_module=make_module,
        make_data=lambda: (DataLoader(data["train"], 50, shuffle=True), DataLoader(data["val"], 50)),
        metric="val_top1",
    )


if __name__ == "__main__":
    main(__doc__, project)
