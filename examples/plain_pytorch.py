"""Repairs a plain PyTorch module without Lightning's Trainer. A few seconds on two cores.

    python examples/plain_pytorch.py

A network learns scikit-learn's handwritten digits. Then the scanner gets a scratch: a bright line
down the right side of half of the new images. The network fails on many of them. The repair fixes
them and breaks no known image.
"""

from __future__ import annotations

import torch
from output import start, summary
from rich import print
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl import Settings, Target, TensorSource, repair_module

SIZES = (800, 400, 597)  # training images, new images, and later images that are only counted


def load() -> tuple[Tensor, Tensor, Tensor]:
    """Returns images `N x 64`, digits `N` and a mask of scratched images, `N`.

    No training image is scratched.
    """
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.images), generator=generator)
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    scratched = torch.rand(len(images), generator=generator) < 0.5
    scratched[: SIZES[0]] = False
    images[scratched, :, 6] = 1.0
    return images.flatten(1), torch.tensor(digits.target)[order], scratched


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


def is_scratched(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    _image, _digit, scratched = batch
    return scratched


if __name__ == "__main__":
    fast = start(__doc__).fast
    torch.manual_seed(0)
    (x_train, x_new, x_later), (y_train, y_new, y_later), (_, marks_new, marks_later) = (
        x.split(SIZES) for x in load()
    )
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    train(model, x_train, y_train, epochs=10 if fast else 40)

    outcome = repair_module(
        model,
        known=[
            TensorSource(x_train, y_train, split="train", passed=True),
            TensorSource(x_new, y_new, extras=(marks_new,), split="new", failed=True),
        ],
        settings=Settings(target=Target.where(is_scratched)),
        unseen=[TensorSource(x_later, y_later, extras=(marks_later,), split="later")],
    )
    print(summary(repair=outcome.report))  # print(outcome.report) prints everything
    if outcome.write(model):  # the model changes only here
        accuracy = (model(x_later).argmax(1) == y_later).float().mean()
        print(f"The model holds the repaired weights: {accuracy:.2%} right on the later images.")
