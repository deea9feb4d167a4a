"""Fashion-MNIST, with drift and with growth.

With drift, a view that was rare in training becomes common in operation, as in the paper's EXP-C:
2 % of the training images are upside down, and 40 % of the later images. With growth, four times as
many images of the same kind come later.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from output import Splits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist
SPLITS = {
    "train": 10_000,
    "val": 2_500,
    "repair": 5_000,
    "test": 7_500,
}  # images; splits do not overlap
UPSIDE_DOWN = {
    "train": 0.02,
    "val": 0.02,
    "repair": 0.4,
    "test": 0.4,
}  # share of upside-down images


def load_images() -> tuple[Tensor, Tensor]:
    """Reads all 70,000 images, `N x 1 x 28 x 28` uint8, and their classes from Debian's package."""
    if not DEBIAN.is_dir():
        raise SystemExit("Fashion-MNIST is not here.\nHINT: apt install dataset-fashion-mnist")
    parts = ("train", "t10k")
    images = torch.cat([_read_idx(DEBIAN / f"{part}-images-idx3-ubyte.gz", 16) for part in parts])
    labels = torch.cat([_read_idx(DEBIAN / f"{part}-labels-idx1-ubyte.gz", 8) for part in parts])
    return images.view(-1, 1, 28, 28), labels.long()


class DriftingFashion(Splits):
    """Batches of `(image, garment, upside_down)`.

    `repair_dataloader` has data collected after the training.
    """

    batch_size, drop_last = 128, True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        images, labels = load_images()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)[: sum(SPLITS.values())]
        images, labels = images[order].float() / 255, labels[order]
        share = torch.cat([torch.full((n,), UPSIDE_DOWN[split]) for split, n in SPLITS.items()])
        upside_down = torch.rand(len(images), generator=generator) < share
        images[upside_down] = images[upside_down].flip(2, 3)
        parts = zip(
            *(tensor.split(list(SPLITS.values())) for tensor in (images, labels, upside_down)),
            strict=True,
        )
        self.data = {split: TensorDataset(*part) for split, part in zip(SPLITS, parts, strict=True)}


class GrowingFashion(Splits):
    """Batches of `(image, garment)`: a fifth of the official training images, the others, the test.

    The seed decides which images the fifth has.
    """

    batch_size = 128

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        images, labels = load_images()
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat(
            [torch.randperm(60_000, generator=generator), torch.arange(60_000, 70_000)]
        )
        parts = zip(("train", "repair", "test"), order.split([12_000, 48_000, 10_000]), strict=True)
        self.data = {
            split: TensorDataset(images[rows].float() / 255, labels[rows]) for split, rows in parts
        }


class LeNet5(LightningModule):
    """LeNet-5 (LeCun et al. 1998) with ReLU and largest values for pools."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class FashionNet(LightningModule):
    """Four convolutions with batch norm and two Linear layers.

    Trained with flips, shifts and a one-cycle schedule.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, 16),
            *_convolution(16, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 3 * 3, 64),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(64, 10)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, _ = batch
        return F.cross_entropy(self(flip_and_shift(images)), labels)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-2, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def flip_and_shift(images: Tensor) -> Tensor:
    """Mirrors half of the images and shifts the batch by up to two pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    down, right = torch.randint(0, 5, (2,)).tolist()
    return F.pad(images, (2, 2, 2, 2))[..., down : down + 28, right : right + 28]


def _convolution(n_in: int, n_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()


def _read_idx(path: Path, header: int) -> Tensor:
    return torch.frombuffer(
        bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8
    )
