"""The model's own training on the old data and the new, from scratch or from the old weights on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_nrl._utils.preserve import random_state
from lightning_nrl._utils.state import State, holding, snapshot
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.problem import Problem, Solution

__all__ = ["FurtherTraining", "Retraining", "fresh_weights"]


@dataclass(frozen=True)
class Retraining:
    """Trains anew from random weights, as the model was trained, the known failures added to the data.

    It needs `problem.training`, the model's own training; without it there is no proposal.

    Attributes:
        fresh: makes an untrained network; None: every layer of a copy is initialised again.

    Raises:
        ConfigurationError: on construction, if `fresh` is no function.
    """

    fresh: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        if self.fresh is not None and (isinstance(self.fresh, nn.Module) or not callable(self.fresh)):
            found = type(self.fresh).__name__
            raise ConfigurationError(
                f"`fresh`: a {found} makes no network.", "give a function that does: `fresh=lambda: Net()`."
            )

    def __call__(self, problem: Problem) -> Solution:
        start = None if _obstacle(problem) else fresh_weights(problem.model, problem.seed, self.fresh)
        return _trained(problem, "retrain", math.inf, start)


@dataclass(frozen=True)
class FurtherTraining:
    """Trains on from the old weights, as the model was trained, the known failures added to the data (a warm start).

    Learning rate, schedule and augmentation are those of the training, for as many epochs or as many as there is time
    for. It needs `problem.training`.
    """

    def __call__(self, problem: Problem) -> Solution:
        return _trained(problem, "train", problem.clock.left - problem.clock.one_pass)


def _trained(problem: Problem, name: str, seconds: float, start: State | None = None) -> Solution:
    obstacle = _obstacle(problem)
    if obstacle or problem.training is None:
        return Solution(None, obstacle)
    clock, began = problem.clock, problem.clock.elapsed
    with clock.stage(name):
        state = problem.training(seconds=seconds, seed=problem.seed, clock=clock, start=start)
    if state is None:
        return Solution(None, "training did not come to an end.")
    with clock.stage("judge"):
        proposal = problem.propose(name, state)
    return Solution(proposal, steps=(proposal.step(clock.elapsed - began),))


def _obstacle(problem: Problem) -> str:
    """Why the whole network cannot be trained as it was, in words; empty if it can."""
    if problem.training is None:
        return "it is not known how the model was trained."
    return "" if problem.whole else "only some layers may change, and its training changes all."


@torch.no_grad()
def fresh_weights(model: nn.Module, seed: int, make: Callable[[], nn.Module] | None = None) -> State:
    """Weights and buffers of an untrained network of the same shape, on the model's device; the model stays as it is.

    Args:
        model: the trained network.
        seed: of the initialisation.
        make: makes an untrained network; None: `reset_parameters` of each module of the model is called on a copy.

    Raises:
        ConfigurationError: a parameter belongs to a module that cannot initialise it, or another network was made.
    """
    state = snapshot(model)
    with random_state():
        torch.manual_seed(seed)
        if make is not None:
            made = snapshot(make())
            for name, value in state.items():
                if name not in made or made[name].shape != value.shape:
                    found = f"has the shape {list(made[name].shape)}" if name in made else "is not there"
                    raise ConfigurationError(
                        f"`fresh`: {name!r} {found} in what it made.", "make the network that was trained."
                    )
            return {name: made[name].to(value.device, value.dtype) for name, value in state.items()}
        with holding(model, state):
            for name, module in model.named_modules():
                reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
                if callable(reset):
                    reset()
                elif any(True for _ in module.parameters(recurse=False)):
                    raise ConfigurationError(
                        f"`model`: {name or 'it'} ({type(module).__name__}) has weights and no `reset_parameters`.",
                        "give a function that makes an untrained network: `Retraining(fresh=lambda: Net())`.",
                    )
    return state
