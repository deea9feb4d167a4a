"""A timm network in a plain module, and a data set that augments at random by torchvision's `transforms`."""

from __future__ import annotations

import pytorch_lightning as L
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Accuracy
from torchvision.transforms import v2
from uses import Project, digits, main


class Timm(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("resnet10t", pretrained=False, num_classes=10, in_chans=1)
        self.accuracy = Accuracy(task="multiclass", num_classes=10)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels, label_smoothing=0.1)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Images(Dataset):
    def __init__(self, split: str, transform: v2.Transform | None = None) -> None:
        self.images, self.labels = digits(size=16)[split]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.labels[index]


def project() -> Project:
    augment = v2.Compose([v2.RandomCrop(16, padding=2), v2.RandomRotation(10)])
    return Project(
        package="timm",
        lightning=L,
        make_module=Timm,
        make_data=lambda: (DataLoader(Images("train", augment), 50, shuffle=True), DataLoader(Images("val"), 50)),
        epochs=8,
    )


if __name__ == "__main__":
    main(__doc__, project)
