"""Small networks of every kind that scoring has to get right, and the oracle: the whole model, once
a candidate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import ParameterSpace, find_layers
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.recording import record
from lightning_nrl.search.scoring.scorer import SwarmScorer, make_scorer
from lightning_nrl.tasks import Multiclass


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        h += x
        return self.head(self.act(h).mean((2, 3)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(6, 4), nn.Linear(6, 3), nn.Linear(3, 7)
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        b = torch.tanh(self.b(x))
        a = F.gelu(self.a(x))
        joint = self.norm(torch.cat([a, b], 1)) * torch.sigmoid(self.gate(b))
        return self.head(torch.cat([joint, x], 1))


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=batch_first)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids == 0
        h = self.embed(ids)
        h = self.block(h if self.batch_first else h.transpose(0, 1), src_key_padding_mask=mask)
        return self.head(h.mean(1 if self.batch_first else 0))


class Convolution(nn.Module):
    def __init__(self, conv: nn.Module, dims: int, out: int = 4) -> None:
        super().__init__()
        self.conv = conv
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](out)
        self.rest = nn.Sequential(nn.ReLU(), nn.Flatten(2))
        self.head = nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(self.norm(self.conv(x))).amax(2))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, *, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        h = F.silu(self.left(left)) + self.right(right)
        return {"features": h, "logits": self.head(h)}


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frame, self.mix, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        h = F.relu(self.frame(x.reshape(n * t, d)))
        h = h + torch.tanh(self.mix(h))
        return self.head(h.view(n, t, -1).mean(1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(x)))))


class Wandering(nn.Module):
    """An expert that is only called if some sample of the batch needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.expert, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, needed = self.common(x), x[:, :1] > 0
        if needed.any():
            h = torch.where(needed, self.expert(h), h)
        return self.head(h)


def experts(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """The first five samples need no expert."""
    x = torch.randn(n, 6, generator=g)
    x[:5, 0] = -1.0
    return (x,)


class Standardized(nn.Linear):
    """A subclass whose output is not linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.std(), self.bias)


class HardMask(nn.Module):
    """What comes before the layer reaches the output through a comparison, where no gradient goes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.mix(h) * (h > 0).to(h.dtype))


class Between(nn.Module):
    """Something that is not plain Python stands between two layers, with a shortcut over it."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.head = nn.Linear(6, 6), between, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(
            (h + self.between(h)).flatten(1, -2).mean(1) if h.ndim > 2 else h + self.between(h)
        )


class Doubled(torch.autograd.Function):
    """A function that only the dispatcher sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))


@dataclass(frozen=True)
class Case:
    """A network, what it is fed with, and which layer is repaired."""

    make: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], dict[str, Tensor] | tuple[Tensor, ...]]
    layer: str | list[str]


def floats(*shape: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    return lambda n, g: (torch.randn(n, *shape, generator=g),)


def tokens(top: int, length: int) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    return lambda n, g: (torch.randint(0, top, (n, length), generator=g),)


def two_inputs(n: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"left": torch.randn(n, 4, generator=g), "right": torch.randn(n, 3, generator=g)}


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 5)
    )


REPLAYED: dict[str, Case] = {
    "head": Case(_mlp, floats(6), "5"),
    "only layer": Case(lambda: nn.Linear(6, 5), floats(6), ""),
    "middle linear": Case(_mlp, floats(6), "2"),
    "first linear": Case(_mlp, floats(6), "0"),
    "head and middle": Case(_mlp, floats(6), ["5", "2"]),
    "all layers": Case(_mlp, floats(6), ["0", "5", "2"]),
    "conv1d": Case(
        lambda: Convolution(nn.Conv1d(3, 4, 3, stride=2, padding=1), 1), floats(3, 9), "conv"
    ),
    "conv2d": Case(
        lambda: Convolution(nn.Conv2d(2, 4, 3, dilation=2, padding="same"), 2),
        floats(2, 6, 5),
        "conv",
    ),
    "conv2d grouped": Case(
        lambda: Convolution(nn.Conv2d(4, 4, 2, groups=2, bias=False), 2), floats(4, 5, 4), "conv"
    ),
    "conv2d depthwise": Case(
        lambda: Convolution(nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), 2),
        floats(4, 5, 4),
        "conv",
    ),
    "conv3d": Case(
        lambda: Convolution(nn.Conv3d(2, 4, (2, 1, 3), stride=(1, 2, 1)), 3),
        floats(2, 4, 3, 5),
        "conv",
    ),
    "residual, first": Case(Residual, floats(2, 5, 5), "conv1"),
    "residual, second": Case(Residual, floats(2, 5, 5), "conv2"),
    "residual, both": Case(Residual, floats(2, 5, 5), ["conv1", "conv2"]),
    "branch run first": Case(Branches, floats(6), "b"),
    "branch run second": Case(Branches, floats(6), "a"),
    "attention, batch first": Case(Encoder, tokens(11, 6), "block.linear1"),
    "attention, batch second": Case(
        lambda: Encoder(batch_first=False), tokens(11, 6), "block.linear2"
    ),
    "two inputs": Case(TwoInputs, two_inputs, "left"),
    "folded": Case(Folded, floats(3, 4), "frame"),
    "folded, with shortcut": Case(Folded, floats(3, 4), "mix"),
    "after a script": Case(lambda: Between(_scripted()), floats(6), "head"),
    "before a custom function": Case(lambda: Between(Custom()), floats(6), "first"),
    "before attention": Case(lambda: Between(Attention()), floats(4, 6), "first"),
    "after attention": Case(lambda: Between(Attention()), floats(4, 6), "head"),
    "before an LSTM": Case(lambda: Between(Recurrent()), floats(4, 6), "first"),
    "hard mask": Case(HardMask, floats(6), "mix"),
}

WHOLE: dict[str, tuple[Case, str]] = {
    "called twice": (Case(Twice, floats(6), "mix"), "called 2 times"),
    "data-dependent": (Case(Wandering, experts, "head"), "order in which modules are called"),
    "not linear": (
        Case(lambda: nn.Sequential(Standardized(6, 6), nn.Tanh(), nn.Linear(6, 5)), floats(6), "0"),
        "other outputs than the whole model",
    ),
}


@dataclass(frozen=True)
class Problem:
    """A case made concrete: `n` samples in batches of several sizes, random labels."""

    model: nn.Module
    space: ParameterSpace
    data: dict[str, Tensor] | tuple[Tensor, ...]
    target: Tensor

    def batches(self, *sizes: int) -> list[tuple[Batch, Tensor]]:
        out = []
        for rows in torch.arange(len(self.target)).split(list(sizes)):
            args, kwargs = self._inputs(rows)
            out.append((Batch(args, self.target[rows], rows, kwargs), rows))
        return out

    def _inputs(self, rows: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if isinstance(self.data, dict):
            return (), {k: v[rows] for k, v in self.data.items()}
        return tuple(v[rows] for v in self.data), {}

    def scorer(
        self,
        where: Tensor,
        failed: Tensor,
        passed: Tensor,
        *,
        recording: ActivationCache | None = None,
        **options: Any,
    ) -> SwarmScorer:
        recording = self.recording(len(self.target)) if recording is None else recording
        return make_scorer(recording, where, failed, passed, recording.model.evaluator, **options)

    def recording(
        self,
        *sizes: int,
        keep: Tensor | None = None,
        evaluator: Evaluator | None = None,
        **options: Any,
    ) -> ActivationCache:
        keep = torch.ones(len(self.target), dtype=torch.bool) if keep is None else keep
        return record(
            evaluator or Evaluator(self.model), self.batches(*sizes), self.space, keep, **options
        )

    @torch.no_grad()
    def oracle(self, where: Tensor, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits `P x n x C` of the whole real model, a candidate at a time."""
        rows = torch.arange(len(self.target)) if rows is None else rows
        args, kwargs = self._inputs(rows)
        out = [
            functional_call(self.model, self.space.changed(where, v), args, kwargs) for v in values
        ]
        return torch.stack([Multiclass().logits(o) for o in out])

    def candidates(
        self, p: int, k: int, seed: int = 0, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`k` places and `p x k` values: the original first, then ones that are further and further
        off.
        """
        g = torch.Generator().manual_seed(seed)
        where = torch.randperm(self.space.size, generator=g)[:k].sort().values
        original = self.space.flat().cpu()[where].double()
        steps = torch.linspace(0, scale, p, dtype=torch.float64).unsqueeze(1)
        values = original + steps * torch.randn(p, len(where), generator=g, dtype=torch.float64)
        return where, values.to(self.space.dtype)


def make_problem(
    case: Case,
    n: int = 12,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    include_bias: bool = False,
) -> Problem:
    """A case made concrete; batch-norm statistics are as after some training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = case.make()
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=g)
            module.running_var.uniform_(0.5, 2.0, generator=g)
    data = case.data(n, g)
    data = _to(data, dtype)
    target = torch.randint(0, 5, (n,), generator=g)
    model = model.eval().to(dtype)
    return Problem(model, find_layers(model, case.layer, include_bias=include_bias), data, target)


def _to(data: Any, dtype: torch.dtype) -> Any:
    if isinstance(data, dict):
        return {k: _to(v, dtype) for k, v in data.items()}
    if isinstance(data, tuple):
        return tuple(_to(v, dtype) for v in data)
    return data.to(dtype) if data.is_floating_point() else data


@torch.no_grad()
def by_sample(scorer: SwarmScorer, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the samples, and what each candidate, `P x K`, does on them: passes and losses,
    `P x n`.
    """
    parts = [*scorer.failed, *scorer.passed]
    results = [part.evaluate(values) for part in parts]
    rows = torch.cat([part.chunk.rows for part in parts])
    passed = torch.cat([passed for passed, _ in results], 1)
    return rows, passed, torch.cat([loss for _, loss in results], 1).double()
