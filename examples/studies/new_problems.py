"""Three problems for `defaults.py --new`: texts, point sets and spectrograms.

They were made after the default: their sizes and difficulty were chosen by the accuracy of the fit
alone, before any repair, and nothing was tuned on them. The data are generated from a seed. A
training takes 1 to 5 s on one core.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from default_problems import Classifier, Small, one_cycle
from problems import Problem
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_nrl import Target

TOPICS, WORDS, FILLERS = 6, 25, 50
"""Topics of the texts, words of a topic, and words of no topic."""
CORNERS = (3, 4, 5, 6)
"""Corners of the regular polygons among the point sets."""
SPEAKERS = 10
"""Speakers of the training, and as many other ones later."""


def texts(seed: int) -> Small:
    """Makes texts of 20 words in 6 topics; in 40 % of the later ones, rare words are common.

    A text has about 6 words of its topic and 5 of other topics.
    """
    n, length = 4_400, 20
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(TOPICS, (n,), generator=generator)
    later = torch.rand(n, generator=generator) < 0.4
    later[:1_400] = False
    # Common words first, by Zipf's law.
    frequencies = 1 / torch.arange(1, WORDS + 1) ** 1.2
    words = frequencies.multinomial(n * length, replacement=True, generator=generator)
    words = words.view(n, length)
    words = torch.where(later[:, None], WORDS - 1 - words, words)
    other_topics = torch.randint(TOPICS, (n, length), generator=generator)
    kinds = torch.rand(n, length, generator=generator)
    topics = torch.where(kinds < 0.3, labels[:, None], other_topics)
    fillers = TOPICS * WORDS + torch.randint(FILLERS, (n, length), generator=generator)
    tokens = torch.where(kinds < 0.55, topics * WORDS + words, fillers)
    return Small(tokens, labels, (1_400, 600, 2_400))


class TextEncoder(nn.Module):
    """Embeddings of words and positions, a Transformer encoder, and a Linear layer of its mean."""

    def __init__(self, width: int = 32, length: int = 20) -> None:
        super().__init__()
        self.words = nn.Embedding(TOPICS * WORDS + FILLERS, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.classifier = nn.Linear(width, TOPICS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.words(tokens) + self.positions).mean(1))


def text_net() -> Classifier:
    """A Transformer encoder; AdamW with a one-cycle schedule."""
    optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2)
    return Classifier(TextEncoder(), optimizer, one_cycle)


def point_sets(seed: int) -> Small:
    """Makes sets of 32 points on 6 outlines, turned at random; later, half are partly occluded."""
    n, points = 5_000, 32
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, columns: int = 1) -> Tensor:
        return torch.empty(n, columns).uniform_(low, high, generator=generator)

    labels = torch.randint(len(CORNERS) + 2, (n,), generator=generator)
    occluded = uniform(0, 1) < 0.5
    occluded[:2_000] = False
    visible = torch.where(occluded, uniform(0.6, 0.8), 1.0)
    angles = 2 * math.pi * (uniform(0, 1) + visible * uniform(0, 1, points))
    polygons = [
        math.cos(math.pi / corners) / (angles % (2 * math.pi / corners) - math.pi / corners).cos()
        for corners in CORNERS
    ]
    circles, flowers = torch.ones_like(angles), 0.8 + 0.2 * (5 * angles).cos()
    radii = torch.stack([*polygons, circles, flowers])[labels, torch.arange(n)]
    turned = angles + uniform(0, 2 * math.pi)
    outlines = radii[..., None] * torch.stack([turned.cos(), turned.sin()], -1)
    noise = 0.02 * torch.randn(n, points, 2, generator=generator)
    return Small(outlines * uniform(0.8, 1.2)[..., None] + noise, labels, (2_000, 600, 2_400))


class DeepSets(nn.Module):
    """Layers for each point, the maximum over the points, and layers for the set."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.of_points = nn.Sequential(
            *(nn.Linear(2, width), nn.LayerNorm(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()),
            nn.Linear(width, width),
        )
        self.of_sets = nn.Sequential(
            *(nn.Linear(width, width), nn.ReLU()), nn.Linear(width, len(CORNERS) + 2)
        )

    def forward(self, points: Tensor) -> Tensor:
        return self.of_sets(self.of_points(points).amax(1))


def point_net() -> Classifier:
    """A network for sets, with layer norm; Adam with a rate that falls exponentially."""
    return Classifier(
        DeepSets(),
        partial(torch.optim.Adam, lr=5e-3),
        lambda optimizer, _: lr_scheduler.ExponentialLR(optimizer, 0.9),
    )


def spectrograms(seed: int) -> Small:
    """Makes spectrograms of 6 spoken words, 20 frequencies x 20 times; later speakers are others.

    A word is two curves of frequency over time. Speakers differ in pitch, range and speed.
    """
    n, size, words = 4_500, 20, 6
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(words, (n,), generator=generator)
    speakers = torch.randint(SPEAKERS, (n,), generator=generator)
    speakers[1_400:] += SPEAKERS

    def of_speakers(mean: float, deviation: float) -> Tensor:
        values = mean + deviation * torch.randn(2 * SPEAKERS, generator=generator)
        return values[speakers][:, None, None]

    def of_samples(deviation: float) -> Tensor:
        return deviation * torch.randn(n, 1, 1, generator=generator)

    starts, bends, slopes = torch.rand(3, words, 2, 1, generator=generator)[:, labels]
    times = torch.linspace(-1, 1, size) * of_speakers(1, 0.2) + of_samples(0.15)
    curves = 0.6 * starts + 0.6 * (slopes - 0.5) * times + 0.6 * (bends - 0.5) * times**2
    pitches = of_speakers(4, 3) + of_samples(0.5)
    centres = pitches + size * of_speakers(0.6, 0.15) * curves
    distances = torch.arange(size)[:, None, None] - centres[:, None].transpose(-1, -2)
    energies = (-(distances**2) / 2).exp().sum(-1)
    noise = 0.7 * torch.randn(n, size, size, generator=generator)
    return Small((energies + noise)[:, None], labels, (1_400, 600, 2_500))


class Residual(nn.Module):
    """Adds its input to two convolutions with batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(channels, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.body(images)).relu()


def convolution(channels: int, channels_out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    layer = nn.Conv2d(channels, channels_out, 3, stride, padding=1, bias=False)
    return layer, nn.BatchNorm2d(channels_out), nn.ReLU()


def spectrogram_net() -> Classifier:
    """A residual network with batch norm; SGD with a cosine schedule."""
    layers = (
        *(*convolution(1, 12, 2), Residual(12)),
        *(*convolution(12, 24, 2), Residual(24)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 6)),
    )
    return Classifier(
        nn.Sequential(*layers),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        lambda optimizer, trainer: lr_scheduler.CosineAnnealingLR(optimizer, trainer.max_epochs),
    )


NEW = {
    "texts, Transformer": Problem(texts, text_net, 10, Target.all()),
    "point sets, occluded": Problem(point_sets, point_net, 20, Target.all()),
    "spectrograms, speakers": Problem(spectrograms, spectrogram_net, 14, Target.all()),
}
