"""Gradient steps on a copy of the weights, with samples of all known splits and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_nrl._utils.device import none_if_out_of_memory, repeatable_gradients
from lightning_nrl._utils.state import State, live_tensors, temporary_weights
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import DeviceMemoryError
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solvers.mini_batches import BATCH_SIZE, Part, load_batches

MAX_SAMPLE_WEIGHT = 10.0  # a larger weight would drown all other losses

Loss = Callable[[Batch, Tensor, Tensor], Tensor]
"""Takes a batch, its rows among the known samples, and its logits; returns the sum of the samples'
losses.
"""


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
        parameters = dict(problem.model.named_parameters())
        given = {id(live[name]): value for name, value in state.items()}
        moving = {id(parameters[name]) for name in problem.scope}
        self._given = {k: v.detach().clone() for k, v in state.items() if id(live[k]) not in moving}
        # Detached, or gradients would accumulate in the live parameters.
        fixed = {
            k: v.detach()
            for k, v in parameters.items()
            if id(v) not in moving and id(v) not in given
        }
        self._frozen = fixed | self._given
        self._dtypes = {name: parameters[name].dtype for name in problem.scope}
        self._copies = {
            name: given.get(id(parameters[name]), parameters[name])
            .detach()
            .to(torch.promote_types(dtype, torch.float32), copy=True)
            .requires_grad_()
            for name, dtype in self._dtypes.items()
        }
        self._masked = [
            (self._copies[k], mask.to(self._copies[k].device)) for k, mask in (masks or {}).items()
        ]
        self._samples_at_once = BATCH_SIZE
        self.optimizer = optimizer(list(self._copies.values()))

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Returns the scope's current weights in the model's dtypes, and all other tensors of the
        initial `state`.
        """
        moved = {
            name: value.detach().to(self._dtypes[name], copy=True)
            for name, value in self._copies.items()
        }
        return {**self._given, **moved}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Gives the model the copies, in its dtypes, in a `with` statement. Gradients reach the
        float32 copies.
        """
        cast = {name: value.to(self._dtypes[name]) for name, value in self._copies.items()}
        with temporary_weights(self.problem.model, {**self._frozen, **cast}):
            yield

    def step(self, parts: Iterable[Part], loss: Loss, *, rate: float | None = None) -> None:
        """Makes one step on a mini-batch, of which each rank passes its `parts`. `rate` replaces
        the
        learning rate.

        Raises:
            DeviceMemoryError: on all ranks, before the step, if a single sample exceeds the memory
                of one rank.
        """
        for group in self.optimizer.param_groups if rate is not None else ():
            group["lr"] = rate
        has_fitted = self._backward(list(parts), loss)
        if self.problem.collective.world_size > 1:
            has_fitted = self._sum_gradients(has_fitted)
        if not has_fitted:
            self.optimizer.zero_grad()
            raise DeviceMemoryError(
                "the gradient of a single sample does not fit in the memory of the device.",
                "name a later `layer`, or free memory.",
            )
        old = [x.detach().clone() for x, _ in self._masked]
        for x, mask in self._masked:
            if x.grad is not None:
                x.grad = x.grad.where(mask, 0)
        self.optimizer.step()
        for (x, mask), value in zip(self._masked, old, strict=True):
            # Weight decay also moves weights without gradients.
            x.detach().copy_(x.detach().where(mask, value))
        self.optimizer.zero_grad()

    def _backward(self, parts: Sequence[Part], loss: Loss) -> bool:
        """Adds gradients of this rank's parts to the copies; returns False if a single sample
        exceeds the memory.
        """

        def work() -> bool:
            with torch.enable_grad(), repeatable_gradients(self.problem.model), self.running():
                for batch, rows in self._pieces(parts):
                    loss(batch, rows, self.problem.evaluator.output(batch)).backward()
            return True

        while none_if_out_of_memory(work) is None:
            self.optimizer.zero_grad()
            most = min(self._samples_at_once, max(len(rows) for _, rows in parts))
            if most <= 1:
                return False
            self._samples_at_once = most // 2
        return True

    def _pieces(self, parts: Sequence[Part]) -> Iterator[Part]:
        for part in parts:
            if len(part[1]) <= self._samples_at_once:
                yield part
                continue
            for pieces in load_batches(self.problem, part[1].split(self._samples_at_once)):
                yield from pieces

    def _sum_gradients(self, has_fitted: bool) -> bool:
        """Sums gradients over ranks; returns False if `has_fitted` is False on a rank."""
        copies = list(self._copies.values())
        mine = [(torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in copies]
        flags = torch.tensor([*(x.grad is not None for x in copies), not has_fitted]).to(mine[0])
        total = self.problem.collective.sum(torch.cat([*mine, flags]))
        *grads, flags = total.split([*(x.numel() for x in copies), len(copies) + 1])
        *used, failed = flags.tolist()
        for x, grad, ranks in zip(copies, grads, used, strict=True):
            # A parameter that has no gradient on any rank gets none, as on a single rank, so weight
            # decay skips it.
            x.grad = grad.view_as(x).to(x.dtype) if ranks else None
        return not failed
