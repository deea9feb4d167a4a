"""Repairs a network of timm, whole: convolutions and batch norms too. Then it is timm's again.

    python -m pip install timm
    python examples/timm_model.py

A small ResNet of timm learns handwritten digits (scikit-learn), from new weights: nothing is downloaded. Then come
people who write with a pale pen, and the network misreads most of their digits.
"""

from __future__ import annotations

import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from output import start, summary
from rich import print
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import RegressionFreeRepair, Target


class Digits(LightningModule):
    """A timm network, and what Lightning needs to train it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("test_resnet", pretrained=False, num_classes=10, in_chans=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, _pale = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def digits(first: int, last: int, share: float) -> TensorDataset:
    """Samples `(image, digit, pale)`, of which a share is pale; images are 32 x 32."""
    data = load_digits()
    images = torch.tensor(data.images[first:last], dtype=torch.float32).unsqueeze(1) / 16
    pale = torch.rand(len(images), generator=torch.Generator().manual_seed(first)) < share
    images[pale] *= 0.3
    return TensorDataset(F.interpolate(images, scale_factor=4), torch.tensor(data.target[first:last]), pale)


def is_pale(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return batch[2]


if __name__ == "__main__":
    fast = start(__doc__).fast
    seed_everything(0, verbose=False)
    model = Digits()
    repair = RegressionFreeRepair(
        target=Target.where(is_pale),
        unseen=DataLoader(digits(900, 1797, share=0.4), 200),
        max_time=3 if fast else None,
        verbose=False,
    )
    trainer = Trainer(
        max_epochs=1 if fast else 3,
        accelerator="cpu",
        callbacks=[repair],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    known, later = digits(0, 600, share=0.0), digits(600, 900, share=0.4)
    trainer.fit(model, DataLoader(known, 32, shuffle=True), DataLoader(later, 200))  # failures come from validation
    print(summary(repair=repair.report))

    own = timm.create_model("test_resnet", pretrained=False, num_classes=10, in_chans=1)
    own.load_state_dict(model.network.state_dict())  # the repaired weights, in a plain timm model
    torch.save(own.state_dict(), "repaired_resnet.pt")
    print("The weights, for timm alone: repaired_resnet.pt")
