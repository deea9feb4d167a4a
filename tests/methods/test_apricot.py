"""Weights moved toward checkpoints that are right, by hand on a line, and those that a Trainer has kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_problems import FakeTraining, left_alone, make_problem, on_a_line, retrained, same, threshold
from toy_repairs import known, trained

from lightning_nrl import ConfigurationError
from lightning_nrl.methods import METHODS, Apricot
from lightning_nrl.methods.apricot import pull

RIGHT, WRONG = threshold(0.65), threshold(0.9)
"""The first gets one of the targets of `on_a_line` right, 0.7, the second none."""


def test_right_models_pull_and_wrong_ones_push() -> None:
    passed = torch.tensor([[True, False], [False, False]])  # of two models, on the targets 0.7 and 0.5
    one = torch.ones(2)
    assert pull(passed, one, "both").tolist() == [0.5, -1.5]
    assert pull(passed, one, "right").tolist() == [1.0, 0.0]
    assert pull(passed, one, "wrong").tolist() == [-0.5, -1.5]
    assert pull(passed, torch.tensor([2.0, 1.0]), "both").tolist() == [1.5, -2.5]


def at(solution: Any) -> float:
    return float(solution.proposal.state["weight"][0, 1])


def test_rounds_move_the_threshold_until_a_target_is_right() -> None:
    problem = on_a_line()
    with left_alone(problem.model):
        solution = Apricot([RIGHT, WRONG], rate=0.1)(problem)
    # 0.75 + 0.05 (0.65 - 0.75) - 0.15 (0.9 - 0.75) = 0.7225, and the same from there
    assert at(solution) == pytest.approx(0.69225, abs=1e-6)
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert solution.steps[0].note == "2 checkpoints, right on 1 of the targets; 7 rounds"  # 5 of them without more
    alone = Apricot([RIGHT, WRONG], rate=0.1, strategy="right", rounds=50, patience=20)(problem)
    assert 0.65 < at(alone) < 0.7
    pushed = Apricot([WRONG], rate=0.1, strategy="wrong", rounds=2)(problem)
    assert at(pushed) == pytest.approx(0.684, abs=1e-6)  # 0.75 - 0.2 (0.9 - 0.75) = 0.72, and the same from there


def test_one_round_goes_no_further_than_a_fifth() -> None:
    solution = Apricot([RIGHT], strategy="right", rate=100.0, rounds=1, polish=False)(on_a_line())
    assert solution.proposal is None  # 0.75 + 0.2 (0.65 - 0.75) = 0.73 repairs nothing
    assert solution.reason == "no move toward the checkpoints repairs a target within the gate."


def test_the_training_goes_on_from_there_and_what_breaks_comes_back() -> None:
    training = FakeTraining(threshold(0.55))  # repairs 0.7 and breaks 0.6
    solution = Apricot([RIGHT, WRONG], rate=0.1, rounds=1, epochs=3)(on_a_line(training=training))
    (call,) = training.calls
    assert call["epochs"] == 3
    assert float(call["start"]["weight"][0, 1]) == pytest.approx(0.75)  # one round has repaired nothing yet
    assert [step.name for step in solution.steps] == ["apricot", "fit", "polish"]
    assert (solution.steps[1].repaired, solution.steps[1].broken) == (1, 1)
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    layer = on_a_line(training=training, whole=False)
    assert [step.name for step in Apricot([RIGHT], rounds=1, polish=False)(layer).steps] == ["apricot"]


def test_a_network_with_its_checkpoints_in_a_folder(tmp_path: Path) -> None:
    model = trained()
    problem = make_problem(model, known())
    for seed in range(2):
        torch.save({"state_dict": dict(retrained(model, seed))}, tmp_path / f"epoch={seed}.ckpt")
    torch.save(model.state_dict(), tmp_path / "last.ckpt")  # the model itself, which says nothing
    solution = Apricot(str(tmp_path), rate=0.02)(problem)
    assert solution.steps[0].note.startswith("2 checkpoints, ")
    assert solution.proposal is not None
    assert solution.proposal.repaired > 0
    assert solution.proposal.broken == 0
    again = Apricot([tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"], rate=0.02)(problem)
    assert again.proposal is not None
    assert same(solution.proposal.state, again.proposal.state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": []}, "`Apricot.checkpoints` is an empty list"),
        ({"checkpoints": 3}, "`Apricot.checkpoints=3` is no list of checkpoints"),
        ({"strategy": "toward"}, "`Apricot.strategy='toward'`"),
        ({"rate": 0}, "`Apricot.rate=0`"),
        ({"rounds": 0}, "`Apricot.rounds=0`"),
    ],
)
def test_what_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Apricot(**arguments)


def test_without_checkpoints_it_says_how_to_keep_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there are none\.[\s\S]*save_top_k=5"):
        METHODS.parse("method", "apricot")(on_a_line())
    with pytest.raises(ConfigurationError, match="is no folder with checkpoints"):
        Apricot(tmp_path)(on_a_line())
    same_as_model = Apricot([threshold(0.75)])(on_a_line())
    assert same_as_model.reason == "all of `Apricot.checkpoints` have the weights of the model itself."
