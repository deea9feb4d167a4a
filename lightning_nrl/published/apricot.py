"""Moves weights toward checkpoints that are right where the model fails (Zhang and Chan 2019)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_nrl._trainer.lightning.packages import ModelCheckpoint, Trainer
from lightning_nrl._trainer.lightning.private_parts import callbacks_of_class
from lightning_nrl._utils.checkpoint import read_fitting
from lightning_nrl._utils.formatting import plural
from lightning_nrl._utils.state import changed, combined, current_state
from lightning_nrl.errors import (
    ConfigurationError,
    check_choice,
    check_kind,
    check_real,
    check_whole,
)
from lightning_nrl.methods import Method, Problem, Proposal, Solution, Trained, better
from lightning_nrl.methods.solvers.polish import polished
from lightning_nrl.records import Step

CHECKPOINTS_ARGUMENT = "Apricot.checkpoints"  # in messages
Strategy = Literal["both", "right", "wrong"]  # `both` and its two parts; 1 to 3 in the paper

# Maximum sum of a round's factors; otherwise a round would move far if many samples fail.
LONGEST_STEP = 0.2
NO_CHECKPOINTS_HINT = (
    "name them, `Apricot(['epoch1.ckpt', 'epoch2.ckpt'])`, or give the Trainer a "
    "`ModelCheckpoint(monitor=..., save_top_k=5)`."
)


@dataclass(frozen=True, eq=False)
class Apricot(Method):
    r"""Moves weights toward checkpoints that get targets right, away from wrong ones, and trains.

    A round moves the weights by a sum over the targets x that still fail. w_x is the sample weight
    of x, C(x) are the checkpoints that get x right, I(x) the checkpoints that get x wrong. A bar is
    a mean over checkpoints m:

    .. math:: \theta \leftarrow \theta + r \sum_x w_x (\overline{\theta_m - \theta}_{m \in C(x)}
        - \overline{\theta_m - \theta}_{m \in I(x)})

    Each round evaluates all known samples. Training then continues from the weights with the most
    repaired targets minus broken samples. Of all weights that were evaluated, the best within the
    gate are proposed.

    Attributes:
        checkpoints: a folder of `*.ckpt` files, or a list of modules, state dicts, or paths of
            Lightning checkpoints or saved state dicts, all of the model's architecture. None means
            the checkpoints that the Trainer's `ModelCheckpoint` callbacks kept (`save_top_k`).
        strategy: `right` only moves toward checkpoints in C(x), `wrong` only moves away from I(x),
            `both` does both.
        rate: the step size r per sample, above 0. If steps of a round add up to more than 0.2, they
            are scaled to 0.2.
        rounds: maximum number of rounds, from 1. Each round is one pass over the known data.
        patience: maximum number of rounds in a row without a better result, from 1.
        epochs: epochs of continued training, from 0. Ignored if the training is unknown or only
            some layers may change.
        polish: True to polish the last weights if they break more than the gate allows. This is not
            in the paper.

    Raises:
        ConfigurationError: on construction, for a wrong type or a value out of range.

    Example:
        >>> Apricot(checkpoints=["epoch=7.ckpt", "epoch=9.ckpt"], strategy="right").rate
        0.001
    """

    trains: ClassVar[bool] = True
    checkpoints: str | Path | Sequence[Any] | None = None
    strategy: Strategy = "both"
    rate: float = 1e-3
    rounds: int = 30
    patience: int = 5
    epochs: int = 1
    polish: bool = True

    def __post_init__(self) -> None:
        if self.checkpoints is not None:
            check_kind(
                CHECKPOINTS_ARGUMENT,
                self.checkpoints,
                isinstance(self.checkpoints, (str, Path, Sequence)),
                "list of checkpoints",
                "Apricot(['epoch1.ckpt', 'epoch2.ckpt'])",
            )
            if not self.checkpoints:
                raise ConfigurationError(
                    f"`{CHECKPOINTS_ARGUMENT}` is an empty list.", "give at least one checkpoint."
                )
        check_choice("Apricot.strategy", self.strategy, get_args(Strategy))
        check_real("Apricot.rate", self.rate, "rate", "give a finite number above 0.", above=0)
        check_whole("Apricot.rounds", self.rounds, 1)
        check_whole("Apricot.patience", self.patience, 1)
        check_whole("Apricot.epochs", self.epochs, 0)

    def in_trainer(self, trainer: Trainer, failing: Sequence[str] | None) -> Apricot:
        """Returns the method with the best checkpoints that the Trainer has kept."""
        if self.checkpoints is not None:
            return self
        callbacks = callbacks_of_class(trainer, ModelCheckpoint)
        best = [kept for kept in callbacks if kept.monitor is not None and kept.save_top_k != 0]
        if failing is not None and not best:
            problem = f"`{CHECKPOINTS_ARGUMENT}`: the fit saves none."
            raise ConfigurationError(problem, NO_CHECKPOINTS_HINT)
        paths = [path for callback in best for path in sorted(callback.best_k_models)]
        return replace(self, checkpoints=tuple(paths) or None)

    def __call__(self, problem: Problem) -> Solution:
        """Finds new weights; refuses checkpoints that are missing or do not fit the model."""
        clock = problem.clock
        deadline = problem.deadline_of_method()
        began = time.perf_counter()
        with clock.stage("checkpoints"):
            states = self._states(problem)
            if not states:
                return Solution(
                    None, f"all `{CHECKPOINTS_ARGUMENT}` have the same weights as the model."
                )
            passed = torch.stack([problem.evaluate(state).passed for state in states])
        best = ahead = current = problem.original("apricot")
        live = current_state(problem.model)
        start = {name: value for name, value in live.items() if name in states[0]}
        n_rounds = 0
        n_stale = 0
        with clock.stage("move"):
            while n_rounds < self.rounds and n_stale < self.patience:
                failing = problem.before.targeted & ~current.after.passed
                if not deadline.leaves(clock.one_pass) or not failing.any():
                    break
                factors = self.rate * pull(
                    passed[:, failing], problem.before.weight[failing], self.strategy
                )
                factors = factors * min(1.0, LONGEST_STEP / max(float(factors.abs().sum()), 1e-12))
                state = combined({**start, **current.state}, states, factors)
                current = problem.propose("apricot", state)
                n_rounds += 1
                n_stale += 1
                if better([best, current]) is current:
                    best = current
                    n_stale = 0
                if current.value - current.broken > ahead.value - ahead.broken:
                    ahead = current
                    n_stale = 0
        n_right = int((passed.any(0) & problem.before.targeted).sum())
        note = (
            f"{len(states)} checkpoints, right on {n_right:,} of the targets; "
            f"{plural(n_rounds, 'round')}"
        )
        steps = [best.step(time.perf_counter() - began, note)]
        trained = self._train_and_polish(problem, ahead, steps)
        best = better([best, *trained]) or best
        if best.repaired:
            return Solution(best, steps=steps)
        return Solution(
            None, "no move toward the checkpoints repairs a target within the gate.", steps
        )

    def _states(self, problem: Problem) -> list[dict[str, Tensor]]:
        """Returns the tensors that may change, of each checkpoint that differs from the model."""
        checkpoints = self.checkpoints
        if checkpoints is None:
            raise ConfigurationError(f"`{CHECKPOINTS_ARGUMENT}` is missing.", NO_CHECKPOINTS_HINT)
        if isinstance(checkpoints, (str, Path)):
            checkpoints = sorted(Path(checkpoints).glob("*.ckpt"))
            if not checkpoints:
                raise ConfigurationError(
                    f"`{CHECKPOINTS_ARGUMENT}`: {str(self.checkpoints)!r} is no folder with "
                    "checkpoints.",
                    "give a folder that holds `*.ckpt` files, or a list of paths.",
                )
        old = current_state(problem.model)
        names = old if problem.whole_network else problem.scope
        moving = {name for name in names if old[name].is_floating_point()}

        def read() -> list[dict[str, Tensor]]:
            states = []
            for checkpoint in checkpoints:
                state = read_fitting(CHECKPOINTS_ARGUMENT, checkpoint, problem.model)
                states.append({name: value for name, value in state.items() if name in moving})
            return states

        states = problem.collective.all_or_none(
            read, "a checkpoint could not be read on another rank."
        )
        return [state for state in states if changed(problem.model, state)]

    def _train_and_polish(
        self, problem: Problem, moved: Proposal, steps: list[Step]
    ) -> list[Proposal]:
        training = problem.training
        proposals = [moved]
        if training is not None and problem.whole_network and self.epochs:
            began = time.perf_counter()
            with problem.clock.stage("fit"):
                seconds = problem.deadline_of_method().agreed_seconds_left()
                work = partial(
                    training,
                    seconds=seconds,
                    seed=problem.seed,
                    clock=problem.clock,
                    epochs=self.epochs,
                    start={**current_state(problem.model), **moved.state},
                )
                trained = None
                if seconds > 0:
                    trained = problem.work.once("training", work, Trained)
                if trained is not None:
                    proposal = problem.propose("fit", trained.state)
                    proposals.append(proposal)
                    steps.append(proposal.step(time.perf_counter() - began, "continued training"))
        if self.polish and proposals[-1].excess and problem.before.has_margins:
            proposal, step, _ = polished(problem, proposals[-1])
            proposals.append(proposal)
            steps.append(step)
        return proposals[1:]


def pull(passed: Tensor, weight: Tensor, strategy: Strategy) -> Tensor:
    """Returns how far to move toward each of M models, `M` float64; below 0 is away from it.

    `passed`, `M x n` bool, marks which of n failed samples each model gets right. `weight`, `n`,
    are sample weights.
    """
    right = passed.to(torch.float64)
    wrong = 1 - right
    towards = right / right.sum(0).clamp_min(1)
    away = wrong / wrong.sum(0).clamp_min(1)
    sides = {"both": towards - away, "right": towards, "wrong": -away}
    return sides[strategy] @ weight.to(torch.float64)
