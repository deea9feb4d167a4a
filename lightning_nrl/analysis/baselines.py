"""What people do instead of a repair: methods without a constraint, to be compared with.

In: a `Problem`. Out: a `Solution`, as of any method; it may break anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.preserve import random_state
from lightning_nrl._utils.registry import Registry
from lightning_nrl._utils.state import State, between, holding, snapshot
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import ConfigurationError, check_kind, check_real, check_whole
from lightning_nrl.methods import Method, Problem, Solution
from lightning_nrl.methods._solvers.descent import Descent, Loss
from lightning_nrl.methods._solvers.mini_batches import load_batches, shuffled_batches
from lightning_nrl.methods._solvers.teacher import Teacher

__all__ = [
    "BASELINES",
    "DistilledFineTuning",
    "FineTuning",
    "FurtherTraining",
    "Interpolation",
    "LayerFineTuning",
    "Retraining",
    "fresh_weights",
]

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
        task, heat, plain = problem.evaluator.task, self.temperature, _emphasised(problem, self.emphasis)
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
        return (weight[rows].to(output.device) * problem.evaluator.task.loss(output, batch.target)).sum()

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


@dataclass(frozen=True)
class Interpolation:
    """The weights (1 - a) old + a new: fewer regressions than the new ones for part of their gain.

    Schumann et al. 2024, Backward compatibility during data updates by weight interpolation. They choose a on data set
    aside; on data that the new weights were trained on, a = 1 is always the most accurate. So it is half unless told,
    which Wortsman et al. 2022 (Robust fine-tuning of zero-shot models) found good without any choice.

    Attributes:
        new: the method whose weights are the far end.
        a: the share of the new weights, above 0 and at most 1.

    Raises:
        ConfigurationError: on construction, if `new` is no method or `a` is out of its range.
    """

    new: Method = field(default_factory=FineTuning)
    a: float = 0.5

    def __post_init__(self) -> None:
        check_kind("new", self.new, callable(self.new), "method", "an object, such as FineTuning()")
        check_real("a", self.a, "share", "give a number above 0 and at most 1.", above=0, most=1)

    def __call__(self, problem: Problem) -> Solution:
        return self.towards(problem, self.new(problem))

    def towards(self, problem: Problem, end: Solution) -> Solution:
        """The same from an end that has been found already, so that it need not be trained twice."""
        if end.proposal is None:
            return end
        clock, began = problem.clock, problem.clock.elapsed
        with clock.stage("judge"):
            mixed = between(snapshot(problem.model), end.proposal.state, self.a)
            proposal = problem.propose("interpolate", mixed)
        step = proposal.step(clock.elapsed - began, f"a = {self.a:g}")
        return Solution(proposal, steps=(*end.steps, step), others=(end.proposal,))


BASELINES: Registry[Method] = Registry("baseline", "the name of one, or an object such as FineTuning()", callable)
"""The baselines that can be named, with their default settings."""

BASELINES.register("layer fine-tuning")(LayerFineTuning)
BASELINES.register("fine-tuning")(FineTuning)
BASELINES.register("distillation")(DistilledFineTuning)
BASELINES.register("interpolation")(Interpolation)
BASELINES.register("further training")(FurtherTraining)
BASELINES.register("retraining")(Retraining)
