"""Gradient steps on a copy of the weights, with samples of all known splits and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_nrl._utils.device import none_if_out_of_memory, repeatable_gradients
from lightning_nrl._utils.state import State, completed, live_tensors, parked, temporary_weights
from lightning_nrl.data import Batch
from lightning_nrl.errors import DeviceMemoryError
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solvers.mini_batches import BATCH_SIZE, Part, load_batches

MOVED_AT_ONCE = 2**16  # weights that an optimizer moves at once
MAX_SAMPLE_WEIGHT = 10.0  # a larger weight would drown all other losses

Loss = Callable[[Batch, Tensor, Tensor], Tensor]
"""Takes a batch, its rows among the known samples, and its logits; returns the summed losses."""


class Descent:
    """Gradient descent on a copy of the weights; the live model stays unchanged.

    The model stays in evaluation mode, so batch norm and dropout work as deployed. Steps move
    float32 copies of its weights, since half precision would lose small steps; the model runs in
    its own dtype. If a mini-batch exceeds the memory, its gradient is summed over smaller forward
    passes.

    The copies start at `state`. Only parameters in `problem.scope` move. If `masks` has a bool
    tensor for a parameter, only weights marked there move. Losses are sums over samples, so that
    they add up over splits and ranks and do not vanish in half precision. The optimizer must
    therefore be scale-invariant, such as Adam.

    The right size of a step depends on the network: a rate of 1e-3 suits a small one, 5e-6 a
    pretrained transformer. So `limited_step` limits how far a step moves the logits (a trust
    region). `trust`, at most 1, is the factor of all learning rates that this takes.
    """

    def __init__(
        self,
        problem: Problem,
        state: State,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.problem = problem
        live = live_tensors(problem.model)
        start = completed(problem.model, state)
        moving = {id(live[name]) for name in problem.scope}
        self._fixed = {name: start[name] for name in live if id(live[name]) not in moving}
        self._kept = {name: value for name, value in self._fixed.items() if name in state}
        self._dtypes = {name: live[name].dtype for name in problem.scope}
        self._copies = {}
        self._marked: State = start
        self._is_at_mark = True
        for name, dtype in self._dtypes.items():
            copy = start[name].to(torch.promote_types(dtype, torch.float32), copy=True)
            self._copies[name] = copy.requires_grad_()
        self._masks = masks or {}
        self._samples_at_once = BATCH_SIZE
        self.trust = 1.0
        self._trusted_rate = 0.0  # is not measured again
        # The optimizer sees parts of the copies, so that its temporary tensors are small.
        self._parts = [(copy, _parts(copy)) for copy in self._copies.values()]
        self.optimizer = optimizer([part for _, parts in self._parts for part in parts])

    @torch.no_grad()
    def mark(self) -> None:
        """Keeps the present weights, to which `restore` goes back; at first these are the start."""
        if not self._is_at_mark:
            self._marked = {}  # to free its memory
            self._marked = {name: parked(copy) for name, copy in self._copies.items()}
            self._is_at_mark = True

    @torch.no_grad()
    def restore(self) -> None:
        """Goes back to the weights at the last `mark`, and forgets earlier gradients."""
        for name, copy in self._copies.items():
            copy.copy_(self._marked[name])
        self.optimizer.state.clear()
        self._trusted_rate = 0.0

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Returns the moved weights in the model's dtypes, and the other tensors of `state`."""
        moved = {
            name: copy.detach().to(self._dtypes[name], copy=True)
            for name, copy in self._copies.items()
        }
        return {**self._kept, **moved}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Gives the model the copies in its dtypes for a block; gradients reach the copies."""
        cast = {name: copy.to(self._dtypes[name]) for name, copy in self._copies.items()}
        with temporary_weights(self.problem.model, {**self._fixed, **cast}):
            yield

    def step(self, parts: Sequence[Part], loss: Loss, *, rate: float | None = None) -> None:
        """Makes one step on a mini-batch; each rank passes its `parts` of it.

        `rate` replaces the learning rate, and is multiplied by `trust`.

        Raises:
            DeviceMemoryError: on all ranks, before the step, if a single sample exceeds the memory
                of one rank.
        """
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate * self.trust
        has_fitted = self._backward(parts, loss)
        collective = self.problem.collective
        if collective.world_size > 1:
            collective.sum_gradients(list(self._copies.values()))
        if collective.any(not has_fitted):
            self._zero_grad()
            raise DeviceMemoryError(
                "the gradient of a single sample does not fit in the memory of the device.",
                "name a later `layer`, or free memory.",
            )
        self._is_at_mark = False
        for name, mask in self._masks.items():
            copy = self._copies[name]
            if copy.grad is not None:
                copy.grad = copy.grad.where(mask.to(copy.device), 0)
        for copy, weights in self._parts:
            if copy.grad is not None:
                for weight, gradient in zip(weights, _parts(copy.grad), strict=True):
                    weight.grad = gradient
        self.optimizer.step()
        self._zero_grad()

    def limited_step(self, parts: Sequence[Part], loss: Loss, *, rate: float, most: float) -> None:
        """Makes a `step` that moves the logits of the mini-batch by at most `most`.

        The movement is the root mean square in units of the passed samples' median margin. `trust`
        doubles before the step; if the step is too large, it is shortened, and `trust` falls.
        """
        if rate <= self._trusted_rate:
            self.step(parts, loss, rate=rate)
            return
        self.trust = min(1.0, 2 * self.trust)
        self.mark()
        logits = {}

        def keeping_logits(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
            logits[tuple(rows.tolist())] = output.detach().float()
            return loss(batch, rows, output)

        self.step(parts, keeping_logits, rate=rate)
        moved = self._moved(parts, logits)
        if moved <= most and self.trust == 1:
            self._trusted_rate = rate
        elif moved > most:
            self.trust *= most / moved
            with torch.no_grad():
                for name, copy in self._copies.items():
                    start = self._marked[name].to(copy)
                    copy.copy_(torch.lerp(start, copy, most / moved))

    @torch.no_grad()
    def _moved(self, parts: Sequence[Part], logits: Mapping[tuple[int, ...], Tensor]) -> float:
        total = torch.zeros(2, dtype=torch.float64)
        with self.running():
            for batch, rows in self._pieces(parts):
                new = self.problem.evaluator.output(batch).float()
                squares = (new - logits[tuple(rows.tolist())]).nan_to_num(0).square()
                total += torch.tensor([float(squares.sum()), squares.numel()], dtype=torch.float64)
        squares, n = self.problem.collective.sum(total).tolist()
        return math.sqrt(squares / max(1, n)) / (self.problem.before.margin_unit or 1.0)

    def _backward(self, parts: Sequence[Part], loss: Loss) -> bool:
        """Adds gradients of this rank's parts; returns False if one sample exceeds the memory."""

        def work() -> bool:
            with torch.enable_grad(), repeatable_gradients(self.problem.model), self.running():
                for batch, rows in self._pieces(parts):
                    loss(batch, rows, self.problem.evaluator.output(batch)).backward()
            return True

        while none_if_out_of_memory(work) is None:
            self._zero_grad()
            largest = max(len(rows) for _, rows in parts)
            if min(largest, self._samples_at_once) <= 1:
                return False
            self._samples_at_once = min(largest, self._samples_at_once) // 2
        for copy in self._copies.values():
            # `Embedding(sparse=True)` has sparse gradients, which Adam refuses.
            if copy.grad is not None and copy.grad.is_sparse:
                copy.grad = copy.grad.to_dense()
        return True

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()
        for copy in self._copies.values():
            copy.grad = None

    def _pieces(self, parts: Sequence[Part]) -> Iterator[Part]:
        for batch, rows in parts:
            if len(rows) <= self._samples_at_once:
                yield batch, rows
                continue
            for pieces in load_batches(self.problem, rows.split(self._samples_at_once)):
                yield from pieces


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Splits a large tensor along its first dimension into views of some `MOVED_AT_ONCE` values."""
    if x.numel() <= MOVED_AT_ONCE:
        return [x]
    return list(x.detach().split(max(1, MOVED_AT_ONCE * len(x) // x.numel())))
