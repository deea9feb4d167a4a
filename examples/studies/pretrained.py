"""A network with weights from an earlier task for `defaults.py --pretrained`.

*Garments, upside down*: a ResNet with 0.2 million parameters first learned to tell by how much a
garment is rotated. Fine-tuned on 1,500 labels, it classifies the garments of Fashion-MNIST, of
which 40 % are upside down in later data.
"""

from __future__ import annotations

from functools import partial

import torch
from default_problems import Classifier, Small, one_cycle
from fashion_mnist import load_images
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from new_problems import Residual, convolution
from problems import RUNS, Problem, State, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import Target

SIZES = (1_500, 1_500, 1_500)
ROTATED, ROTATION_EPOCHS = 10_000, 4
"""Unlabelled images of the earlier task, and its epochs."""


def garments(seed: int) -> Small:
    """Loads Fashion-MNIST; 2 % of the training images are upside down, 40 % of the later ones."""
    images, labels = load_images()
    generator = torch.Generator().manual_seed(seed)
    order = ROTATED + torch.randperm(len(images) - ROTATED, generator=generator)[: sum(SIZES)]
    images, labels = images[order].float() / 255, labels[order]
    share = torch.full((len(images),), 0.4)
    share[: SIZES[0]] = 0.02
    upside_down = torch.rand(len(images), generator=generator) < share
    images[upside_down] = images[upside_down].flip(2, 3)
    return Small(images, labels, SIZES)


def residual_net(n_out: int) -> nn.Module:
    network = nn.Sequential(
        *(*convolution(1, 16), Residual(16), Residual(16)),
        *(*convolution(16, 32, 2), Residual(32), Residual(32)),
        *(*convolution(32, 64, 2), Residual(64), Residual(64)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_out)),
    )
    return network.to(memory_format=torch.channels_last)  # faster on a CPU


def rotation_weights() -> State:
    """Returns the body of a network that tells four rotations apart, trained once."""
    path = RUNS / "rotations.pt"
    if not path.exists():
        seed_everything(0, verbose=False)
        images = load_images()[0][:ROTATED].float() / 255
        turns = torch.randint(4, (ROTATED,))
        turned = torch.stack(
            [image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)]
        )
        model = Classifier(residual_net(4), partial(torch.optim.AdamW, lr=2e-3), one_cycle)
        batches = DataLoader(TensorDataset(turned, turns), 128, shuffle=True)
        quiet_trainer(ROTATION_EPOCHS, accelerator="cpu").fit(model, batches)
        RUNS.mkdir(exist_ok=True)
        body = list(model.network.state_dict().items())[:-2]
        torch.save(dict(body), path)
    return torch.load(path, weights_only=True)


def garment_net() -> Classifier:
    """A ResNet from an earlier task; AdamW with a one-cycle schedule up to 1e-3."""
    network = residual_net(10)
    with isolate_rng():
        network.load_state_dict(rotation_weights(), strict=False)
    return Classifier(network, partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-2), one_cycle)


PRETRAINED = {
    "garments, upside down": Problem(garments, garment_net, 4, Target.all()),
}
