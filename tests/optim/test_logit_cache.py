"""Teachers that can be worked out by hand, and what they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_problems import make_problem
from two_weights import SGD, first_logit, numbers, parts_of, two_weights

from lightning_nrl.evaluation.logit_cache import LogitCache
from lightning_nrl.methods import Problem
from lightning_nrl.methods._solvers.descent import Descent
from lightning_nrl.methods._solvers.teacher import Teacher


def teacher_problem(**rest: Any) -> tuple[Problem, list[int]]:
    """With weights w, the logits are w x and 0; the runs of the model are counted."""
    problem, runs = make_problem(two_weights(), [numbers(1, 2, 3), numbers(4, split="new")], **rest), []
    problem.model.register_forward_hook(lambda module, args, output: runs.append(len(args[0])))
    return problem, runs


STATES = ({"weight": torch.tensor([[10.0], [0.0]])}, {})


WHICH = torch.tensor([0, 1, 0, 1])


def test_each_sample_is_asked_of_its_own_teacher() -> None:
    problem, _ = teacher_problem()
    teacher = Teacher(problem, STATES, WHICH)
    (train, rows), (new, last) = parts_of(problem, 0, 1, 2, 3)
    assert teacher(train, rows).tolist() == [[10.0, 0.0], [2.0, 0.0], [30.0, 0.0]]
    assert teacher(new, last).tolist() == [[4.0, 0.0]]
    assert not teacher(new, last).requires_grad


@pytest.mark.parametrize(("room", "again"), [(2**20, []), (0, [2, 2])])
def test_what_was_said_is_remembered_where_there_is_room(
    room: int, again: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_nrl.evaluation.logit_cache.MAX_CACHED_BYTES", room)
    problem, runs = teacher_problem()
    teacher = Teacher(problem, STATES, WHICH)
    batch, rows = parts_of(problem, 2, 1)[0]
    said = teacher(batch, rows)
    assert said.tolist() == [[30.0, 0.0], [2.0, 0.0]]
    assert runs == [2, 2]
    runs.clear()
    assert torch.equal(teacher(batch, rows), said)
    assert runs == again
    # Row 0 was not asked before.
    batch, rows = parts_of(problem, 1, 0)[0]
    assert teacher(batch, rows).tolist() == [[2.0, 0.0], [10.0, 0.0]]


def test_only_those_are_asked_that_were_not_asked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, runs = teacher_problem()
    teacher = Teacher(problem, STATES, WHICH)
    teacher.prepare(torch.arange(4))
    assert runs == []  # how large their table is going to be, the first answer tells
    for batch, rows in parts_of(problem, 2, 1):
        teacher(batch, rows)
    runs.clear()
    teacher.prepare(torch.arange(4))
    assert sorted(runs) == [1, 1]
    runs.clear()
    teacher.prepare(torch.arange(4))
    said = [teacher(batch, rows) for batch, rows in parts_of(problem, 0, 1, 2, 3)]
    assert torch.cat(said)[:, 0].tolist() == [10.0, 2.0, 30.0, 4.0]
    assert runs == []


def test_a_teacher_is_not_confused_by_weights_that_are_being_moved() -> None:
    problem, _ = teacher_problem()
    teacher, steps = Teacher(problem, STATES, WHICH), Descent(problem, {}, SGD)
    batch, rows = parts_of(problem, 0, 1)[0]
    steps.step([(batch, rows)], first_logit)
    with steps.running():
        assert teacher(batch, rows).tolist() == [[10.0, 0.0], [2.0, 0.0]]
        torch.testing.assert_close(problem.evaluator.output(batch), torch.tensor([[0.7, 0.0], [1.4, 0.0]]))


def test_where_the_device_has_no_memory_for_them_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, runs = teacher_problem()
    teacher = Teacher(problem, STATES, WHICH)
    batch, rows = parts_of(problem, 2, 1)[0]

    def full(self: torch.Tensor, *size: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", full)
        assert teacher(batch, rows).tolist() == [[30.0, 0.0], [2.0, 0.0]]
    assert teacher(batch, rows).tolist() == [[30.0, 0.0], [2.0, 0.0]]
    assert runs == [2, 2, 2, 2]


def test_a_cache_without_a_number_of_samples_grows() -> None:
    cache = LogitCache()
    assert cache.get(torch.tensor([0])) is None
    cache.put(torch.tensor([1]), torch.tensor([[1.0, 2.0]]))
    cache.put(torch.tensor([9, 0]), torch.tensor([[9.0, 9.0], [0.0, 1.0]]))
    found = cache.get(torch.tensor([9, 1, 0]))
    assert found is not None
    assert found.tolist() == [[9.0, 9.0], [1.0, 2.0], [0.0, 1.0]]
    assert cache.get(torch.tensor([2])) is None
    assert cache.get(torch.tensor([99])) is None
    assert cache.get(torch.tensor([1]), torch.Size([1, 3])) is None
    cache.put(torch.tensor([2]), torch.zeros(1, 3))
    assert cache.has_varied
