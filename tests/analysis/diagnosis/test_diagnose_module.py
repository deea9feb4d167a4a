"""A diagnosis from model and data to table and picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_repairs import known, trained

from lightning_nrl import Settings, Target, TensorSource
from lightning_nrl.analysis.diagnosis import Diagnosis, diagnose_module
from lightning_nrl.errors import EvaluationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation import head_features as features
from lightning_nrl.report import hash_tensors
from lightning_nrl.tasks import Task


def by_score(*weights: float) -> nn.Linear:
    """Class 1 where the weighted sum is above 0, else class 0; no bias."""
    model = nn.Linear(len(weights), 2, bias=False)
    model.weight.data = 0.5 * torch.tensor([[-w for w in weights], list(weights)])
    return model


def points(x: list[list[float]], labels: list[int], split: str, **marks: Any) -> TensorSource:
    return TensorSource(torch.tensor(x), torch.tensor(labels), split, **marks)


KEPT = points([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]], [0, 0, 1], "train", passed=True)
FAILED = points([[1.0, 1, 1], [2.0, 0, 0], [0, 0, 3.0], [1.0, 1, 0.5]], [1, 1, 1, 1], "new", failed=True)
"""Without anything in the way; not to be told from a passed sample; passed; fixable, but a passed sample binds."""


def toy() -> Diagnosis:
    return diagnose_module(by_score(-0.1, -1.0, 1.0), [KEPT, FAILED])


def test_what_can_be_fixed_alone_and_which_passed_sample_stands_in_the_way() -> None:
    found = toy()
    assert found.known == {"samples": 7, "passed": 4, "failed": 3, "targeted": 3}
    assert [(t.split, t.id, t.label, t.prediction, t.fixable) for t in found.targets] == [
        ("new", 0, 1, 0, "yes"),
        ("new", 1, 1, 0, "no"),
        ("new", 3, 1, 0, "yes"),
    ]
    assert [t.margin for t in found.targets] == pytest.approx([-0.1, -0.2, -0.6])
    (first,) = found.binding
    assert (first.split, first.id, first.label, first.targets) == ("train", 0, 0, 2)
    assert first.margin == pytest.approx(0.1)
    assert (found.count("yes"), found.count("no"), found.head) == (2, 1, "")


class Squashed(nn.Module):
    """The first layer sees two inputs and passes on one of them; the last Linear can only see that one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
        self.first.weight.data, self.head.weight.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [-1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))


def test_the_layer_that_can_tell_samples_apart_is_advised() -> None:
    kept = points([[1.0, 0.0], [-1.0, 0.0]], [0, 1], "train", passed=True)
    failed = points([[1.0, 1.0], [1.0, -1.0]], [1, 0], "new", failed=True)
    found = diagnose_module(Squashed(), [kept, failed])
    assert [t.fixable for t in found.targets] == ["no"]
    first, head = found.layers
    # Of weights (1, 0) and margins 2 x'w the target needs -2 (1 + v_1 + v_2) = 0.001: v = -1.0005 / 2 on each axis.
    assert (first.layer, first.change) == ("first", pytest.approx(1.0005 / 2**0.5, rel=1e-4))
    assert (head.layer, head.change, head.room) == ("head", float("inf"), pytest.approx(0, abs=1e-3))
    assert found.easiest_layer == first


def test_a_wrong_label_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [centre + 0.3 * torch.randn(20, 2, generator=generator) for centre in torch.tensor([[-2.0, 0], [2.0, 0]])]
    )
    labels = (torch.arange(40) // 20).tolist()
    labels[5] = 1  # a sample from the middle of class 0
    x[5] = torch.tensor([-3.0, 0.0])
    found = diagnose_module(by_score(1.0, 0.0), [points(x.tolist(), labels, "all", passed=True, failed=True)])
    (doubt,) = found.doubts
    assert (doubt.split, doubt.id, doubt.label, doubt.prediction, doubt.agreed) == ("all", 5, 1, 0, 1.0)
    assert doubt.lead == pytest.approx(3.0)
    assert found.advice.startswith("Look at labels first: those of 1 of 1 targets")
    assert found.mixing.targets == (1, *10 * [0])
    assert found.mixing.passed == (*10 * [0], 39)


def test_the_model_is_left_as_found() -> None:
    model = trained()
    before, random = hash_tensors(model.state_dict()), torch.get_rng_state()
    found = diagnose_module(model, known())
    assert hash_tensors(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert found.known["targeted"] > 10


def test_json_gives_all_of_it_back() -> None:
    for found in (toy(), diagnose_module(trained(), known()), diagnose_module(Squashed(), [KEPT_2, FAILED_2])):
        text = found.to_json()
        again = Diagnosis.from_json(text)
        assert again.to_json() == text
        assert again.layers == found.layers
        assert again.binding == found.binding
        assert (again.check, again.mixing, again.costs, again.notes) == (
            found.check,
            found.mixing,
            found.costs,
            found.notes,
        )
        assert json.loads(text)["fixable"]["yes"] == found.count("yes")


KEPT_2 = points([[1.0, 0.0], [-1.0, 0.0]], [0, 1], "train", passed=True)
FAILED_2 = points([[1.0, 1.0]], [1], "new", failed=True)


def test_pages_fit_their_width_and_name_what_was_found() -> None:
    found = diagnose_module(trained(), known())
    for width in (56, 80, 120):
        lines = found.render(width).splitlines()
        assert max(map(len, lines)) <= width
    assert found.render().isascii()
    page = toy().render()
    assert re.search(r"^can be fixed +2$", page, re.MULTILINE)
    assert re.search(r"^cannot be fixed +1$", page, re.MULTILINE)
    assert re.search(r"^train 0 +0 +0.1 +2$", page, re.MULTILINE)
    assert "| train 0 | 0 | 0.1 | 2 |" in toy().to_markdown()


def test_many_classes_are_put_together_on_a_page() -> None:
    found = toy()
    many = replace(found, targets=tuple(replace(found.targets[0], id=i, label=i // 2) for i in range(24)))
    header, counts = re.search(r"\n( +all .*)\n.*\n-+\n(targets .*)\n", many.render(120)).groups()
    assert header.split() == ["all", *map(str, range(8)), "4", "other"]
    assert counts.split() == ["targets", "24", *8 * ["2"], "8"]


def overlap(boxes: list[Any]) -> bool:
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_picture_shows_every_target_and_its_titles_do_not_touch(tmp_path: Any) -> None:
    found = toy()
    figure = found.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").stat().st_size > 10_000
    margins, _, room = figure.axes
    assert sum(bar.get_height() for stack in margins.containers for bar in stack) >= len(found.targets)
    assert [text.get_text() for text in margins.get_legend().get_texts()] == ["can be fixed (2)", "cannot be fixed (1)"]
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    assert not overlap([axes.title.get_window_extent(renderer) for axes in figure.axes])
    assert not overlap([axes.xaxis.label.get_window_extent(renderer) for axes in figure.axes])
    assert len(room.get_yticks()) == len(found.layers)


def test_a_picture_of_nothing_says_so() -> None:
    found = diagnose_module(by_score(-0.1, -1.0, 1.0), [KEPT, replace(KEPT, split="new", failed=True)])
    shown = [text.get_text() for axes in found.plot().axes for text in axes.texts]
    assert shown == ["no margin is known", "not looked at", "not looked at"]


def test_nothing_to_repair_is_an_answer() -> None:
    found = diagnose_module(by_score(-0.1, -1.0, 1.0), [KEPT, FAILED], Settings(target=Target.label(0)))
    assert found.advice == "Nothing to repair: no failed sample is in the target."
    assert (found.targets, found.layers, found.check) == ((), (), None)
    assert "Nothing to repair" in found.render()


class Within(Task):
    """Right within a tolerance; no classes and no margin."""

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).abs() < 0.5

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).square()


def test_a_task_without_margins_leaves_the_swarm() -> None:
    found = diagnose_module(Evaluator(by_score(-0.1, -1.0, 1.0), Within()), [KEPT, FAILED])
    assert found.advice.startswith("Use method='auto', which is the swarm here: the task has no margins")
    assert {cost.method for cost in found.costs} == {"swarm", "auto"}
    assert [note.partition(":")[0] for note in found.notes] == [
        "What the last layer can fix, and neighbourhoods",
        "Room by layer",
    ]


def test_a_last_linear_that_does_not_give_the_logits_is_said() -> None:
    found = diagnose_module(nn.Sequential(by_score(-0.1, -1.0, 1.0), nn.Softmax(1)), [KEPT, FAILED])
    assert found.notes == (
        "What the last layer can fix, and neighbourhoods: the last Linear does not give the logits.",
    )
    assert [t.fixable for t in found.targets] == 3 * ["not tried"]
    assert found.layers


def test_losses_that_are_not_finite_are_refused() -> None:
    with pytest.raises(EvaluationError, match="NaN or infinite on 7 known samples"):
        diagnose_module(by_score(float("nan"), 0.0, 0.0), [KEPT, FAILED])


def test_of_very_many_samples_those_nearest_to_failing_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MAX_SAMPLES", 5)
    found = toy()
    # The passed samples with margins of 0.1 and 1.0; those of 1.0 and 3.0 are left out.
    assert [t.fixable for t in found.targets] == ["yes", "no", "yes"]
    assert [(b.split, b.id) for b in found.binding] == [("train", 0)]
    assert found.notes[0].endswith("only 5 of 7 known samples, those nearest to failing, were looked at.")
