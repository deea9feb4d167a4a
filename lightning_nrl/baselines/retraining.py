"""Training from scratch on the old data and the new: what a repair saves, and what it has to be measured by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_nrl.as_found import random_state
from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.methods.problem import Problem, Solution
from lightning_nrl.state import State, holding, snapshot

__all__ = ["Retraining", "fresh_weights"]


@dataclass(frozen=True)
class Retraining:
    """Trains anew from random weights, as the model was trained, the known failures added to the data.

    It needs `problem.training`, the model's own training; without it there is no proposal.

    Attributes:
        fresh: makes an untrained network; None: every layer of a copy is initialised again.
    """

    fresh: Callable[[], nn.Module] | None = None

    def __call__(self, problem: Problem) -> Solution:
        if problem.training is None:
            return Solution(None, "it is not known how the model was trained.")
        if not problem.whole:
            return Solution(None, "only some layers may change, and training anew changes all.")
        clock = problem.clock
        before = clock.elapsed
        start = fresh_weights(problem.model, problem.seed, self.fresh)
        state = problem.training(seconds=math.inf, seed=problem.seed, clock=clock, start=start)
        if state is None:
            return Solution(None, "training did not come to an end.")
        with clock.stage("judge"):
            proposal = problem.propose("retrain", state)
        return Solution(proposal, steps=(proposal.step(clock.elapsed - before),))


@torch.no_grad()
def fresh_weights(model: nn.Module, seed: int, make: Callable[[], nn.Module] | None = None) -> State:
    """Weights and buffers of an untrained network of the same shape. The model and the random state are left as found.

    Args:
        model: the trained network.
        seed: of the initialisation.
        make: makes an untrained network; None: `reset_parameters` of each module of the model is called on a copy.

    Returns:
        Every parameter and persistent buffer, on the model's device.

    Raises:
        ConfigurationError: a parameter belongs to a module that cannot initialise it.
    """
    state = snapshot(model)
    with random_state():
        torch.manual_seed(seed)
        if make is not None:
            made = snapshot(make())
            return {name: made[name].to(value.device, value.dtype) for name, value in state.items()}
        with holding(model, state):
            for name, module in model.named_modules():
                reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
                if callable(reset):
                    reset()
                elif any(True for _ in module.parameters(recurse=False)):
                    raise ConfigurationError(
                        explain(
                            f"`model`: {name or 'it'} ({type(module).__name__}) has weights and no `reset_parameters`.",
                            "give a function that makes an untrained network: `Retraining(fresh=lambda: Net())`.",
                        )
                    )
    return state
