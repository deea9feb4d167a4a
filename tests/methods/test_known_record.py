"""What follows from a record of the last layer is what the deployed model does, or it says so."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_problems import jittered, on_ranks, shares
from toy_repairs import known, mlp, quick, right, trained

from lightning_nrl import ParticleSwarm, SearchOptions, Settings, repair_module
from lightning_nrl._utils.timing import Deadline, StageTimer
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.methods import Problem
from lightning_nrl.methods.solvers.known_head import restored_by_head
from lightning_nrl.methods.solvers.polish import polish
from lightning_nrl.pipeline.baseline import evaluate_baseline
from lightning_nrl.pipeline.input_checks import scope_of
from lightning_nrl.pipeline.problem_builder import build_problem


def passes_of(model: nn.Module, body: nn.Module, settings: Settings) -> tuple[float, Any]:
    """Passes through the body without gradients, and the outcome."""
    visits = Counter[str]()

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        visits["all"] += 0 if torch.is_grad_enabled() else len(output)

    data = known()
    with body.register_forward_hook(count):
        outcome = repair_module(model, data, settings)
    return visits["all"] / sum(map(len, data)), outcome


def recorded_problem(model: nn.Module, context: Any = nullcontext) -> Problem:
    settings = Settings()
    evaluator = Evaluator(model.eval(), context=context)
    layers = scope_of(settings, evaluator)
    data = known()
    baseline = evaluate_baseline(
        evaluator, data, settings, unseen=(), clock=StageTimer(), records=True
    )
    return build_problem(evaluator, data, baseline, layers, settings)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("context", [nullcontext, autocast])
def test_results_from_the_record_are_those_of_a_pass_bit_for_bit(context):
    problem = recorded_problem(trained(), context)
    head = {name: x for name, x in jittered(problem.model, 1, 0.3).items() if name[0] == "2"}
    from_record, by_pass = problem.evaluate(head), problem.evaluator.run_with(head, problem.known)
    assert problem.record.covers(problem.model, head)
    for column in ("loss", "margin", "passed", "prediction", "confidence", "index", "label"):
        assert torch.equal(vars(from_record)[column], vars(by_pass)[column])


def test_a_pass_with_other_weights_is_recorded_too():
    problem = recorded_problem(trained())
    state = jittered(problem.model, 1, 0.1)
    start = problem.propose("start", state)
    assert not problem.record.covers_path(problem.model, state)
    with problem.starting_at(start) as moved:
        head = {name: x for name, x in jittered(moved.model, 2, 0.3).items() if name[0] == "2"}
        assert moved.record.covers(moved.model, head)
        from_record = moved.evaluate(head)
        by_pass = moved.evaluator.run_with(head, moved.known)
    assert torch.equal(from_record.loss, by_pass.loss)
    assert problem.deployed(state) is start.after
    state["0.weight"] += 1
    moved_on = problem.deployed(state)
    assert not torch.equal(moved_on.loss, start.after.loss)


@pytest.mark.parametrize("seed", range(3))
def test_the_head_restores_what_a_training_breaks_without_a_pass(seed):
    problem = recorded_problem(trained())
    before = problem.before
    start = problem.propose("fit", jittered(problem.model, seed, 0.3))
    calls = []
    with problem.model.get_submodule("0").register_forward_hook(lambda *call: calls.append(call)):
        restored = restored_by_head(problem, start, price=32.0)
    assert not calls
    by_pass = problem.evaluator.run_with(restored.state, problem.known)
    assert torch.equal(restored.after.passed, by_pass.passed)
    assert start.broken > restored.broken == int((before.passed & ~by_pass.passed).sum()) == 0
    kept = start.after.right & (before.passed | before.targeted)
    assert bool(by_pass.passed[kept].all())
    assert {name for name, x in restored.state.items() if x is not start.state[name]} == {
        "2.weight",
        "2.bias",
    }


def test_a_head_that_may_not_change_restores_nothing():
    problem = replace(recorded_problem(trained()), scope=("0.weight", "0.bias"))
    start = problem.propose("fit", jittered(problem.model, 1, 0.1))
    assert restored_by_head(problem, start, price=32.0) is start


@pytest.mark.parametrize("scale", [0.3, 0.7])
def test_a_polish_without_time_for_steps_leaves_what_is_broken_to_the_head(scale):
    problem = recorded_problem(trained())
    start = problem.propose("fit", jittered(problem.model, 0, scale))
    no_time = Deadline(0.0)
    result = polish(problem, start.state, deadline=no_time, after=start.after)
    assert (result.rounds, result.strength, result.was_cut) == (0, 1.0, True)
    assert 0 < result.by_head < start.broken  # a lower price has restored some before
    assert "restored by the last layer" in result.note
    assert result.broken == problem.counted("", {}, problem.deployed(result.state)).broken == 0
    assert result.repaired >= start.repaired > 0


class Drifting(nn.Module):
    """Gives other logits than its last layer as soon as that has changed, but for a few samples."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()
        self.drift = 0.0
        self.old = torch.zeros(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        if torch.equal(self.network[2].weight, self.old) or len(x) < 10:
            return logits
        return logits - self.drift * torch.tensor([1.0, 0.0, 0.0])


def test_the_deployed_model_decides_where_the_record_is_wrong():
    model = trained(Drifting)
    assert isinstance(model, Drifting)
    model.old, model.drift = model.network[2].weight.detach().clone(), 1.0
    data = known()
    before = torch.cat([right(model, source) for source in data])
    outcome = repair_module(model, data, quick(method="convex"))
    assert outcome.report.status == "repaired"
    assert "differs from its recorded layer" in outcome.report.steps[-2].note
    assert outcome.write(model)
    after = torch.cat([right(model, source) for source in data])
    assert bool(after[before].all())
    assert int((after & ~before).sum()) == outcome.report.pooled("known").repaired > 0


class Softened(nn.Sequential):
    """Its last layer does not give the logits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_a_layer_that_does_not_give_the_logits_takes_the_passes():
    model = trained(lambda: Softened(*mlp()))
    passes, outcome = passes_of(
        model, model[0], quick(method=ParticleSwarm(particles=40, iterations=40))
    )
    assert outcome.report.status == "repaired"
    assert passes > 3


def test_compiled_models_are_not_hooked():
    model = trained()
    compiled = torch.compile(model, backend="eager")
    settings = Settings(method=ParticleSwarm(particles=20, iterations=20))
    assert isinstance(compiled, nn.Module)
    outcome = repair_module(compiled, known(), settings)
    # Evaluating, recording, the proposal; the verdict is on the last pass.
    assert outcome.report.status == "repaired"
    assert sum(outcome.report.passes.values()) > 2.9


@pytest.mark.parametrize("method", ["swarm", "convex"])
def test_ranks_record_their_shares(method):
    model = trained()

    def run(collective: Any) -> Any:
        evaluator = Evaluator(copy.deepcopy(model), collective=collective)
        data = shares(known(), collective.rank, 2)
        return repair_module(evaluator, data, Settings(method=method)).report

    for report in on_ranks(2, run):
        assert report.status == "repaired"
        assert 2.0 <= sum(report.passes.values()) < 2.2


@pytest.mark.parametrize("method", [ParticleSwarm(particles=8, iterations=8), "convex"])
def test_without_room_for_a_record_samples_are_recorded_later(method):
    search = SearchOptions(memory_limit=1000)
    report = repair_module(trained(), known(), Settings(method=method, search=search)).report
    assert report.status == "repaired"
    assert sum(report.passes.values()) > 2.5
