"""A Hugging Face ViT with new weights, in a module as Lightning's and Hugging Face's documentation write it."""

from __future__ import annotations

import pytorch_lightning as L
import torch
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Accuracy
from transformers import ViTConfig, ViTForImageClassification
from uses import Project, digits, main


class ViT(L.LightningModule):
    def __init__(self, num_labels: int = 10) -> None:
        super().__init__()
        size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        config = ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=num_labels, **size)
        self.vit = ViTForImageClassification(config)
        self.accuracy = Accuracy(task="multiclass", num_classes=num_labels)

    def forward(self, pixel_values, labels=None):
        return self.vit(pixel_values=pixel_values, labels=labels)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def validation_step(self, batch, batch_idx):
        outputs = self(**batch)
        self.accuracy(outputs.logits, batch["labels"])
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Images(Dataset):
    def __init__(self, split: str) -> None:
        self.images, self.labels = digits(size=16)[split]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def project() -> Project:
    return Project(
        package="transformers",
        lightning=L,
        make_module=ViT,
        make_data=lambda: (DataLoader(Images("train"), 50, shuffle=True), DataLoader(Images("val"), 50)),
        epochs=8,
    )


if __name__ == "__main__":
    main(__doc__, project)
