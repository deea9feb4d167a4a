"""Gradient steps on weights of a copy: as deployed, over all known splits and ranks, the live model left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_nrl.batches import Batch, Source
from lightning_nrl.methods.problem import Problem
from lightning_nrl.state import State, holding

__all__ = ["BATCH", "Descent", "Loss", "Part", "deal", "draw"]

BATCH = 128
"""Samples in one step, over all ranks: what the recipes here were tried with."""

Part = tuple[Batch, Tensor]
"""Samples of one split, and their rows in the evidence, `n` int64."""

Loss = Callable[[Batch, Tensor, Tensor], Tensor]
"""From a batch, its rows in the evidence and the logits: a sum over its samples, to be made small."""


class Descent:
    """Weights that take steps.

    Batch norm and dropout work as deployed, since the model stays in evaluation mode. Steps are taken on float32 copies,
    because steps that are smaller than the rounding of a half precision would be lost; the model runs on them in its own
    dtype.

    Args:
        problem: its `scope` names the parameters that move; its model is run, never written to.
        state: where they start. What it has beyond the scope stays as it is there.
        optimizer: is made from the copies. One that does not care for the scale of the loss, such as Adam: losses are
            sums over samples, so that they add up over splits and ranks and do not vanish in half precision.
        masks: by name of a parameter, which of its weights may move; all of those that are not named.
    """

    def __init__(
        self,
        problem: Problem,
        state: State,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.problem = problem
        self.masks = masks or {}
        live = {k: v for k, v in problem.model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
        parameters = dict(problem.model.named_parameters())
        given = {id(live[name]): value for name, value in state.items()}
        moving = {id(parameters[name]) for name in problem.scope}
        self._given = {k: v.detach().clone() for k, v in state.items() if id(live[k]) not in moving}
        # Without gradients, which would otherwise gather in the live parameters.
        self._still = {
            k: v.detach() for k, v in parameters.items() if id(v) not in moving and id(v) not in given
        } | self._given
        self._dtypes = {name: parameters[name].dtype for name in problem.scope}
        self._copies = {
            name: given.get(id(parameters[name]), parameters[name])
            .detach()
            .to(_wide(dtype), copy=True)
            .requires_grad_()
            for name, dtype in self._dtypes.items()
        }
        self.optimizer = optimizer(list(self._copies.values()))

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """The weights as they are now, in the dtypes of the model, with what was given beyond the scope."""
        moved = {name: value.detach().to(self._dtypes[name], copy=True) for name, value in self._copies.items()}
        return {**self._given, **moved}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model runs on the weights as they are now, and gradients lead to them."""
        cast = {name: value.to(self._dtypes[name]) for name, value in self._copies.items()}
        with holding(self.problem.model, {**self._still, **cast}):
            yield

    def step(self, parts: Iterable[Part], loss: Loss) -> None:
        """One step on samples of several splits, the gradients summed over them and over ranks."""
        problem = self.problem
        with torch.enable_grad(), self.running():
            for batch, rows in parts:
                with problem.context():
                    output = problem.model(*batch.args, **batch.kwargs)
                loss(batch, rows, problem.task.logits(output)).backward()
        if problem.collective.world_size > 1:
            self._sum_gradients()
        for name, mask in self.masks.items():
            grad = self._copies[name].grad
            if grad is not None:
                grad.mul_(mask)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _sum_gradients(self) -> None:
        copies = list(self._copies.values())
        mine = [torch.zeros_like(x) if x.grad is None else x.grad for x in copies]
        total = self.problem.collective.sum(torch.cat([x.flatten() for x in mine]))
        for x, grad in zip(copies, total.split([x.numel() for x in copies]), strict=True):
            x.grad = grad.view_as(x)


def deal(rows: Tensor, generator: torch.Generator, size: int = BATCH) -> list[Tensor]:
    """Rows of the evidence in random order, in mini-batches of about the same size."""
    if not len(rows):
        return []
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    return list(shuffled.tensor_split(-(-len(rows) // size)))


def draw(problem: Problem, batches: Sequence[Tensor]) -> Iterator[list[Part]]:
    """This rank's share of mini-batches of rows, each as parts of one split and of no more samples than its loaders give."""
    at_once = min([BATCH, *(n for source in problem.known if (n := _batch_size(source)))])
    streams = []
    for source in problem.known:
        start, mine = problem.before.start(source.split), torch.zeros(len(source.index), dtype=torch.bool)
        mine[source.positions] = True
        chosen = []
        for rows in batches:
            places = rows[(rows >= start) & (rows < start + len(mine))] - start
            places = places[mine[places]]
            chosen.append(list(places.split(at_once)) if len(places) else [])
        flat = [places for pieces in chosen for places in pieces]
        streams.append((start, [len(pieces) for pieces in chosen], iter(source.draw(flat) if flat else ())))
    for at in range(len(batches)):
        yield [
            (batch, batch.position + start)
            for start, counts, stream in streams
            for batch in (next(stream) for _ in range(counts[at]))
        ]


def _batch_size(source: Source) -> int:
    """How many samples the model is known to take at once."""
    return max((len(batch) for batch, _ in zip(source, range(1), strict=False)), default=0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
