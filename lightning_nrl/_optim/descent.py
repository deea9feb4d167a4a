"""Gradient steps on weights of a copy: as deployed, over all known splits and ranks, the live model left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_nrl._utils.precision import repeatable_gradients
from lightning_nrl._utils.state import State, holding
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.problem import Problem

__all__ = ["BATCH", "MOST", "Descent", "Loss", "Part", "Teacher", "deal", "draw", "measured", "outputs"]

BATCH = 128
"""Samples in one step, over all ranks: what the recipes here were tried with."""
MOST = 10.0
"""Of a sample's weight: a loss that is larger still would drown all others."""
REMEMBERED = 2**28
"""Bytes of a teacher's outputs that are kept in main memory; where they are more it is run again each time."""

Part = tuple[Batch, Tensor]
"""Samples of one split, and their rows in the evidence, `n` int64."""

Loss = Callable[[Batch, Tensor, Tensor], Tensor]
"""From a batch, its rows in the evidence and the logits: a sum over its samples, to be made small."""


class Descent:
    """Weights that take steps.

    Batch norm and dropout work as deployed, since the model stays in evaluation mode. Steps are taken on float32
    copies, because steps that are smaller than the rounding of a half precision would be lost; the model runs on them
    in its own dtype.

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

    def step(self, parts: Iterable[Part], loss: Loss, *, rate: float | None = None) -> None:
        """One step on samples of several splits, the gradients summed over them and over ranks.

        Args:
            parts: this rank's share of a mini-batch.
            loss: what is to be made small.
            rate: the learning rate from now on; None leaves it.
        """
        for group in self.optimizer.param_groups if rate is not None else ():
            group["lr"] = rate
        with torch.enable_grad(), repeatable_gradients(self.problem.model), self.running():
            for batch, rows in parts:
                loss(batch, rows, outputs(self.problem, batch)).backward()
        if self.problem.collective.world_size > 1:
            self._sum_gradients()
        masked = [(self._copies[name], ~mask) for name, mask in self.masks.items()]
        kept = [x.detach()[fixed] for x, fixed in masked]
        for x, fixed in masked:
            if x.grad is not None:
                x.grad[fixed] = 0
        self.optimizer.step()
        for (x, fixed), old in zip(masked, kept, strict=True):
            # Weight decay moves also what has no gradient.
            x.detach()[fixed] = old
        self.optimizer.zero_grad()

    def _sum_gradients(self) -> None:
        copies = list(self._copies.values())
        mine = [(torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in copies]
        used = torch.tensor([x.grad is not None for x in copies]).to(mine[0])
        total = self.problem.collective.sum(torch.cat([*mine, used]))
        *grads, used = total.split([*(x.numel() for x in copies), len(copies)])
        for x, grad, ranks in zip(copies, grads, used.tolist(), strict=True):
            # As on one rank: what no loss depends on has no gradient, and weight decay leaves it.
            x.grad = grad.view_as(x).to(x.dtype) if ranks else None


class Teacher:
    """What other weights say of a batch, remembered where there is room.

    Args:
        problem: its model is run.
        states: the weights; of each sample one of them is asked.
        which: `N` int64, the number of the state that is asked of each row of the evidence.
    """

    def __init__(self, problem: Problem, states: Sequence[State], which: Tensor) -> None:
        own = {k: v for k, v in problem.model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
        # Whole states, since the model may hold other weights when it is asked.
        given = [{id(own[name]): value for name, value in state.items()} for state in states]
        self._states = [{name: new.get(id(value), value) for name, value in own.items()} for new in given]
        self._problem, self._which = problem, which
        self._known = torch.zeros(len(which), dtype=torch.bool)
        self._table: Tensor | None = None
        self._varied = False
        self._device = torch.device("cpu")

    def prepare(self, rows: Tensor) -> None:
        """Asks about those of some rows that nobody asked about yet; a batch with one of them is asked about whole.

        Args:
            rows: of the evidence, of any rank's share, `n` int64.
        """
        if self._table is None or self._varied:
            return
        for parts in draw(self._problem, rows[~self._known[rows]].split(BATCH)):
            for batch, places in parts:
                self(batch, places)

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: Tensor, shape: torch.Size | None = None) -> Tensor:
        """The logits, on the device of the model.

        Args:
            batch: `n` samples.
            rows: their rows in the evidence, `n` int64.
            shape: that the logits have if it depends on the batch, as it does where a batch is padded to its longest
                sample. Logits of another shape than the first ones are not remembered.
        """
        fits = self._table is not None and (shape is None or shape[1:] == self._table.shape[1:])
        if self._table is not None and fits and bool(self._known[rows].all()):
            return self._table[rows].to(self._device)
        which = self._which[rows]
        said = torch.zeros(0)
        for number, state in enumerate(self._states):
            chosen = which == number
            if chosen.any():
                with holding(self._problem.model, state):
                    output = outputs(self._problem, batch)
                mask = chosen.to(output.device).view(-1, *[1] * (output.ndim - 1))
                said = torch.where(mask, output, said) if len(said) else output
        self._device = said.device
        if self._table is None and len(self._which) * said[0].numel() * said.element_size() <= REMEMBERED:
            self._table = torch.empty((len(self._which), *said.shape[1:]), dtype=said.dtype)
        if self._table is not None and said.shape[1:] == self._table.shape[1:]:
            self._table[rows] = said.cpu()
            self._known[rows] = True
        elif self._table is not None:
            self._varied = True
        return said


def outputs(problem: Problem, batch: Batch) -> Tensor:
    """The logits of the model with the weights that it holds, computed as deployed."""
    with problem.context():
        output = problem.model(*batch.args, **batch.kwargs)
    return problem.task.logits(output)


def deal(rows: Tensor, generator: torch.Generator, size: int = BATCH) -> list[Tensor]:
    """Rows of the evidence in random order, in mini-batches of about the same size."""
    if not len(rows):
        return []
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    return list(shuffled.tensor_split(-(-len(rows) // size)))


def draw(problem: Problem, batches: Sequence[Tensor]) -> Iterator[list[Part]]:
    """This rank's share of mini-batches of rows, each as parts of one split, none larger than that split's batches."""
    streams = []
    for source in problem.known:
        start, mine = problem.before.start(source.split), torch.zeros(len(source.index), dtype=torch.bool)
        mine[source.positions] = True
        at_once = min(BATCH, _batch_size(source) or BATCH)
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


def measured(problem: Problem, column: Tensor, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """A column of the evidence, `N`, with new values at the rows where any rank found some; of several the last.

    Args:
        problem: whose ranks these are.
        column: what is known so far.
        found: rows of this rank's share and a value for each.
    """
    new, seen = torch.zeros_like(column), torch.zeros_like(column)
    if found:
        rows, values = torch.cat([rows for rows, _ in found]), torch.cat([values for _, values in found])
        # One transfer; and later values overwrite earlier ones, which indexing alone would not promise.
        for some, value in zip(rows.split(at := [len(r) for r, _ in found]), values.cpu().split(at), strict=True):
            new[some], seen[some] = value.to(column.dtype), 1.0
    new, seen = problem.collective.sum(torch.stack([new, seen])).unbind()
    return torch.where(seen > 0, new, column)


def _batch_size(source: Source) -> int:
    """How many samples of a split the model is known to take at once."""
    known = getattr(source, "batch_size", None)
    # Reading a batch to see is slow where workers have to start for it.
    return int(known) if known else len(next(iter(source), ()))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
