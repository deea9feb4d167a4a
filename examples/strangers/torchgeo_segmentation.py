"""torchgeo's SemanticSegmentationTask, as published: a dictionary with `image` and `mask`.

The module's own validation counts pixels; an image is right here if its mean IoU is 0.7 or more, which is counted again
by torchmetrics on what the module's own `predict_step` gives.
"""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset
from torchgeo.trainers import SemanticSegmentationTask
from torchmetrics.functional import jaccard_index
from uses import Project, digits, main

from lightning_nrl.tasks import Segmentation

IOU = 0.7


class Masks(Dataset):
    """Ink and paper, from a noisy picture."""

    def __init__(self, split: str) -> None:
        images, _ = digits(size=32)[split]
        self.masks = (images[:100, 0] > 0.5).long()
        noise = torch.randn(images[:100].shape, generator=torch.Generator().manual_seed(0))
        self.images = images[:100] + noise

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "mask": self.masks[index]}


def right_images(trainer: L.Trainer, module: SemanticSegmentationTask, data: dict) -> int:
    loader = data["val_dataloaders"]
    predicted = torch.cat(trainer.predict(module, loader)).argmax(1)
    pairs = zip(predicted, loader.dataset.masks, strict=True)
    return sum(float(jaccard_index(p, mask, "multiclass", num_classes=2)) >= IOU for p, mask in pairs)


def project() -> Project:
    return Project(
        package="torchgeo",
        lightning=L,
        make_module=lambda: SemanticSegmentationTask(
            model="fcn", num_filters=16, weights=None, in_channels=1, task="multiclass", num_classes=2, lr=5e-3
        ),
        make_data=lambda: (DataLoader(Masks("train"), 20, shuffle=True), DataLoader(Masks("val"), 20)),
        n_validated=100,
        epochs=8,
        options={"task": Segmentation(iou=IOU)},
        counting={"task": Segmentation(iou=IOU)},
        count=right_images,
    )


if __name__ == "__main__":
    main(__doc__, project)
