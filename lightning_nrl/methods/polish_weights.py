"""`Polish`: small steps from the model's weights, or from other ones, until nothing is broken."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from lightning_nrl._utils.checkpoint import read_fitting
from lightning_nrl._utils.state import State, changed
from lightning_nrl.errors import ConfigurationError, check_kind
from lightning_nrl.evaluation.evaluator import Need
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Solution
from lightning_nrl.methods.solvers.polish import polished
from lightning_nrl.records import Step


@dataclass(frozen=True, eq=False)
class Polish(Method):
    """Takes small steps until no known sample that the model under repair gets right is broken.

    By default the steps start at the model under repair and repair its targets. With `new` they
    start at a fine-tuned or retrained model of the same architecture and restore samples that it
    breaks.

    Attributes:
        new: the model to start at, its state dict, or the path of a Lightning checkpoint or saved
            state dict. None means the model under repair.
        share: share of the time left that the steps may use.

    Raises:
        ConfigurationError: on construction, if `new` has another type.

    Example::

        method = Polish("new.ckpt")
        report = repair(Trainer(), model, datamodule=dm, ckpt_path="old.ckpt", method=method)
    """

    needs: ClassVar[tuple[Need, ...]] = ("margins",)
    new: nn.Module | State | str | Path | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        fits = self.new is None or isinstance(self.new, (nn.Module, Mapping, str, Path))
        check_kind(
            "Polish.new",
            self.new,
            fits,
            "model",
            "Polish(model), Polish('new.ckpt') or Polish(state_dict)",
        )

    def check(self, model: nn.Module) -> None:
        """Raises a `ConfigurationError` if `new` cannot be read or does not fit the model."""
        if self.new is not None:
            read_fitting("Polish.new", self.new, model)

    def __call__(self, problem: Problem) -> Solution:
        """Polishes; raises a `ConfigurationError` if `new` does not fit or there are no margins."""
        deadline = problem.deadline_of_method(self.share)
        steps: tuple[Step, ...] = ()
        if self.new is None:
            start = problem.counted("original", {}, problem.before)
            reason = "small steps repair no target without breaking what is right."
        else:
            reason = "the new weights repair no target without breaking what is right."
            state = read_fitting("Polish.new", self.new, problem.model)
            _check_scope(problem, state)
            with problem.clock.stage("judge"):
                began = time.perf_counter()
                start = problem.propose("given", state)
                steps = (start.step(time.perf_counter() - began, "before the polish"),)
        proposal, step, _ = polished(problem, start, deadline=deadline, enforce=self.new is None)
        steps = (*steps, step)
        if not proposal.repaired:
            return Solution(None, reason, steps)
        return Solution(proposal, steps=steps)


def _check_scope(problem: Problem, state: State) -> None:
    if problem.whole_network:
        return
    parameters = dict(problem.model.named_parameters())
    for name in changed(problem.model, state):
        if name in parameters and name not in problem.scope:
            raise ConfigurationError(
                f"`layer` lets only {len(problem.scope)} parameters change, "
                f"but `Polish.new` differs in {name!r} too.",
                "leave `layer` at 'auto', or give weights that differ in that layer alone.",
            )
