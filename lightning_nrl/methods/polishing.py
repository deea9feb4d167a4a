"""Weights that were made elsewhere, polished until they break nothing that the old ones get right."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl.errors import ConfigurationError, check_kind, explain
from lightning_nrl.gradients.polish import check_margin, polish
from lightning_nrl.problem import Problem, Solution
from lightning_nrl.state import State, changed

__all__ = ["Polish"]

JUDGE = 3.0
"""Passes over known data that are left when it is over: the result is judged, unseen data are counted."""


@dataclass(frozen=True, eq=False)
class Polish:
    """Takes a model of the same architecture, such as one that was fine-tuned or retrained, and polishes it.

    The model under repair is the one that it replaces: known samples that the old one gets right are kept.

    Attributes:
        new: the new model, its state dict, or the path of a Lightning checkpoint or of a saved state dict.

    Raises:
        ConfigurationError: on construction, if `new` is none of these.

    Example::

        report = repair(Trainer(), model, datamodule=dm, ckpt_path="old.ckpt", method=Polish("new.ckpt"))
    """

    new: nn.Module | State | str | Path

    def __post_init__(self) -> None:
        fits = isinstance(self.new, (nn.Module, Mapping, str, Path))
        check_kind("Polish.new", self.new, fits, "model", "Polish(model), Polish('new.ckpt') or Polish(state_dict)")

    def __call__(self, problem: Problem) -> Solution:
        """Polishes the new weights.

        Raises:
            ConfigurationError: the new weights cannot be read, are those of another architecture, or differ beyond the
                layer that may change; or the task has no margins.
        """
        check_margin(problem)
        clock, one_pass = problem.clock, problem.clock.seconds.get("collect", 0.0)
        state = _fitting(_read(self.new), problem.model)
        _check_scope(problem, state)
        with clock.stage("judge"):
            began = time.perf_counter()
            given = problem.propose("given", state)
            first = given.step(time.perf_counter() - began, "as they came")
        with clock.stage("polish"):
            began = time.perf_counter()
            polished = polish(problem, state, seconds=clock.left - JUDGE * one_pass, after=given.after)
        proposal = problem.counted("polish", polished.state, polished.after)
        second = proposal.step(time.perf_counter() - began, polished.note)
        if not proposal.repaired:
            reason = "the new weights repair no target without breaking what is right."
            return Solution(None, reason, steps=(first, second), others=(given,))
        return Solution(proposal, steps=(first, second), others=(given,))


def _read(new: nn.Module | State | str | Path) -> Mapping[str, Any]:
    if isinstance(new, nn.Module):
        return new.state_dict()
    if isinstance(new, Mapping):
        return _state_in(new)
    try:
        found = torch.load(new, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        text = str(error).partition("\n")[0]
        raise ConfigurationError(
            explain(
                f"`Polish.new`: {str(new)!r} cannot be read ({type(error).__name__}: {text}).",
                "give the path of a checkpoint that loads with `weights_only=True`, or the model itself.",
            )
        ) from error
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            explain(
                f"`Polish.new`: {str(new)!r} holds a {type(found).__name__}.",
                "give a Lightning checkpoint or a file with a state dict.",
            )
        )
    return _state_in(found)


def _state_in(found: Mapping[str, Any]) -> Mapping[str, Any]:
    inside = found.get("state_dict")
    return inside if isinstance(inside, Mapping) else found


def _fitting(new: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The new tensors in the dtypes and on the device of the model's own."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = {name: value for name, value in new.items() if isinstance(value, Tensor)}
    wrong = [name for name in own if name not in given or given[name].shape != own[name].shape]
    more = [name for name in given if name not in own]
    if wrong or more:
        name = (wrong or more)[0]
        if name in given and name in own:
            found = f"`Polish.new` has {name!r} in the shape {list(given[name].shape)}, not {list(own[name].shape)}"
        else:
            found = f"`Polish.new` lacks {name!r}" if wrong else f"`Polish.new` has {name!r}, which is not in the model"
        others = len(wrong) + len(more) - 1
        raise ConfigurationError(
            explain(
                f"{found}; {others} more tensors do not fit." if others else f"{found}.",
                "give a model of the same architecture as the one that it replaces.",
            )
        )
    return {name: given[name].detach().to(value.device, value.dtype) for name, value in own.items()}


def _check_scope(problem: Problem, state: State) -> None:
    """Refuses weights that differ outside of what the user lets change."""
    if problem.whole:
        return
    parameters = {name for name, _ in problem.model.named_parameters()}
    beyond = [name for name in changed(problem.model, state) if name in parameters - set(problem.scope)]
    if beyond:
        raise ConfigurationError(
            explain(
                f"`layer` lets {len(problem.scope)} parameters change, but `Polish.new` differs in {beyond[0]!r} too.",
                "leave `layer` at 'auto', or give weights that differ in that layer alone.",
            )
        )
