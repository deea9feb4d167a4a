"""Fine-tuning on known data, and fine-tuning that is held to the old model (PC-training)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._optim.descent import Descent, Loss
from lightning_nrl._optim.mini_batches import load_batches, shuffled_batches
from lightning_nrl._optim.teacher import Teacher
from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl._utils.state import State
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import check_real, check_whole
from lightning_nrl.problem import Problem, Solution

__all__ = ["DistilledFineTuning", "FineTuning", "LayerFineTuning"]

EPOCHS = 8  # more gains little: regressions grow along with repairs
STEPS = 400  # about what that is on 6,000 samples; small data are gone through more often, or nothing would move
LEARNING_RATE = 3e-4
LAYER_LEARNING_RATE = 1e-2  # of 3e-4 to 1e-2 it repairs most for what it breaks, on digits and on vehicles
EMPHASIS = 3.0  # times the loss of a targeted sample
TIMED = 4  # steps, after a first one, to find how many there is time for


@dataclass(frozen=True)
class FineTuning:
    """Goes on with gradient steps on all known data, the targeted failures weighted up, whatever breaks.

    AdamW on the task's loss from the deployed weights. Batch norm stays in evaluation mode with the deployed
    statistics, dropout is off, and samples come as in validation, without augmentation.

    Attributes:
        epochs: passes over all known data; more on small data, until some hundred steps are made.
        learning_rate: of AdamW, falling to 0 along half a cosine, over as many steps as there is time for.
        emphasis: how many times the loss of a targeted sample counts.

    Raises:
        ConfigurationError: on construction, if a number is out of its range.
    """

    epochs: int = EPOCHS
    learning_rate: float = LEARNING_RATE
    emphasis: float = EMPHASIS

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1)
        for name in ("learning_rate", "emphasis"):
            check_real(name, getattr(self, name), "number", "give a number above 0.", above=0)

    def __call__(self, problem: Problem) -> Solution:
        return _tuned(problem, self, _emphasised(problem, self.emphasis))


@dataclass(frozen=True)
class LayerFineTuning(FineTuning):
    """Fine-tuning of the layers that a swarm would search, and of nothing else.

    With a learning rate that fits: at that of a whole network one layer hardly moves.
    """

    learning_rate: float = LAYER_LEARNING_RATE

    def __call__(self, problem: Problem) -> Solution:
        searched = tuple(problem.space.parameters)
        return super().__call__(replace(problem, scope=searched))


@dataclass(frozen=True)
class DistilledFineTuning(FineTuning):
    """Fine-tuning that is held to the old model's outputs, most of all where it is right.

    To each sample's loss it adds `base + scale [old model right]` times the divergence from the old model's output at
    a temperature (Yan et al. 2021, Positive-congruent training, whose weights these are).

    Attributes:
        base: weight of the divergence on every sample.
        scale: what is added to it where the old model is right.
        temperature: what outputs are divided by; the divergence is multiplied by its square, so that its gradient
            keeps its size (Hinton et al. 2015).
    """

    base: float = 1.0
    scale: float = 5.0
    temperature: float = 100.0

    def __call__(self, problem: Problem) -> Solution:
        task, heat, plain = problem.task, self.temperature, _emphasised(problem, self.emphasis)
        teacher = Teacher(problem, ({},), torch.zeros(len(problem.before), dtype=torch.int64))
        weight = self.base + self.scale * problem.before.passed.float()

        def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
            old = at_least_float32(teacher(batch, rows, output.shape))
            apart = heat**2 * task.divergence(at_least_float32(output) / heat, old / heat, batch.target)
            return plain(batch, rows, output) + (weight[rows].to(output.device) * apart).sum()

        return _tuned(problem, self, loss)


def _emphasised(problem: Problem, emphasis: float) -> Loss:
    weight = 1 + (emphasis - 1) * problem.before.targeted.float()

    def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
        return (weight[rows].to(output.device) * problem.task.loss(output, batch.target)).sum()

    return loss


def _tuned(problem: Problem, settings: FineTuning, loss: Loss) -> Solution:
    clock, began = problem.clock, problem.clock.elapsed
    with clock.stage("tune"):
        state, epochs = _descended(problem, settings, loss)
    if not epochs:
        return Solution(None, "there was no time for an epoch.")
    with clock.stage("judge"):
        proposal = problem.propose("tune", state)
    step = proposal.step(clock.elapsed - began, f"{epochs:.3g} epochs")
    return Solution(proposal, steps=(step,))


def _descended(problem: Problem, settings: FineTuning, loss: Loss) -> tuple[State, float]:
    """The weights after all epochs, or after as many as there is time for, and how many these are.

    Where time is short the schedule is shorter, too: weights do not settle before the learning rate has fallen.
    """
    rows = torch.arange(len(problem.before))
    generator = torch.Generator().manual_seed(problem.seed)
    descent = Descent(problem, {}, partial(torch.optim.AdamW, lr=settings.learning_rate))
    a_pass = len(shuffled_batches(rows, torch.Generator()))
    total, step, began = max(settings.epochs, -(-STEPS // a_pass)) * a_pass, 0, 0.0
    while step < total and not problem.collective.any(problem.clock.left <= 0):
        for parts in load_batches(problem, shuffled_batches(rows, generator)):
            descent.step(parts, loss, rate=settings.learning_rate * (1 + math.cos(math.pi * step / total)) / 2)
            step += 1
            if step == 1:
                began = problem.clock.elapsed  # the first step also warms up
            elif step == 1 + TIMED or step % a_pass == 0:
                total = min(total, step + _steps_left(problem, (problem.clock.elapsed - began) / (step - 1)))
            if step >= total:
                break
    return descent.state(), step / a_pass


def _steps_left(problem: Problem, pace: float) -> int:
    """How many steps there is time for, a last pass over the data excepted; the first rank's answer."""
    left = problem.clock.left - problem.clock.one_pass
    steps = int(min(max(0.0, left) / max(pace, 1e-9), 1e9))
    return steps if math.isinf(left) else int(problem.collective.agreed(torch.tensor(steps)))
