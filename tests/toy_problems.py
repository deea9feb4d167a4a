"""Problems to hand to a method, and what must be true of a model that a method has seen."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_repairs import blobs

from lightning_nrl import Target, TensorSource
from lightning_nrl._utils.device import Context
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import State, between, snapshot, temporary_weights
from lightning_nrl._utils.timing import Deadline, StageTimer
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import find_scope
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Method, Problem, Solution, Training
from lightning_nrl.methods.problem import Trained
from lightning_nrl.methods.solvers.distill import distill
from lightning_nrl.search import Fitness
from lightning_nrl.tasks import Multiclass, Task


@dataclass(frozen=True, eq=False)
class Share(TensorSource):
    """One rank's share of a split, dealt out one by one."""

    rank: int = 0
    world_size: int = 1

    @property
    def positions(self) -> Tensor:
        return self.index[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[Batch]:
        yield from self.draw(
            [places for places in self.positions.split(self.batch_size) if len(places)]
        )


class Marginless(Multiclass):
    """Knows no margins."""

    def margin(self, output: Tensor, target: Tensor) -> Any:
        return None


def make_problem(
    model: nn.Module,
    sources: Sequence[Any],
    layer: str | Sequence[str] = "auto",
    *,
    target: Target | None = None,
    task: Task | None = None,
    context: Context = nullcontext,
    collective: Any = None,
    bias: bool = False,
    **rest: Any,
) -> Problem:
    """The model in evaluation mode on known data, all failures of the marked sources to be
    repaired.
    """
    space, scope = find_scope(model.eval(), layer, include_bias=bias)
    evaluator = Evaluator(model, task or Multiclass(), context, collective or Collective())
    before = evaluator.run(sources, Target.all() if target is None else target)
    settings = {
        "scope": scope,
        "whole_network": layer == "auto",
        "localizer": NeuRecoverLite(),
        "fitness": Fitness(),
        "passed": before.passed,
        **rest,
    }
    return Problem(evaluator, sources, before, space, **settings)


@dataclass(frozen=True)
class ByFunction(Method):
    """A method that calls a function."""

    function: Callable[[Problem], Solution]

    def __call__(self, problem: Problem) -> Solution:
        return self.function(problem)


class FakeTraining(Training):
    """A training that gives one state a call, the last of them from there on, or what `gives` says;
    it writes calls down.
    """

    def __init__(
        self,
        *states: State | None,
        gives: Callable[..., State | None] | None = None,
        epochs: int = 10,
    ) -> None:
        self.states = states
        self.gives = gives
        self.epochs = epochs
        self.calls = []

    def __call__(self, *, clock: StageTimer, **call: Any) -> Trained | None:
        state = self.states[min(len(self.calls), len(self.states) - 1)] if self.states else None
        self.calls.append(call)
        if self.gives is not None:
            state = self.gives(**call)
        epochs = float(call["epochs"])
        return None if state is None else Trained(state, epochs, epochs)


def cast(sources: Sequence[TensorSource], dtype: torch.dtype) -> list[TensorSource]:
    return [
        TensorSource(s.inputs.to(dtype), s.targets, s.split, s.passed, s.failed, batch_size=32)
        for s in sources
    ]


def shares(
    sources: Sequence[TensorSource], rank: int, world_size: int, batch_size: int = 16
) -> list[Share]:
    changes = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
    return [Share(**{**vars(source), **changes}) for source in sources]


def together(
    model: nn.Module,
    sources: Sequence[TensorSource],
    work: Callable[[Problem], Any],
    world_size: int = 2,
    **rest: Any,
) -> list[Any]:
    """What work gives on each of several ranks, each with a copy of the model and its share of the
    data.
    """
    models = [copy.deepcopy(model) for _ in range(world_size)]

    def run(collective: Any) -> Any:
        share = shares(sources, collective.rank, world_size)
        return work(make_problem(models[collective.rank], share, collective=collective, **rest))

    return on_ranks(world_size, run)


def in_seconds(problem: Problem, seconds: float) -> Deadline:
    """A deadline so many seconds from now."""
    return Deadline(time.perf_counter() + seconds, problem.collective)


def resume_store(folder: Path | None, every: float = 0) -> ResumeStore:
    """A store that saves every step, however short."""
    return ResumeStore(folder, every=every)


def threshold(at: float) -> State:
    """Class 1 for points (x, 1) with x above a threshold, else class 0."""
    return {"weight": torch.tensor([[0.0, at], [1.0, 0.0]])}


def on_a_line(**rest: Any) -> Problem:
    """With the threshold at 0.75, 0.6 passes, 0.7 and 0.5 of class 1 are to be repaired. Who
    repairs 0.5 breaks 0.6.
    """
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict(threshold(0.75))
    x = torch.tensor([[value, 1.0] for value in (-2, -1, 1, 2, 0.6, 0.7, 0.5)])
    source = TensorSource(x, torch.tensor([0, 0, 1, 1, 0, 1, 1]), "all", passed=True, failed=True)
    return make_problem(model, [source], **rest)


def memorised(
    n: int, n_features: int, width: int, *, n_wrong: int, n_copies: int = 0, layer: str = "auto"
) -> Problem:
    """A network that has learned random labels of random points by heart, some of them wrongly.

    Some of these are copies of passed points and cannot be right too.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, n_features, generator=generator)
    y = torch.randint(0, 3, (n,), generator=generator)
    learned = torch.cat([(y[:n_wrong] + 1) % 3, y[n_wrong:]])
    copied = slice(n_wrong, n_wrong + n_copies)
    x[:n_copies] = x[copied]
    y[copied] = learned[copied] = learned[:n_copies]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(n_features, width), nn.ReLU(), nn.Linear(width, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), learned).backward()
        optimizer.step()
    return make_problem(model, [TensorSource(x, y, "all", passed=True, failed=True)], layer)


def normed() -> nn.Sequential:
    """A network with running statistics and dropout."""
    return nn.Sequential(
        nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)
    )


def retrained(model: nn.Module, seed: int = 0, steps: int = 60) -> State:
    """Weights and statistics after training on what is known and on more of the new, as somebody
    else would do it.
    """
    (x, y), (x_new, y_new) = blobs(60, seed=seed), blobs(60, 1.5, seed + 1)
    x, y = torch.cat([x, x_new]), torch.cat([y, y_new])
    new = copy.deepcopy(model).train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(new.parameters(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(new(x), y).backward()
            optimizer.step()
    return snapshot(new)


def jittered(model: nn.Module, seed: int, scale: float) -> State:
    """Every weight moved at random."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.named_parameters():
        noise = scale * torch.randn(value.shape, generator=generator)
        state[name] = (value.detach().float() + noise).to(value.dtype)
    return state


def barely(problem: Problem, state: State) -> State:
    """The first weights on the way to some others, to a thousandth of it, that break something."""
    old, low, high = snapshot(problem.model), 0.0, 1.0
    assert broken(problem, state)
    for _ in range(10):
        middle = (low + high) / 2
        if broken(problem, between(old, state, middle)):
            high = middle
        else:
            low = middle
    return between(old, state, high)


@torch.no_grad()
def right(problem: Problem, state: State) -> Tensor:
    """Which known samples the model gets right with other weights, its loss finite, by a forward
    pass of its own.
    """
    masks = []
    with temporary_weights(problem.model, state):
        for source in problem.known:
            output, target = problem.model(source.inputs), source.targets
            loss = nn.functional.cross_entropy(output.float(), target, reduction="none")
            masks.append((output.argmax(1) == target) & loss.isfinite())
    return torch.cat(masks)


def broken(problem: Problem, state: State) -> int:
    return int((right(problem, {}) & ~right(problem, state)).sum())


def checked(problem: Problem, solution: Solution) -> Solution:
    """What must be true of every solution with a proposal, counted again by a forward pass of its
    own.
    """
    now = right(problem, solution.proposal.state)
    assert broken(problem, solution.proposal.state) == solution.proposal.broken == 0
    assert solution.proposal.repaired == int((problem.before.targeted & now).sum()) > 0
    assert torch.equal(solution.proposal.after.passed, now)
    return solution


def same(one: State, other: State) -> bool:
    """Bit for bit, dtypes included."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name])
        for name, value in one.items()
    )


def same_evidence(one: SampleResults, other: SampleResults) -> bool:
    return torch.equal(one.passed, other.passed) and torch.allclose(
        one.margin, other.margin, atol=1e-5
    )


def distilled(problem: Problem, **options: Any) -> Trained:
    weight = problem.used.float()
    defaults = {"start": {}, "epochs": problem.epochs, "deadline": Deadline(), "weight": weight}
    return distill(problem, **(defaults | options))


@contextmanager
def watched_steps(look: Callable[[float], object]) -> Iterator[None]:
    """Calls `look` with the learning rate before each step of any optimizer."""
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: look(optimizer.param_groups[0]["lr"])
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Fails if the model inside is not given back as it was: tensors and objects, modes, gradients,
    random numbers.
    """

    def flags() -> list[object]:
        parameters = [(id(x), x.requires_grad, x.grad) for x in model.parameters()]
        return [*parameters, *map(id, model.buffers()), *(m.training for m in model.modules())]

    weights, before, random = snapshot(model), flags(), torch.get_rng_state()
    yield
    assert same(snapshot(model), weights)
    assert flags() == before
    assert torch.equal(torch.get_rng_state(), random)
