"""Baselines without a constraint against regressions, such as fine-tuning and retraining."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_nrl._utils.checkpoint import fitting
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.preserve import random_state
from lightning_nrl._utils.registry import Registry
from lightning_nrl._utils.state import State, between, snapshot, temporary_weights
from lightning_nrl.data import Batch
from lightning_nrl.errors import ConfigurationError, check_kind, check_real, check_whole
from lightning_nrl.methods import Method, Problem, Solution
from lightning_nrl.methods.solvers.descent import Descent, Loss
from lightning_nrl.methods.solvers.mini_batches import load_batches, shuffled_batches
from lightning_nrl.methods.solvers.teacher import Teacher

__all__ = [
    "BASELINES",
    "DistilledFineTuning",
    "FineTuning",
    "FurtherTraining",
    "Interpolation",
    "LayerFineTuning",
    "Retraining",
]

# Fewest steps of fine-tuning, about 8 epochs of 6,000 samples; fewer samples get more epochs.
STEPS = 400
TIMED = 4  # the time per step is first estimated after this many steps


@dataclass(frozen=True)
class FineTuning(Method):
    """Fine-tunes on all known data, with more weight on the targeted failures.

    Nothing limits regressions. AdamW minimises the task's loss, starting from the model's weights.
    The model stays in evaluation mode: batch norm uses its stored statistics, and dropout is off.
    Samples are read without augmentation.

    Attributes:
        epochs: passes over all known data. Small data get more passes, so that there are at least
            400 steps.
        learning_rate: initial learning rate of AdamW, which falls to 0 by a cosine over the steps
            that the time allows.
        emphasis: weight of the loss of a targeted sample; other samples have weight 1.
    """

    epochs: int = 8  # more epochs gain little: regressions grow along with repairs
    learning_rate: float = 3e-4
    emphasis: float = 3.0

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1)
        hint = "give a number above 0."
        check_real("learning_rate", self.learning_rate, "number", hint, above=0)
        check_real("emphasis", self.emphasis, "number", hint, above=0)

    def __call__(self, problem: Problem) -> Solution:
        return _fine_tune(problem, self, _weighted_loss(problem, self.emphasis))


@dataclass(frozen=True)
class LayerFineTuning(FineTuning):
    """Fine-tunes only the layers that a swarm would search."""

    # Of 3e-4 to 1e-2, the best ratio of repaired to broken samples on digits and vehicles.
    learning_rate: float = 1e-2

    def __call__(self, problem: Problem) -> Solution:
        return super().__call__(replace(problem, scope=tuple(problem.space.parameters)))


@dataclass(frozen=True)
class DistilledFineTuning(FineTuning):
    """Fine-tunes with distillation from the model before, strongest where that model is right.

    Each sample's loss gets an added term: a weight times the divergence from the output before the
    tuning, with both outputs divided by `temperature`. The weight is `base + scale` if the sample
    was right before, else `base` (Yan et al. 2021, Positive-congruent training; the defaults are
    from this paper). The divergence is multiplied by the squared temperature, which keeps the size
    of its gradient (Hinton et al. 2015).
    """

    base: float = 1.0
    scale: float = 5.0
    temperature: float = 100.0

    def __call__(self, problem: Problem) -> Solution:
        task, temperature = problem.evaluator.task, self.temperature
        task_loss = _weighted_loss(problem, self.emphasis)
        teacher = Teacher(problem)
        weight = self.base + self.scale * problem.before.passed.float()

        def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
            old = at_least_float32(teacher(batch, rows, output.shape)) / temperature
            new = at_least_float32(output) / temperature
            distance = temperature**2 * task.divergence(new, old, batch.target)
            weighted = weight[rows].to(output.device) * distance
            return task_loss(batch, rows, output) + weighted.sum()

        return _fine_tune(problem, self, loss)


def _weighted_loss(problem: Problem, emphasis: float) -> Loss:
    weight = 1 + (emphasis - 1) * problem.before.targeted.float()

    def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
        losses = problem.evaluator.task.loss(output, batch.target)
        return (weight[rows].to(output.device) * losses).sum()

    return loss


def _fine_tune(problem: Problem, settings: FineTuning, loss: Loss) -> Solution:
    start = problem.clock.elapsed
    with problem.clock.stage("tune"):
        state, epochs = _train_epochs(problem, settings, loss)
    if not epochs:
        return Solution(None, "there was no time for an epoch.")
    return _propose(problem, "tune", state, start, f"{epochs:.3g} epochs")


def _propose(problem: Problem, name: str, state: State, start: float, note: str = "") -> Solution:
    with problem.clock.stage("judge"):
        proposal = problem.propose(name, state)
    return Solution(proposal, steps=(proposal.step(problem.clock.elapsed - start, note),))


def _train_epochs(problem: Problem, settings: FineTuning, loss: Loss) -> tuple[State, float]:
    """Trains as many epochs as the time allows; returns the weights and the number of epochs."""
    rows = torch.arange(len(problem.before))
    generator = torch.Generator().manual_seed(problem.seed)
    descent = Descent(problem, {}, partial(torch.optim.AdamW, lr=settings.learning_rate))
    epoch_steps = len(shuffled_batches(rows, torch.Generator()))
    n_epochs = max(settings.epochs, -(-STEPS // epoch_steps))
    n_steps = n_epochs * epoch_steps
    step, start = 0, 0.0
    while step < n_steps and not problem.collective.any(problem.clock.left <= 0):
        for parts in load_batches(problem, shuffled_batches(rows, generator)):
            decay = (1 + math.cos(math.pi * step / n_steps)) / 2
            descent.step(parts, loss, rate=settings.learning_rate * decay)
            step += 1
            if step == 1:
                start = problem.clock.elapsed  # the first step also warms up
            elif step == 1 + TIMED or step % epoch_steps == 0:
                pace = (problem.clock.elapsed - start) / (step - 1)
                n_steps = min(n_steps, step + _steps_left(problem, pace))
            if step >= n_steps:
                break
    return descent.state(), step / epoch_steps


def _steps_left(problem: Problem, pace: float) -> int:
    """Estimates how many steps all ranks have time for before a final pass over the data."""
    left = problem.clock.left - problem.clock.one_pass
    steps = min(max(0.0, left) / max(pace, 1e-9), 1e9)
    return int(problem.collective.agreed(torch.tensor(int(steps))))


@dataclass(frozen=True)
class Retraining(Method):
    """Repeats the model's own training from random weights, with the known failures added.

    Needs `problem.training`, which runs this training. `fresh` returns an untrained network. If it
    is None, each module of the model initialises itself anew by `reset_parameters`.
    """

    fresh: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        if self.fresh is not None:
            fits = callable(self.fresh) and not isinstance(self.fresh, nn.Module)
            check_kind(
                "fresh", self.fresh, fits, "function that makes a network", "fresh=lambda: Net()"
            )

    def __call__(self, problem: Problem) -> Solution:
        weights = partial(fresh_weights, problem.model, problem.seed, self.fresh)
        return _train(problem, "retrain", math.inf, weights)


@dataclass(frozen=True)
class FurtherTraining(Method):
    """Continues the model's own training, `problem.training`, with the known failures added."""

    def __call__(self, problem: Problem) -> Solution:
        return _train(problem, "train", problem.clock.left - problem.clock.one_pass)


def _train(
    problem: Problem, name: str, seconds: float, weights: Callable[[], State | None] = lambda: None
) -> Solution:
    if problem.training is None:
        return Solution(None, "it is not known how the model was trained.")
    if not problem.whole_network:
        return Solution(None, "only some layers may change, but training changes all.")
    clock, start = problem.clock, problem.clock.elapsed
    with clock.stage(name):
        trained = problem.training(seconds=seconds, seed=problem.seed, clock=clock, start=weights())
    if trained is None:
        return Solution(None, "training did not finish.")
    return _propose(problem, name, trained.state, start)


@torch.no_grad()
def fresh_weights(
    model: nn.Module, seed: int, make: Callable[[], nn.Module] | None = None
) -> State:
    """Returns weights and buffers of an untrained network of the model's architecture.

    `make` returns such a network. With None, each module initialises itself by `reset_parameters`;
    the model's own weights are restored afterwards. Raises `ConfigurationError` if a module with
    parameters has no such method, or if `make` returns a network of another architecture.
    """
    state = snapshot(model)
    with random_state():
        torch.manual_seed(seed)
        if make is not None:
            return fitting("fresh", make().state_dict(), model)
        with temporary_weights(model, state):
            for name, module in model.named_modules():
                _reset(name, module)
    return state


def _reset(name: str, module: nn.Module) -> None:
    # MultiheadAttention and Transformer have the second name.
    reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
    if reset is not None:
        reset()
    elif list(module.parameters(recurse=False)):
        raise ConfigurationError(
            f"`model`: {name or 'it'} ({type(module).__name__}) has weights, but no "
            "`reset_parameters`.",
            "give a function that makes an untrained network: `Retraining(fresh=lambda: Net())`.",
        )


@dataclass(frozen=True)
class Interpolation(Method):
    """Interpolates to the weights w of the method `new` from the model's w0: (1 - a) w0 + a w.

    Compared with w, the mixed weights break fewer samples and repair fewer, too. Schumann et al.
    2024 (Backward compatibility during data updates by weight interpolation) choose `a` on data
    that w was not trained on, since `a=1` is always best on its training data. Wortsman et al. 2022
    (Robust fine-tuning of zero-shot models) recommend 0.5.
    """

    new: Method = field(default_factory=FineTuning)
    a: float = 0.5

    def __post_init__(self) -> None:
        is_method = isinstance(self.new, Method)
        check_kind("new", self.new, is_method, "method", "an object, such as FineTuning()")
        check_real("a", self.a, "share", "give a number above 0 and at most 1.", above=0, most=1)

    def __call__(self, problem: Problem) -> Solution:
        return self.towards(problem, self.new(problem))

    def towards(self, problem: Problem, end: Solution) -> Solution:
        """Interpolates towards a known solution of the method `new`, which does not run again."""
        if end.proposal is None:
            return end
        start = problem.clock.elapsed
        mixed = between(snapshot(problem.model), end.proposal.state, self.a)
        solution = _propose(problem, "interpolate", mixed, start, f"a = {self.a:g}")
        return replace(solution, steps=(*end.steps, *solution.steps))


BASELINES: Registry[Method] = Registry(
    "baseline", "the name of one, or an object such as FineTuning()", callable
)
"""Baselines by name, with default settings."""

BASELINES.register("layer fine-tuning")(LayerFineTuning)
BASELINES.register("fine-tuning")(FineTuning)
BASELINES.register("distillation")(DistilledFineTuning)
BASELINES.register("interpolation")(Interpolation)
BASELINES.register("further training")(FurtherTraining)
BASELINES.register("retraining")(Retraining)
