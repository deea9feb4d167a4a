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
from torch.utils import _pytree as pytree

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


class Net(nn.Module):
    """Layers by name, and a function of them and of the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def linears(function: Callable[..., Any], **sizes: tuple[int, int]) -> Callable[[], nn.Module]:
    return lambda: Net(function, **{name: nn.Linear(*size) for name, size in sizes.items()})


def branches(net: Any, x: Tensor) -> Tensor:
    b = torch.tanh(net.b(x))
    a = F.gelu(net.a(x))
    joint = F.layer_norm(torch.cat([a, b], 1), (7,)) * torch.sigmoid(net.gate(b))
    return net.head(torch.cat([joint, x], 1))


def two_inputs(net: Any, *, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    h = F.silu(net.left(left)) + net.right(right)
    return {"features": h, "logits": net.head(h)}


def folded(net: Any, x: Tensor) -> Tensor:
    n, t, d = x.shape
    h = F.relu(net.frame(x.reshape(n * t, d)))
    h = h + torch.tanh(net.mix(h))
    return net.head(h.view(n, t, -1).mean(1))


def twice(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.mix(torch.tanh(net.mix(x)))))


def wandering(net: Any, x: Tensor) -> Tensor:
    """An expert is only called if some sample of the batch needs it."""
    h, needed = net.common(x), x[:, :1] > 0
    if needed.any():
        h = torch.where(needed, net.expert(h), h)
    return net.head(h)


def hard_mask(net: Any, x: Tensor) -> Tensor:
    """What comes before `mix` reaches the output through a comparison, where no gradient goes."""
    h = net.stem(x)
    return net.head(net.mix(h) * (h > 0).to(h.dtype))


def shortcut(net: Any, x: Tensor) -> Tensor:
    """Something that is not plain Python stands between two layers, with a shortcut over it."""
    h = net.first(x)
    h = h + net.between(h)
    return net.head(h.flatten(1, -2).mean(1) if h.ndim > 2 else h)


def between(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(shortcut, first=nn.Linear(6, 6), between=make(), head=nn.Linear(6, 5))


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


def experts(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """The first five samples need no expert."""
    x = torch.randn(n, 6, generator=g)
    x[:5, 0] = -1.0
    return (x,)


class Standardized(nn.Linear):
    """A subclass whose output is not linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.std(), self.bias)


class Doubled(torch.autograd.Function):
    """A function that only the dispatcher sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def _custom() -> nn.Module:
    return Net(lambda net, x: Doubled.apply(x))


def attention() -> nn.Module:
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    return Net(lambda net, x: net.layer(x, x, x, need_weights=False)[0], layer=layer)


def _recurrent() -> nn.Module:
    return Net(lambda net, x: net.layer(x)[0], layer=nn.LSTM(6, 6, batch_first=True))


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


def left_and_right(n: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"left": torch.randn(n, 4, generator=g), "right": torch.randn(n, 3, generator=g)}


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 5)
    )


def _convolution() -> nn.Module:
    conv = nn.Conv2d(2, 4, 3, dilation=2, padding="same")
    pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), pool, nn.Linear(4, 5))


BRANCHES = linears(branches, a=(6, 4), b=(6, 3), gate=(3, 7), head=(13, 5))
FOLDED = linears(folded, frame=(4, 6), mix=(6, 6), head=(6, 5))
REPLAYED = {
    "head": Case(_mlp, floats(6), "5"),
    "only layer": Case(lambda: nn.Linear(6, 5), floats(6), ""),
    "middle linear": Case(_mlp, floats(6), "2"),
    "all layers": Case(_mlp, floats(6), ["0", "5", "2"]),
    "conv2d": Case(_convolution, floats(2, 6, 5), "0"),
    "residual, first": Case(Residual, floats(2, 5, 5), "conv1"),
    "residual, second": Case(Residual, floats(2, 5, 5), "conv2"),
    "residual, both": Case(Residual, floats(2, 5, 5), ["conv1", "conv2"]),
    "branch run first": Case(BRANCHES, floats(6), "b"),
    "branch run second": Case(BRANCHES, floats(6), "a"),
    "attention, batch first": Case(Encoder, tokens(11, 6), "block.linear1"),
    "attention, batch second": Case(
        lambda: Encoder(batch_first=False), tokens(11, 6), "block.linear2"
    ),
    "two inputs": Case(
        linears(two_inputs, left=(4, 6), right=(3, 6), head=(6, 5)), left_and_right, "left"
    ),
    "folded": Case(FOLDED, floats(3, 4), "frame"),
    "folded, with shortcut": Case(FOLDED, floats(3, 4), "mix"),
    "after a script": Case(between(_scripted), floats(6), "head"),
    "before a custom function": Case(between(_custom), floats(6), "first"),
    "before attention": Case(between(attention), floats(4, 6), "first"),
    "before an LSTM": Case(between(_recurrent), floats(4, 6), "first"),
    "hard mask": Case(linears(hard_mask, stem=(6, 6), mix=(6, 6), head=(6, 5)), floats(6), "mix"),
}

WHOLE = {
    "called twice": (
        Case(linears(twice, mix=(6, 6), head=(6, 5)), floats(6), "mix"),
        "called 2 times",
    ),
    "data-dependent": (
        Case(linears(wandering, common=(6, 6), expert=(6, 6), head=(6, 5)), experts, "head"),
        "order in which modules are called",
    ),
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
        inputs = pytree.tree_map(lambda x: x[rows], self.data)
        return ((), inputs) if isinstance(inputs, dict) else (inputs, {})

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
    data = pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, case.data(n, g))
    target = torch.randint(0, 5, (n,), generator=g)
    model = model.eval().to(dtype)
    return Problem(model, find_layers(model, case.layer, include_bias=include_bias), data, target)


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
