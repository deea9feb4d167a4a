"""torchgeo's ClassificationTask, as published: a dictionary with `image` and `label`, of `lightning.pytorch`."""

from __future__ import annotations

import lightning.pytorch as L
from torch.utils.data import DataLoader, Dataset
from torchgeo.trainers import ClassificationTask
from uses import Project, digits, main


class Scenes(Dataset):
    def __init__(self, split: str) -> None:
        self.images, self.labels = digits(size=32)[split]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index].expand(3, -1, -1), "label": self.labels[index]}


def project() -> Project:
    return Project(
        package="torchgeo",
        lightning=L,
        make_module=lambda: ClassificationTask(model="resnet18", weights=None, in_channels=3, num_classes=10, lr=1e-3),
        make_data=lambda: (DataLoader(Scenes("train"), 32, shuffle=True), DataLoader(Scenes("val"), 50)),
        metric="val_OverallAccuracy",
    )


if __name__ == "__main__":
    main(__doc__, project)
