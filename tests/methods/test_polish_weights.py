"""A model from elsewhere in each of its forms, polished; and what is no such model, refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_problems import (
    barely,
    broken,
    cast,
    left_alone,
    make_problem,
    normed,
    on_a_line,
    retrained,
    right,
    same,
    threshold,
    together,
)
from toy_repairs import known, mlp, trained

from lightning_nrl import BoundOptions, ConfigurationError, Settings, repair_module
from lightning_nrl._utils.state import State, snapshot
from lightning_nrl._utils.timing import Deadline, StageTimer
from lightning_nrl.methods import METHODS, Problem, Solution
from lightning_nrl.methods._solvers import polish as module
from lightning_nrl.methods.polish_weights import Polish


def as_state(state: State, folder: Path) -> Any:
    return state


def as_module(state: State, folder: Path) -> Any:
    new = normed()
    new.load_state_dict(state)
    return new


def as_saved_state(state: State, folder: Path) -> Any:
    torch.save(dict(state), folder / "state.pt")
    return str(folder / "state.pt")


def as_checkpoint(state: State, folder: Path) -> Any:
    path = folder / "new.ckpt"
    torch.save({"epoch": 3, "state_dict": dict(state), "optimizer_states": [], "hyper_parameters": {"lr": 0.1}}, path)
    return path


@pytest.mark.parametrize("form", [as_state, as_module, as_saved_state, as_checkpoint])
def test_a_new_model_in_any_form_is_polished(form: Callable[[State, Path], Any], tmp_path: Path) -> None:
    model = trained(normed).eval()
    problem = make_problem(model, known())
    new = barely(problem, retrained(model))
    given = form(new, tmp_path)
    kept = snapshot(given) if isinstance(given, nn.Module) else {}
    with left_alone(model):
        solution = Polish(given)(problem)
    assert solution.proposal is not None
    assert broken(problem, solution.proposal.state) == solution.proposal.broken == 0
    now = right(problem, solution.proposal.state)
    assert solution.proposal.repaired == int((problem.before.targeted & now).sum()) > 0
    first, second = solution.steps
    assert (first.name, first.note) == ("given", "as they came")
    assert (first.repaired, first.broken) == (problem.propose("new", new).repaired, 1)
    assert (second.name, second.repaired, second.broken) == ("polish", solution.proposal.repaired, 0)
    assert second.note.endswith("round") or second.note.endswith("rounds")
    assert [other.name for other in solution.others] == ["given"]
    assert torch.equal(solution.proposal.state["1.running_var"], new["1.running_var"])
    assert list(problem.clock.seconds) == ["judge", "polish"]
    if isinstance(given, nn.Module):
        assert same(snapshot(given), kept)


def test_what_breaks_nothing_is_taken_as_it_is() -> None:
    solution = Polish(threshold(0.65))(on_a_line())
    assert solution.proposal is not None
    assert same(solution.proposal.state, threshold(0.65))
    assert [(step.repaired, step.broken, step.note) for step in solution.steps] == [
        (1, 0, "as they came"),
        (1, 0, "0 rounds"),
    ]


def test_the_model_itself_is_stepped_until_its_targets_are_right() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict(threshold(0.7005))
    problem = make_problem(model, on_a_line().known)
    assert int(problem.before.targeted.sum()) == 2
    with left_alone(problem.model):
        solution = Polish()(problem)
    assert solution.proposal is not None
    now = right(problem, solution.proposal.state)
    assert now.tolist() == [True, True, True, True, True, True, False]  # 0.7 is right, 0.5 would cost 0.6
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert [step.name for step in solution.steps] == ["polish"]


def test_only_weights_of_the_layer_are_stepped() -> None:
    problem = make_problem(trained(), known(), layer="2")
    solution = Polish()(problem)
    assert solution.proposal is not None
    assert set(solution.proposal.state) == {"2.weight", "2.bias"}
    assert broken(problem, solution.proposal.state) == 0


@pytest.mark.parametrize("new", [0.9, 0.75, math.nan])
def test_what_repairs_nothing_is_no_proposal(new: float) -> None:
    solution = Polish(threshold(new))(on_a_line())
    assert solution.proposal is None
    assert solution.reason == "the new weights repair no target without breaking what is right."
    assert len(solution.steps) == 2


def test_new_weights_are_taken_in_the_precision_of_the_model() -> None:
    model = trained()
    problem = make_problem(trained().half(), cast(known(), torch.float16))
    solution = Polish(retrained(model))(problem)
    assert solution.proposal is not None
    assert {value.dtype for value in solution.proposal.state.values()} == {torch.float16}
    assert broken(problem, solution.proposal.state) == 0


def without(name: str) -> State:
    return {key: value for key, value in snapshot(mlp()).items() if key != name}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (mlp(16), r"`Polish.new` has '0\.weight' in the shape \[16, 4\], not \[12, 4\]; 2 more tensors do not fit\."),
        (without("2.bias"), r"`Polish.new` lacks '2\.bias'\."),
        (normed(), r"`Polish.new` lacks '2\.weight'; 8 more"),
        ({}, r"`Polish.new` lacks '0\.weight'; 3 more"),
        ({"0.weight": 1.0}, r"`Polish.new` lacks '0\.weight'"),
        ({**snapshot(mlp()), "3.weight": torch.zeros(2)}, r"`Polish.new` has '3\.weight', which is not in the model\."),
    ],
)
def test_another_architecture_is_refused(new: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message + r"[\s\S]*\nHINT: give weights of the same architecture"):
        Polish(new)(make_problem(trained(), known()))


class Unsafe:
    """Not to be unpickled."""


@pytest.mark.parametrize("content", [None, b"", b"hello world", b"split,id\n", "folder", "tensor", "object"])
def test_a_file_that_cannot_be_read_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "new.ckpt"
    if content == "folder":
        path.mkdir()
    elif content == "tensor":
        torch.save(torch.zeros(2), path)
    elif content == "object":
        torch.save({"state_dict": {}, "hyper_parameters": Unsafe()}, path)
    elif content is not None:
        path.write_bytes(content)
    found = r"holds a Tensor\." if content == "tensor" else r"cannot be read \(\w+: .*\)\."
    with pytest.raises(ConfigurationError, match=rf"`Polish.new`: '.*new\.ckpt' {found}\nHINT: give "):
        Polish(path)(make_problem(trained(), known()))


@pytest.mark.parametrize("new", [3, [torch.zeros(2)], nn.Linear])
def test_what_is_no_model_is_refused_at_once(new: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`Polish.new=.*` is no model\.\nHINT: write Polish\(model\)"):
        Polish(new)


def test_weights_that_differ_beyond_the_layer_are_refused() -> None:
    problem = make_problem(trained(), known(), layer="2")
    new = retrained(problem.model)
    with pytest.raises(ConfigurationError, match=r"`Polish.new` differs in '0\.weight' too\.\nHINT: leave `layer`"):
        Polish(new)(problem)
    head = {**snapshot(problem.model), "2.weight": new["2.weight"], "2.bias": new["2.bias"]}
    solution = Polish(head)(problem)
    state = head if solution.proposal is None else solution.proposal.state
    assert torch.equal(state["0.weight"], problem.model[0].weight)


def test_time_is_left_for_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, given, polish = on_a_line(clock=StageTimer(max_time=100)), [], module.polish
    problem.clock.seconds["collect"] = 2.0

    def listen(*args: Any, deadline: Deadline, **rest: Any) -> Any:
        given.append(deadline.seconds_left)
        return polish(*args, deadline=deadline, **rest)

    monkeypatch.setattr(module, "polish", listen)
    Polish(threshold(0.65))(problem)
    assert given == [pytest.approx(100 - 3 * 2, abs=2)]


def test_a_repair_that_is_late_still_breaks_nothing() -> None:
    problem = on_a_line(clock=StageTimer(max_time=1e-9))
    solution = Polish(threshold(-3.0))(problem)
    assert solution.steps[1].note == "1 round, then back to 3% of the way"
    assert (solution.steps[1].repaired, solution.steps[1].broken) == (1, 0)


def test_it_is_a_method_and_settings_hold_no_weights() -> None:
    method = Polish(threshold(0.65))
    assert METHODS.parse("method", method) is method
    for new, said in (("new.ckpt", "new.ckpt"), (mlp(), "Sequential"), (snapshot(mlp()), "4 tensors")):
        assert Settings(method=Polish(new)).plain()["method"] == {"class": "Polish", "new": said, "share": 1.0}


def test_a_repair_writes_what_was_polished() -> None:
    model = trained(normed)
    new = retrained(model)
    outcome = repair_module(model, known(), Settings(method=Polish(new), bounds=BoundOptions(strength=1.0)))
    assert outcome.report.status == "repaired"
    assert [step.name for step in outcome.report.steps] == ["given", "polish"]
    assert [split.broken for split in outcome.report.splits] == [0, 0]
    problem = make_problem(model, known())
    assert outcome.parameters is not None
    assert broken(problem, outcome.parameters) == 0
    outcome.write(model)
    assert int(right(problem, {}).sum()) == sum(split.kept + split.repaired for split in outcome.report.splits)


def test_two_ranks_polish_as_one() -> None:
    model = trained().eval()
    new = barely(make_problem(model, known()), retrained(model))
    alone = Polish(new)(make_problem(model, known()))

    def work(problem: Problem) -> Solution:
        return Polish(new)(replace(problem, clock=StageTimer(max_time=1e4)))

    first, second = together(model, known(), work)
    assert same(first.proposal.state, second.proposal.state)
    assert (first.proposal.repaired, first.proposal.broken) == (alone.proposal.repaired, 0)
    assert [step.note for step in first.steps] == [step.note for step in alone.steps]


def test_tied_weights_are_polished_as_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x).relu()))

    model = trained(Tied).eval()
    problem = make_problem(model, known())
    new = barely(problem, retrained(model))
    solution = Polish(new)(problem)
    assert solution.proposal is not None
    assert broken(problem, solution.proposal.state) == 0
    outcome = repair_module(model, known(), Settings(method=Polish(new), bounds=BoundOptions(strength=1.0)))
    assert outcome.write(model)
    assert model.second.weight is model.first.weight
    assert broken(problem, {}) == 0
    assert sum(split.kept + split.repaired for split in outcome.report.splits) == int(right(problem, {}).sum())
