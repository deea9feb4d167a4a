"""Moves weights toward earlier checkpoints that are right where the model fails (Apricot: Zhang and
Chan, ASE 2019).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.state import combined, current_state
from lightning_nrl.errors import (
    ConfigurationError,
    check_choice,
    check_kind,
    check_real,
    check_whole,
)
from lightning_nrl.methods.problem import Problem, Trained
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.methods.solvers.polish import polished
from lightning_nrl.records.steps import Step

Strategy = Literal["both", "right", "wrong"]  # `both` and its two parts; 1 to 3 in the paper

LONGEST_STEP = (
    0.2  # maximum sum of a round's factors; otherwise a round would move far if many samples fail
)
NO_CHECKPOINTS_HINT = (
    "name them, `Apricot(['epoch1.ckpt', 'epoch2.ckpt'])`, or give the Trainer a "
    "`ModelCheckpoint(monitor=..., save_top_k=5)`."
)


@dataclass(frozen=True, eq=False)
class Apricot:
    r"""Moves weights toward checkpoints that get targets right and away from wrong checkpoints,
    then
    trains further.

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
        given = self.checkpoints
        fits = given is None or isinstance(given, (str, Path, Sequence))
        check_kind(
            "Apricot.checkpoints",
            given,
            fits,
            "list of checkpoints",
            "Apricot(['epoch1.ckpt', 'epoch2.ckpt'])",
        )
        if given is not None and not given:
            raise ConfigurationError(
                "`Apricot.checkpoints` is an empty list.", "give at least one checkpoint."
            )
        check_choice("Apricot.strategy", self.strategy, get_args(Strategy))
        check_real("Apricot.rate", self.rate, "rate", "give a finite number above 0.", above=0)
        for name, least in (("rounds", 1), ("patience", 1), ("epochs", 0)):
            check_whole(f"Apricot.{name}", getattr(self, name), least)

    @property
    def wants_checkpoints(self) -> bool:
        return self.checkpoints is None

    def with_checkpoints(self, paths: Sequence[str]) -> Apricot:
        return replace(self, checkpoints=tuple(paths))

    def __call__(self, problem: Problem) -> Solution:
        """Finds new weights; raises a `ConfigurationError` if checkpoints are missing or do not fit
        the model.
        """
        clock, deadline = problem.clock, problem.deadline_of_method()
        began = time.perf_counter()
        with clock.stage("checkpoints"):
            states = self._states(problem)
            if not states:
                return Solution(
                    None, "all `Apricot.checkpoints` have the same weights as the model."
                )
            passed = torch.stack([problem.evaluate(state).passed for state in states])
        best = ahead = now = problem.original("apricot")
        start = {
            name: value for name, value in current_state(problem.model).items() if name in states[0]
        }
        tried, stale = 0, 0
        with clock.stage("move"):
            while tried < self.rounds and stale < self.patience and deadline.leaves(clock.one_pass):
                failing = problem.before.targeted & ~now.after.passed
                if not failing.any():
                    break
                factors = self.rate * pull(
                    passed[:, failing], problem.before.weight[failing], self.strategy
                )
                factors = factors * min(1.0, LONGEST_STEP / max(float(factors.abs().sum()), 1e-12))
                now = problem.propose("apricot", combined({**start, **now.state}, states, factors))
                tried += 1
                found = better([best, now])
                is_ahead = now.value - now.broken > ahead.value - ahead.broken
                stale = 0 if found is now or is_ahead else stale + 1
                best, ahead = found or best, now if is_ahead else ahead
        right = int((passed.any(0) & problem.before.targeted).sum())
        note = f"{len(states)} checkpoints, right on {right:,} of the targets; {tried} round{'s' * (tried != 1)}"
        steps = [best.step(time.perf_counter() - began, note)]
        further = self._train_and_polish(problem, ahead, steps)
        best = better([best, *further]) or best
        others = tuple(one for one in (ahead, *further) if one is not best and one.state)
        reason = (
            ""
            if best.repaired
            else "no move toward the checkpoints repairs a target within the gate."
        )
        return Solution(best if best.repaired else None, reason, tuple(steps), others)

    def _states(self, problem: Problem) -> list[dict[str, Tensor]]:
        """Reads the checkpoints that differ from the model; returns only tensors that may change."""
        argument, given = "Apricot.checkpoints", self.checkpoints
        if given is None:
            raise ConfigurationError("`Apricot.checkpoints` is missing.", NO_CHECKPOINTS_HINT)
        if isinstance(given, (str, Path)):
            given = sorted(Path(given).glob("*.ckpt"))
            if not given:
                raise ConfigurationError(
                    f"`{argument}`: {str(self.checkpoints)!r} is no folder with checkpoints.",
                    "give a folder that holds `*.ckpt` files, or a list of paths.",
                )
        own, checkpoints = current_state(problem.model), given
        names = own if problem.whole else problem.scope
        moving = {name for name in names if own[name].is_floating_point()}

        def read() -> list[dict[str, Tensor]]:
            whole = [
                fitting(argument, read_state(argument, one), problem.model) for one in checkpoints
            ]
            return [
                {name: value for name, value in state.items() if name in moving} for state in whole
            ]

        states = problem.collective.all_or_none(
            read, "a checkpoint could not be read on another rank."
        )
        return [
            state
            for state in states
            if any(not torch.equal(value, own[name]) for name, value in state.items())
        ]

    def _train_and_polish(
        self, problem: Problem, moved: Proposal, steps: list[Step]
    ) -> list[Proposal]:
        training, clock, found = problem.training, problem.clock, [moved]
        if training is not None and problem.whole and self.epochs:
            began = time.perf_counter()
            with clock.stage("fit"):
                start = {**current_state(problem.model), **moved.state}
                seconds = problem.deadline_of_method().agreed_seconds_left()
                how: dict[str, Any] = {
                    "seed": problem.seed,
                    "clock": clock,
                    "epochs": self.epochs,
                    "start": start,
                }
                work = partial(training, seconds=seconds, **how)
                trained = problem.work.once("training", work, Trained) if seconds > 0 else None
                if trained is not None:
                    found.append(problem.propose("fit", trained.state))
                    steps.append(found[-1].step(time.perf_counter() - began, "continued training"))
        if self.polish and found[-1].excess and bool(problem.before.margin.isfinite().all()):
            proposal, step, _ = polished(problem, found[-1])
            found.append(proposal)
            steps.append(step)
        return found[1:]


def pull(passed: Tensor, weight: Tensor, strategy: Strategy) -> Tensor:
    """Returns how far to move toward each of M models, `M` float64. A negative value means away
    from
    the model.

    `passed`, `M x n` bool, marks which of n failed samples each model gets right. `weight`, `n`,
    are sample weights.
    """
    right = passed.to(torch.float64)
    towards, away = right / right.sum(0).clamp_min(1), (1 - right) / (1 - right).sum(0).clamp_min(1)
    sides = {"both": towards - away, "right": towards, "wrong": -away}
    return sides[strategy] @ weight.to(torch.float64)
