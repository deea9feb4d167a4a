"""Fits and polishes, weights from elsewhere, and moves toward checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_problems import (
    FakeTraining,
    Marginless,
    StageTimer,
    State,
    barely,
    between,
    broken,
    checked,
    left_alone,
    make_problem,
    normed,
    on_a_line,
    retrained,
    right,
    same,
    snapshot,
    threshold,
)
from toy_repairs import known, mlp, trained

from lightning_nrl import (
    BoundOptions,
    ConfigurationError,
    Settings,
    Target,
    TensorSource,
    repair_module,
)
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods import (
    METHODS,
    Auto,
    FineTunePolish,
    Polish,
    Problem,
    Solution,
    solve,
)
from lightning_nrl.methods.finetune_polish import choose_caution, fine_tune_and_polish
from lightning_nrl.methods.held_out import draw_held_out_rows
from lightning_nrl.published import Apricot
from lightning_nrl.records import CautionPoint


def test_training_goes_on_in_rounds_and_is_polished():
    model = trained(normed).eval()
    new = retrained(model)
    training = FakeTraining(new, new, barely(make_problem(model, known()), new))
    problem = make_problem(model, known(), training=training, seed=7)
    with left_alone(model):
        solution = checked(problem, FineTunePolish(caution=0)(problem))
    first, second, last = training.calls
    assert bool((first.pop("weight") == 1).all())
    # Of 16 epochs, as known data are few.
    assert first == {
        "seconds": math.inf,
        "seed": 7,
        "epochs": 6,
        "start": {},
        "rate": None,
    }
    assert (second["epochs"], last["epochs"]) == (6, 12)
    assert (second["seed"], last["seed"]) == (8, 9)
    assert second["start"] is last["start"] is new
    fitted, polished = solution.tried[0], solution.proposal
    assert fitted == problem.target_counts(problem.evaluate(training.states[-1]))
    assert fitted.broken > 0
    fit, polish = solution.steps
    assert (fit.name, fit.broken, fit.repaired) == (
        "fit",
        fitted.broken,
        fitted.repaired_in_target,
    )
    assert fit.note == "continued training, 24 epochs in 3 rounds"
    assert (polish.name, polish.broken, polish.repaired) == ("polish", 0, polished.repaired)
    assert polish.note.partition(" ")[2].startswith("round")
    assert polished.name == "polish"
    last_state = training.states[-1]
    assert torch.equal(polished.state["1.running_mean"], last_state["1.running_mean"])
    assert list(problem.clock.seconds) == ["fit", "polish"]


@pytest.mark.parametrize(
    ("share", "max_time", "needed"), [(1.0, 2.0, 7), (0.1, 10.0, 70), (0.5, 1e-9, 14)]
)
def test_without_time_the_reason_says_how_much_it_needs(share, max_time, needed):
    model = trained()
    training = FakeTraining(retrained(model))
    problem = make_problem(
        model, known(), training=training, clock=StageTimer(max_time=max_time, now=lambda: 0.0)
    )
    problem.clock.seconds["collect"] = 1.0
    solution = FineTunePolish(share)(problem)
    # A second to begin, five passes to train, count and polish, and one to judge.
    assert solution == Solution(
        None, f"no time was left for training: it needs about {needed} s of `max_time`."
    )
    assert training.calls == []
    enough = StageTimer(max_time=needed, now=lambda: 0.0)
    enough.seconds["collect"] = 1.0
    FineTunePolish(share)(replace(problem, clock=enough))
    assert training.calls[0]["seconds"] == pytest.approx(((needed - 1) * share - 1) * 2 / 3 - 1)


def test_weights_that_are_no_numbers_are_no_proposal():
    model = trained().eval()
    new = retrained(model)
    nan = {name: torch.full_like(value, math.nan) for name, value in snapshot(model).items()}
    training = FakeTraining(new, new, nan)
    solution = FineTunePolish()(make_problem(model, known(), training=training))
    assert solution.proposal is None
    assert solution.reason == "no target was repaired without breaking what is right."
    assert [(step.name, step.repaired) for step in solution.steps] == [("fit", 0), ("polish", 0)]


def on_a_line_with_doubts() -> Problem:
    """As `on_a_line`, with targets at 0.7, 0.71 and 0.72, and 0.8 of class 0, which fails outside
    the target.
    """
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict(threshold(0.75))
    x = torch.tensor([[value, 1.0] for value in (-2, -1, 1, 2, 0.6, 0.7, 0.71, 0.72, 0.8)])
    source = TensorSource(
        x, torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0]), "all", passed=True, failed=True
    )
    return make_problem(model, [source], target=Target.label(1))


REVERSED = {"weight": -threshold(0.65)["weight"]}
"""All passed samples of the line break, and no target is repaired."""


def trained_on_a_line(
    rounds: State, last: State, rows: Sequence[int]
) -> tuple[Solution, FakeTraining]:
    """Rounds that end at one state but for the last, which ends at another one."""
    problem, held_out = on_a_line_with_doubts(), None
    if rows:
        held_out = torch.zeros(9, dtype=torch.bool)
        held_out[list(rows)] = True

    def gives(epochs: int, **call: Any) -> State:
        return last if epochs == 12 else rounds

    training = FakeTraining(gives=gives)
    solution = fine_tune_and_polish(replace(problem, training=training), held_out, caution=0)
    weight = torch.ones(9)
    weight[list(rows)] = 0
    assert torch.equal(training.calls[0]["weight"], weight.double())
    return solution, training


@pytest.mark.parametrize(
    ("rounds", "rows", "weight", "counts"),
    [
        # Four fifths of the passed samples are visited half as often: all but 0.6, which has the
        # largest loss.
        (threshold(0.65), (), [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1], None),
        # What is broken is visited three times as often: -1 and 0.6.
        (threshold(-1.5), (), [0.5, 3, 0.5, 0.5, 3, 1, 1, 1, 1], None),
        # Two repairs for none broken are more than chance: held-out samples join, and the counts
        # are those of the round before.
        (threshold(0.65), (0, 5, 6), [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1], (2, 0)),
        # None and one are not: 0.8, which fails outside the target, is visited a fifth as often.
        (threshold(0.715), (0, 5, 6), [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 0.2], (0, 0)),
        (threshold(0.705), (0, 6), [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 0.2], (1, 0)),
        # Two that break and none repaired: they stay out and are counted at the end, and 0.8 is not
        # visited at all.
        (threshold(-3.0), (0, 1), [0, 0, 0.5, 0.5, 3, 1, 1, 1, 0], (0, 0)),
    ],
)
def test_each_round_says_how_often_the_last_one_visits_samples(rounds, rows, weight, counts):
    # With the threshold at 0.705 in the end, 0.71 is right and 0.7 is not.
    solution, training = trained_on_a_line(rounds, threshold(0.705), rows)
    last = training.calls[-1]
    assert last["start"] is rounds
    torch.testing.assert_close(last["weight"], torch.tensor(weight, dtype=torch.float64))
    assert (solution.held_out is None) == (counts is None)
    if solution.held_out is not None:
        assert (solution.held_out.repaired, solution.held_out.broken) == counts
    assert [step.name for step in solution.steps] == ["fit", "polish"]
    assert (solution.proposal.repaired, solution.proposal.broken) == (2, 0)


def test_rounds_go_on_while_each_repairs_more():
    problem = make_problem(trained(), known(n=300))
    old, new = snapshot(problem.model), retrained(problem.model)
    rows = draw_held_out_rows(problem)
    for parts in ((1, 1, 1), (0.1, 0.2, 0.3, 0.5, 1, 1)):
        training = FakeTraining(*(between(old, new, part) for part in parts))
        fine_tune_and_polish(replace(problem, training=training), rows)
        assert len(training.calls) == len(parts)


@pytest.mark.parametrize(("caution", "chosen"), [(None, 0.0), (0.1, 0.1), (0.25, 0.25)])
def test_held_out_samples_say_how_far_to_go_back(caution, chosen):
    problem, held_out = on_a_line_with_doubts(), torch.zeros(9, dtype=torch.bool)
    held_out[[0, 4, 5, 6]] = True
    # From 0.55 back to 0.75: 0.6, which is of class 0, is right again from 0.6 on.
    training = FakeTraining(threshold(0.55))
    problem = replace(problem, training=training)
    solution = fine_tune_and_polish(problem, held_out, caution=caution)
    counts = {
        point.caution: (point.held_out.repaired, point.held_out.broken)
        for point in solution.caution
    }
    expected = {0.0: (2, 1), 0.1: (2, 1), 0.2: (2, 1), 0.3: (2, 0), 0.5: (2, 0)}
    if caution == 0.25:
        expected[0.25] = (2, 0)
    assert counts == expected
    assert [point.caution for point in solution.caution if point.chosen] == [chosen]


@pytest.mark.parametrize(
    ("counts", "chosen"),
    [
        ((), 0.0),
        # One regression less is no more than chance, two less are.
        (((5, 2), (5, 1)), 0.0),
        (((5, 2), (5, 0)), 0.1),
        # Of those that are more, the largest: 4 in 2, 5 in 2.6.
        (((9, 6), (9, 2), (8, 0)), 0.1),
        (((9, 6), (9, 2), (9, 0)), 0.2),
        # Repairs that are lost count as much.
        (((9, 6), (5, 0)), 0.0),
    ],
)
def test_a_caution_is_chosen_if_it_gains_more_than_chance(counts, chosen):
    points = [
        CautionPoint(place / 10, TargetCounts(20 - broken, broken, repaired, 20 - repaired))
        for place, (repaired, broken) in enumerate(counts)
    ]
    assert choose_caution(points) == chosen


def test_targets_that_count_more_are_visited_more_often_up_to_ten_times():
    problem, training = on_a_line_with_doubts(), FakeTraining(threshold(0.65))
    weight = problem.before.weight.clone()
    weight[5], weight[6] = 3.0, 30.0
    FineTunePolish()(
        replace(problem, training=training, before=replace(problem.before, weight=weight))
    )
    assert training.calls[0]["weight"].tolist() == [1, 1, 1, 1, 1, 3, 10, 1, 1]
    assert training.calls[-1]["weight"].tolist() == [0.5, 0.5, 0.5, 0.5, 1, 3, 10, 1, 1]


def test_training_that_breaks_what_is_held_out_is_no_proposal():
    # Five broken and none repaired are 2.2 standard errors.
    solution, _ = trained_on_a_line(threshold(-3.0), REVERSED, range(5))
    assert solution.proposal is None
    assert solution.reason == "continued training breaks more held-out samples than it repairs."
    assert (solution.held_out.repaired, solution.held_out.broken) == (0, 5)
    # Four are 2.
    assert trained_on_a_line(threshold(-3.0), REVERSED, range(1, 5))[0].reason != solution.reason


@pytest.mark.parametrize(("first", "kinds"), [(0.9, 2), (0.725, 2), (0.719, 1)])
def test_steps_that_repair_hardly_anything_at_first_make_room_for_the_next_kind(first, kinds):
    def gives(rate: float | None, **rest: Any) -> State:
        return threshold(first if rate is None else 0.65)

    training = FakeTraining(gives=gives)
    solution = FineTunePolish()(replace(on_a_line_with_doubts(), training=training))
    rates = [call["rate"] for call in training.calls]
    assert rates == ([None, 1e-3, 1e-3, 1e-3] if kinds == 2 else [None] * 3)
    recipes = ["continued training", "AdamW through training_step"][:kinds]
    assert [step.note.partition(",")[0] for step in solution.steps[:kinds]] == recipes
    assert [step.name for step in solution.steps] == ["trial"] * (kinds - 1) + ["fit", "polish"]


def test_where_no_steps_of_the_owner_do_well_they_are_distilled():
    model = trained().eval()
    training = FakeTraining(snapshot(model))
    problem = make_problem(model, known(), training=training)
    solution = checked(problem, FineTunePolish()(problem))
    assert [step.name for step in solution.steps] == ["trial", "trial", "fit", "polish"]
    assert len(training.calls) == 2
    assert re.fullmatch(r"distilled steps, \d+(\.\d+)? epochs in 3 rounds", solution.steps[2].note)


@pytest.mark.parametrize("method", [FineTunePolish(), Polish("no such file")])
def test_a_task_without_margins_is_refused_before_any_training(method):
    training = FakeTraining(None)
    with pytest.raises(ConfigurationError, match=r"`task`: Marginless has no `margin`"):
        solve(method, make_problem(trained(), known(), "0", task=Marginless(), training=training))
    assert training.calls == []


@pytest.mark.parametrize("share", [0, 1.5, "half"])
def test_a_share_that_is_none_is_refused(share):
    for caution in (-1, 1):
        with pytest.raises(ConfigurationError, match=rf"`Auto.caution={caution}`"):
            Auto(caution=caution)
    with pytest.raises(ConfigurationError, match=r"`FineTunePolish.share=.*` is no share"):
        FineTunePolish(share)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_new_model_is_polished(in_file, tmp_path):
    model = trained(normed).eval()
    problem = make_problem(model, known())
    state = barely(problem, retrained(model))
    new = normed()
    new.load_state_dict(state)
    if in_file:
        new = tmp_path / "new.ckpt"
        torch.save({"epoch": 3, "state_dict": dict(state), "optimizer_states": []}, new)
    with left_alone(model):
        solution = checked(problem, Polish(new)(problem))
    first, second = solution.steps
    assert (first.name, first.note, first.broken) == ("given", "before the polish", 1)
    assert (second.name, second.broken) == ("polish", 0)
    assert torch.equal(solution.proposal.state["1.running_var"], state["1.running_var"])
    if isinstance(new, nn.Module):
        assert same(snapshot(new), state)


def test_the_model_itself_is_stepped_until_its_targets_are_right():
    model = nn.Linear(2, 2, bias=False)
    model.load_state_dict(threshold(0.7005))
    problem = make_problem(model, on_a_line().known)
    assert int(problem.before.targeted.sum()) == 2
    with left_alone(problem.model):
        solution = Polish()(problem)
    # 0.7 is right, 0.5 would cost 0.6.
    assert right(problem, solution.proposal.state).tolist() == [True] * 6 + [False]
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert [step.name for step in solution.steps] == ["polish"]


@pytest.mark.parametrize("new", [0.9, 0.75, math.nan])
def test_what_repairs_nothing_is_no_proposal(new):
    solution = Polish(threshold(new))(on_a_line())
    assert solution.proposal is None
    assert solution.reason == "the new weights repair no target without breaking what is right."
    assert len(solution.steps) == 2


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (mlp(16), r"`Polish.new` has '0\.weight' in the shape \[16, 4\], not \[12, 4\]; 2 more "),
        ({}, r"`Polish.new` lacks '0\.weight'; 3 more"),
        (
            {**snapshot(mlp()), "3.weight": torch.zeros(2)},
            r"`Polish.new` has '3\.weight', which is not in the model\.",
        ),
    ],
)
def test_another_architecture_is_refused(new, message):
    with pytest.raises(
        ConfigurationError, match=message + r"[\s\S]*\nHINT: give weights of the same architecture"
    ):
        Polish(new)(make_problem(trained(), known()))


def test_weights_that_differ_beyond_the_layer_are_refused():
    problem = make_problem(trained(), known(), layer="2")
    new = retrained(problem.model)
    with pytest.raises(
        ConfigurationError, match=r"`Polish.new` differs in '0\.weight' too\.\nHINT: leave `layer`"
    ):
        Polish(new)(problem)
    head = {**snapshot(problem.model), "2.weight": new["2.weight"], "2.bias": new["2.bias"]}
    solution = Polish(head)(problem)
    state = head if solution.proposal is None else solution.proposal.state
    assert torch.equal(state["0.weight"], problem.model[0].weight)


def test_a_repair_that_is_late_still_breaks_nothing():
    problem = on_a_line(clock=StageTimer(max_time=1e-9))
    solution = Polish(threshold(-3.0))(problem)
    assert (
        solution.steps[1].note
        == "0 rounds, cut by `max_time`, then scaled back to 3% of the change"
    )
    assert (solution.steps[1].repaired, solution.steps[1].broken) == (1, 0)


def test_tied_weights_are_polished_as_one():
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
    assert broken(problem, solution.proposal.state) == 0
    outcome = repair_module(
        model, known(), Settings(method=Polish(new), bounds=BoundOptions(strength=1.0))
    )
    assert outcome.write(model)
    assert model.second.weight is model.first.weight
    assert broken(problem, {}) == 0
    assert sum(split.kept + split.repaired for split in outcome.report.splits) == int(
        right(problem, {}).sum()
    )


RIGHT, WRONG = threshold(0.65), threshold(0.9)
"""The first gets one of the targets of `on_a_line` right, 0.7, the second none."""


def at(solution: Any) -> float:
    return float(solution.proposal.state["weight"][0, 1])


def test_rounds_move_the_threshold_until_a_target_is_right():
    problem = on_a_line()
    with left_alone(problem.model):
        solution = Apricot([RIGHT, WRONG], rate=0.1)(problem)
    # 0.75 + 0.05 (0.65 - 0.75) - 0.15 (0.9 - 0.75) = 0.7225, and the same from there
    assert at(solution) == pytest.approx(0.69225, abs=1e-6)
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    assert (
        solution.steps[0].note == "2 checkpoints, right on 1 of the targets; 7 rounds"
    )  # 5 of them without more
    alone = Apricot([RIGHT, WRONG], rate=0.1, strategy="right", rounds=50, patience=20)(problem)
    assert 0.65 < at(alone) < 0.7
    pushed = Apricot([WRONG], rate=0.1, strategy="wrong", rounds=2)(problem)
    assert at(pushed) == pytest.approx(
        0.684, abs=1e-6
    )  # 0.75 - 0.2 (0.9 - 0.75) = 0.72, and the same from there


def test_one_round_goes_no_further_than_a_fifth():
    solution = Apricot([RIGHT], strategy="right", rate=100.0, rounds=1, polish=False)(on_a_line())
    assert solution.proposal is None  # 0.75 + 0.2 (0.65 - 0.75) = 0.73 repairs nothing
    assert solution.reason == "no move toward the checkpoints repairs a target within the gate."


def test_the_training_goes_on_from_there_and_what_breaks_comes_back():
    training = FakeTraining(threshold(0.55))  # repairs 0.7 and breaks 0.6
    solution = Apricot([RIGHT, WRONG], rate=0.1, rounds=1, epochs=3)(on_a_line(training=training))
    (call,) = training.calls
    assert call["epochs"] == 3
    assert float(call["start"]["weight"][0, 1]) == pytest.approx(
        0.75
    )  # one round has repaired nothing yet
    assert [step.name for step in solution.steps] == ["apricot", "fit", "polish"]
    assert (solution.steps[1].repaired, solution.steps[1].broken) == (1, 1)
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    layer = on_a_line(training=training, whole_network=False)
    assert [step.name for step in Apricot([RIGHT], rounds=1, polish=False)(layer).steps] == [
        "apricot"
    ]


def test_a_network_with_its_checkpoints_in_a_folder(tmp_path):
    model = trained()
    problem = make_problem(model, known())
    for seed in range(2):
        torch.save({"state_dict": dict(retrained(model, seed))}, tmp_path / f"epoch={seed}.ckpt")
    torch.save(model.state_dict(), tmp_path / "last.ckpt")  # the model itself, which says nothing
    solution = Apricot(str(tmp_path), rate=0.02)(problem)
    assert solution.steps[0].note.startswith("2 checkpoints, ")
    assert solution.proposal.repaired > 0
    assert solution.proposal.broken == 0
    again = Apricot([tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"], rate=0.02)(problem)
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
def test_what_means_nothing_is_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Apricot(**arguments)


def test_without_checkpoints_it_says_how_to_keep_some(tmp_path):
    with pytest.raises(ConfigurationError, match=r"is missing\.[\s\S]*save_top_k=5"):
        METHODS.parse("method", "apricot")(on_a_line())
    with pytest.raises(ConfigurationError, match="is no folder with checkpoints"):
        Apricot(tmp_path)(on_a_line())
    same_as_model = Apricot([threshold(0.75)])(on_a_line())
    assert same_as_model.reason == "all `Apricot.checkpoints` have the same weights as the model."
