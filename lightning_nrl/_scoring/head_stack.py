"""Many swarms in front of one last layer, scored together: as many launches on a device as one swarm takes.

Each swarm has weights and samples of its own, padded to a common shape. That shape is made of the swarm's own numbers,
rounded up a little, so that a swarm goes through the same products and sums alone and among others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._scoring.chunk_scorer import Sums, summed
from lightning_nrl._scoring.head_scorer import HeadScorer, HeadTables
from lightning_nrl._utils.out_of_memory import none_if_out_of_memory
from lightning_nrl._utils.precision import no_autocast, widest

__all__ = ["HeadStack", "SwarmHeads", "stack_heads"]

UNIT_STEPS, WEIGHT_STEPS, SAMPLE_STEPS = 2, 1, 4
"""Numbers are rounded up to one of so many between a power of two and the next, so that few shapes are left. Padding of
weights costs least, since they are few beside the candidates."""
MOST_PADDING = 4
"""Rounding alone makes at most so much of the inputs that weights meet; where classes have very different numbers of
changed weights, padding makes more of them."""

OF_UNITS = ("rivals", "is_before")
"""Tables of changed classes."""
FILLS = {"true_logit": 0.0, "fixed_max": -1.0, "fixed_max_before": -torch.inf, "rivals": -torch.inf}
"""What tables have for samples and classes that are padding: they pass with a loss of 0. What is not named: 0."""


@dataclass(frozen=True)
class SwarmHeads:
    """The samples of one role that one swarm scores."""

    swarm: int  # which one
    columns: Tensor | None  # which of the K values its own weights are, int64; None if they are the first
    heads: tuple[HeadScorer, ...]  # chunks of its samples
    weight: Tensor | None  # n, what each sample counts; None: all alike

    @property
    def shape(self) -> tuple[int, int, int]:
        """Changed classes, weights of a class with its bias, samples: what others in its stack have too."""
        delta = self.heads[0].delta
        most = max((bucket.columns.shape[1] for bucket in delta.buckets), default=0) + delta.site.include_bias
        n = sum(head.true_logit.shape[-1] for head in self.heads)
        return rounded_up(len(delta.units), UNIT_STEPS), rounded_up(most, WEIGHT_STEPS), rounded_up(n, SAMPLE_STEPS)

    @property
    def padded_nbytes(self) -> int:
        """What the inputs that its weights meet take in a stack."""
        return math.prod(self.shape) * self.heads[0].true_logit.element_size()

    @property
    def is_mostly_padding(self) -> bool:
        """Whether that is much more than they take by themselves."""
        return self.padded_nbytes > MOST_PADDING * sum(x.nbytes for head in self.heads for x in head.gathered.x)


@dataclass
class HeadStack:
    """`S` swarms with `U` changed classes of `m` weights, `n` samples of one role."""

    swarms: Tensor  # S int64, which swarms
    original: Tensor  # S x 1 x K, their values as they are now, padded with 0
    columns: Tensor  # S x 1 x (U * m) int64, which of the K values a weight is; K: it stays
    x: Tensor  # S x U x m x n, what the weights meet
    tables: HeadTables  # with a dimension for swarms in front
    counted: Tensor  # S x 1 x n bool, which samples are no padding
    weight: Tensor | None  # S x 1 x n, what each counts; None: all alike
    rows: int  # swarms times candidates times samples that are run at once; halved for good when memory runs out
    deployed: torch.dtype  # of the weights

    @property
    def total_weight(self) -> Tensor:
        """What all samples of a swarm count together, `S x 1`."""
        assert self.weight is not None
        return self.weight.sum(-1)

    def sums(self, values: Tensor, with_loss: bool = True, with_credit: bool = False) -> Sums:
        """What the candidates of these swarms, `S x P x K`, do on their samples, `S x P` each."""
        parts = list(self._blocks(values, partial(self._run, with_loss, with_credit)))

        def joined(column: Sequence[Tensor | None]) -> Tensor | None:
            known = [x.flatten() for x in column if x is not None]
            return torch.cat(known).view(values.shape[:2]) if known else None

        return Sums(*map(joined, zip(*parts, strict=True)))  # type: ignore[arg-type]

    def _blocks(self, values: Tensor, work: Callable[[slice, Tensor], Sums]) -> Iterator[Sums]:
        """Does the work for as many swarms at once as memory allows, or for some candidates of one, in their order."""
        start, candidate, (s, p, _) = 0, 0, values.shape
        while start < s:
            many = max(1, self.rows // self.x.shape[-1])
            stop, swarms = min(p, candidate + many), 1 if candidate else max(1, many // p)
            which = slice(start, min(s, start + swarms))
            done = none_if_out_of_memory(partial(work, which, values[which, candidate:stop]), last_try=self.rows <= 1)
            if done is None:
                self.rows //= 2
                continue
            yield done
            start, candidate = (which.stop, 0) if stop == p else (start, stop)

    def _run(self, with_loss: bool, with_credit: bool, which: slice, values: Tensor) -> Sums:
        tables = HeadTables(*(_some(getattr(self.tables, f.name), which) for f in fields(HeadTables)))  # type: ignore[arg-type]
        dtype, x = tables.true_logit.dtype, self.x[which]
        (s, p, _), (_, u, m, n) = values.shape, x.shape
        new, old = (w.to(self.deployed).to(dtype) for w in (values, self.original[which]))
        change = F.pad(new - old, (0, 1)).gather(2, self.columns[which].expand(-1, p, -1))
        d = change.view(s, p, u, m).transpose(1, 2).reshape(s * u, p, m)
        with no_autocast(values.device):
            z = torch.bmm(d, x.view(s * u, m, n)).view(s, u, p, n)
        passed, loss = tables.judged(z, with_loss)
        counted = self.counted[which]
        passed &= counted
        # Padding has a loss of 0, but a credit.
        found = summed(passed, loss, _some(self.weight, which), with_credit)
        if found.credit is None:
            return found
        return found._replace(credit=found.credit - (~counted).sum(-1))


def rounded_up(n: int, steps: int) -> int:
    """The next of so many numbers, a power of two, between a power of two and the next."""
    step = max(1, (1 << max(0, n - 1).bit_length()) // (2 * steps))
    return -(-n // step) * step


def stack_heads(swarms: Sequence[SwarmHeads], n_columns: int, block_bytes: int) -> list[HeadStack]:
    """Stacks of swarms of like shape; `n_columns` is K, `block_bytes` what the logits of one block may take."""
    shapes: dict[tuple[object, ...], list[SwarmHeads]] = {}
    for one in swarms:
        head = one.heads[0]
        kind = head.true_logit.dtype, head.delta.original.dtype, head.reserve is None, one.weight is None
        shapes.setdefault((one.shape, kind), []).append(one)
    return [_stacked(alike, n_columns, block_bytes) for alike in shapes.values()]


def _stacked(alike: Sequence[SwarmHeads], n_columns: int, block_bytes: int) -> HeadStack:
    u, m, n = alike[0].shape
    first = alike[0].heads[0]
    device, dtype = first.true_logit.device, first.true_logit.dtype

    def table(name: str) -> Tensor | None:
        if getattr(first, name) is None:
            return None
        own = [torch.cat([getattr(head, name) for head in one.heads], -1) for one in alike]
        units = u if name in OF_UNITS else 1
        pads = [(0, n - x.shape[-1], 0, 0, 0, units - len(x)) if x.ndim == 3 else (0, n - len(x)) for x in own]
        padded = torch.stack([F.pad(x, pad, value=FILLS.get(name, 0)) for x, pad in zip(own, pads, strict=True)])
        return padded if padded.ndim == 4 else padded.unsqueeze(1)

    tables = HeadTables(*(table(f.name) for f in fields(HeadTables)))  # type: ignore[arg-type]
    places = torch.full((len(alike), u, m), n_columns, device=device)
    x = torch.zeros(len(alike), u, m, n, dtype=dtype, device=device)
    original = torch.zeros(len(alike), 1, n_columns, dtype=first.delta.original.dtype, device=device)
    for s, one in enumerate(alike):
        delta = one.heads[0].delta
        own = torch.arange(len(delta.original), device=device) if one.columns is None else one.columns
        to_all = F.pad(own, (0, 1), value=n_columns)
        original[s, 0].index_copy_(0, own, delta.original)
        start = 0
        for b, bucket in enumerate(delta.buckets):
            met = torch.cat([head.gathered.x[b][:, 0] for head in one.heads], -1)  # u x m x n
            part = slice(start, start + len(met))
            places[s, part, : met.shape[1]] = to_all[bucket.columns]
            x[s, part, : met.shape[1], : met.shape[2]] = met
            start = part.stop
        if delta.site.include_bias:
            places[s, : len(delta.bias), -1] = to_all[delta.bias]
            x[s, : len(delta.bias), -1] = 1.0
    counts = torch.tensor([sum(head.true_logit.shape[-1] for head in one.heads) for one in alike], device=device)
    weights = [
        F.pad(one.weight.to(widest(device)), (0, n - len(one.weight))) for one in alike if one.weight is not None
    ]
    return HeadStack(
        swarms=torch.tensor([one.swarm for one in alike], device=device),
        original=original,
        columns=places.view(len(alike), 1, u * m),
        x=x,
        tables=tables,
        counted=torch.arange(n, device=device) < counts.view(-1, 1, 1),
        weight=torch.stack(weights).unsqueeze(1) if weights else None,
        rows=max(1, block_bytes // (u * dtype.itemsize)),
        deployed=first.delta.original.dtype,
    )


def _some(x: Tensor | None, which: slice) -> Tensor | None:
    return None if x is None else x[which]
