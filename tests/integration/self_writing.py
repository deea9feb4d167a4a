"""Networks that write to their own weights whenever they run, or when they go to evaluation."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from digit_models import Classifier
from torch import Tensor, nn

from lightning_nrl import Gate


class BoundedEmbedding(nn.Module):
    """Shortens the vectors that it looks up, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 4, max_norm=0.5)
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embedding((16 * images).long().clamp(0, 16).flatten(1)).flatten(1))


class Clamped(nn.Module):
    """Cuts a weight to a range, past torch's count of writes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        self.body.weight.data.clamp_(-0.05, 0.05)
        return self.head(torch.relu(self.body(images.flatten(1))))


class LowRank(nn.Linear):
    """An adapter that is added to the weight in evaluation mode and beside it in training (Hu et
    al. 2021, LoRA).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(4, inputs)), nn.Parameter(torch.randn(outputs, 4))
        self.merged = False

    def train(self, mode: bool = True) -> LowRank:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + x @ self.a.T @ self.b.T


def adapted() -> nn.Module:
    return nn.Sequential(nn.Flatten(), LowRank(64, 32), nn.ReLU(), nn.Linear(32, 10))


SELF_WRITING = {"max_norm": BoundedEmbedding, "clamp": Clamped, "merge": adapted}


def classifier(kind: str) -> Classifier:
    """One of these networks in a module, in training mode but for its head."""
    model = Classifier()
    torch.manual_seed(0)
    model.network = SELF_WRITING[kind]()
    list(model.modules())[-1].eval()
    return model


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """The bits, the objects and the modes of a model."""
    state = model.state_dict(keep_vars=True)
    bits = {
        name: hashlib.sha256(x.detach().numpy().tobytes()).hexdigest() for name, x in state.items()
    }
    merged = [module.merged for module in model.modules() if isinstance(module, LowRank)]
    return (
        bits,
        [id(x) for x in model.parameters()],
        [module.training for module in model.modules()],
        merged,
    )


class NothingAtAll(Gate):
    """Refuses whatever comes."""

    rule = "nothing at all"

    def allowed(self, counts: Any) -> int:
        return -1

    def __str__(self) -> str:
        return "nothing-at-all"
