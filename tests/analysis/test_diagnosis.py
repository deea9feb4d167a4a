"""A diagnosis from model and data to advice, table and picture."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_problems import left_alone
from toy_repairs import Within, known, trained

from lightning_nrl import Settings, Target, TensorSource
from lightning_nrl.analysis.diagnosis import (
    Diagnosis,
    DoubtfulLabel,
    HeldOutCheck,
    LayerCapacity,
    NeighbourMixing,
    TargetFinding,
    diagnose_module,
)
from lightning_nrl.analysis.diagnosis.advice import advise
from lightning_nrl.errors import EvaluationError
from lightning_nrl.evaluation import Evaluator


def by_score(*weights: float) -> nn.Linear:
    """Class 1 where the weighted sum is above 0, else class 0; no bias."""
    model = nn.Linear(len(weights), 2, bias=False)
    model.weight.data = 0.5 * torch.tensor([[-w for w in weights], list(weights)])
    return model


def points(x: list[list[float]], labels: list[int], split: str, **marks: Any) -> TensorSource:
    return TensorSource(torch.tensor(x), torch.tensor(labels), split, **marks)


KEPT = points([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]], [0, 0, 1], "train", passed=True)
FAILED = points(
    [[1.0, 1, 1], [2.0, 0, 0], [0, 0, 3.0], [1.0, 1, 0.5]], [1, 1, 1, 1], "new", failed=True
)
"""Without anything in the way; not to be told from a passed sample; passed; fixable, but a passed
sample binds.
"""


def toy() -> Diagnosis:
    return diagnose_module(by_score(-0.1, -1.0, 1.0), [KEPT, FAILED])


def test_what_can_be_fixed_alone_and_which_passed_sample_stands_in_the_way():
    found = toy()
    assert found.known == {"samples": 7, "passed": 4, "failed": 3, "targeted": 3}
    assert [(t.id, t.fixable) for t in found.targets] == [(0, "yes"), (1, "no"), (3, "yes")]
    assert [t.margin for t in found.targets] == pytest.approx([-0.1, -0.2, -0.6])
    (first,) = found.binding
    assert (first.split, first.id, first.label, first.targets) == ("train", 0, 0, 2)
    assert (found.count("yes"), found.count("no"), found.head) == (2, 1, "")


class Squashed(nn.Module):
    """The first layer sees two inputs and passes on one of them; the last Linear can only see that
    one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
        self.first.weight.data = torch.tensor([[1.0, 0.0]])
        self.head.weight.data = torch.tensor([[1.0], [-1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))


def test_the_layer_that_can_tell_samples_apart_is_advised():
    kept = points([[1.0, 0.0], [-1.0, 0.0]], [0, 1], "train", passed=True)
    failed = points([[1.0, 1.0], [1.0, -1.0]], [1, 0], "new", failed=True)
    found = diagnose_module(Squashed(), [kept, failed])
    assert [t.fixable for t in found.targets] == ["no"]
    first, head = found.layers
    # Of weights (1, 0) and margins 2 x'w the target needs -2 (1 + v_1 + v_2) = 0.001: v = -1.0005 /
    # 2 on each axis.
    assert (first.layer, first.change) == ("first", pytest.approx(1.0005 / 2**0.5, rel=1e-4))
    assert (head.layer, head.change) == ("head", math.inf)
    assert found.easiest_layer == first


def test_a_wrong_label_is_found():
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(40, 2, generator=generator)
    x[:, 0] += torch.tensor([-2.0, 2.0]).repeat_interleave(20)
    labels = [0] * 20 + [1] * 20
    labels[5] = 1  # a sample from the middle of class 0
    x[5] = torch.tensor([-3.0, 0.0])
    found = diagnose_module(
        by_score(1.0, 0.0), [points(x.tolist(), labels, "all", passed=True, failed=True)]
    )
    (doubt,) = found.doubts
    assert replace(doubt, lead=0.0) == DoubtfulLabel("all", 5, 1, 0, agreed=1.0, lead=0.0)
    assert doubt.lead == pytest.approx(3.0)
    assert found.advice.startswith("Look at labels first: those of 1 of 1 targets")
    assert (found.mixing.k, found.mixing.targets, found.mixing.passed) == (10, 0.0, 1.0)


def test_the_model_is_left_as_found():
    model = trained()
    with left_alone(model):
        diagnosis = diagnose_module(model, known())
    assert not any(module._forward_hooks for module in model.modules())
    assert diagnosis.known["targeted"] > 10


def test_json_gives_all_of_it_back():
    for found in (toy(), diagnose_module(trained(), known())):
        text = found.to_json()
        again = Diagnosis.from_json(text)
        assert again.to_json() == text
        assert (again.layers, again.check, again.notes) == (found.layers, found.check, found.notes)
        assert json.loads(text)["fixable"]["yes"] == found.count("yes")


def test_pages_fit_their_width_and_name_what_was_found():
    found = diagnose_module(trained(), known())
    for width in (56, 120):
        assert max(map(len, found.render(width).splitlines())) <= width
    assert found.render().isascii()
    page = toy().render()
    assert re.search(r"^can be fixed +2$", page, re.MULTILINE)
    assert re.search(r"^cannot be fixed +1$", page, re.MULTILINE)
    assert re.search(r"^train 0 +0 +0.1 +2$", page, re.MULTILINE)
    # Long tables are cut, unless the page is for a reviewer.
    many = replace(found, doubts=tuple(replace(DOUBT, id=i) for i in range(24)))
    assert re.search(r"^new 7 .*\nand 16 more$", many.render(120), re.MULTILINE)
    assert "new 23" in many.to_markdown()


def test_the_picture_shows_every_target(tmp_path):
    found = toy()
    (axes,) = found.plot(tmp_path / "diagnosis.png").axes
    assert (tmp_path / "diagnosis.png").stat().st_size > 10_000
    assert sum(bar.get_height() for stack in axes.containers for bar in stack) == len(found.targets)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "can be fixed (2)",
        "cannot be fixed (1)",
    ]


def test_nothing_to_repair_is_an_answer():
    found = diagnose_module(
        by_score(-0.1, -1.0, 1.0), [KEPT, FAILED], Settings(target=Target.label(0))
    )
    assert found.advice == "Nothing to repair: no failed sample is in the target."
    assert (found.targets, found.layers, found.check) == ((), (), None)
    assert "Nothing to repair" in found.render()
    (axes,) = found.plot().axes
    assert [text.get_text() for text in axes.texts] == ["no margin is known"]


def test_a_task_without_margins_leaves_the_swarm():
    found = diagnose_module(Evaluator(by_score(-0.1, -1.0, 1.0), Within()), [KEPT, FAILED])
    assert found.advice.startswith(
        "Use method='auto', which is the swarm here: the task has no margins"
    )
    assert set(found.costs) == {"swarm", "auto"}
    notes = [note.partition(":")[0] for note in found.notes]
    assert notes == ["What the last layer can fix, and neighbourhoods", "Change by layer"]


def test_a_last_linear_that_does_not_give_the_logits_is_said():
    found = diagnose_module(nn.Sequential(by_score(-0.1, -1.0, 1.0), nn.Softmax(1)), [KEPT, FAILED])
    assert found.notes[0].endswith("neighbourhoods: the last Linear does not return the logits.")
    assert [t.fixable for t in found.targets] == 3 * ["not tried"]
    assert found.layers


def test_losses_that_are_not_finite_are_refused():
    with pytest.raises(EvaluationError, match="NaN or infinite on 7 known samples"):
        diagnose_module(by_score(float("nan"), 0.0, 0.0), [KEPT, FAILED])


def test_of_very_many_samples_those_nearest_to_failing_are_looked_at():
    far = points([[0, 0, 4.0]] * 20_000, [1] * 20_000, "far", passed=True)
    found = diagnose_module(by_score(-0.1, -1.0, 1.0), [KEPT, FAILED, far])
    assert [t.fixable for t in found.targets] == ["yes", "no", "yes"]
    assert ("train", 0) in [(b.split, b.id) for b in found.binding]
    assert found.notes[0].endswith(
        "only 20,000 of 20,007 known samples, those nearest to failing, were looked at."
    )


WHOLE = "Use the default, method='auto', on the whole network, about 10 s:"
LAST = "the last layer (head)"
KNOWN = {"samples": 100, "passed": 90, "failed": 10, "targeted": 4}
COSTS = dict.fromkeys(("convex", "finetune-polish", "auto"), 10.0)
DEEP, HEAD = (
    LayerCapacity("conv", "Conv2d", 9, 0.01),
    LayerCapacity("head", "Linear", 9, 0.03),
)
FAR_HEAD = LayerCapacity("head", "Linear", 9, 0.09)
HARMLESS, HARMFUL = HeldOutCheck(4, 9, 0.1, 3, 1.0, 0.9), HeldOutCheck(4, 9, 2.0, 3, 1.0, 0.1)
DOUBT = DoubtfulLabel("new", 7, 0, 1, 1.0, 3.0)
SURE, SOME = ("yes",) * 4, ("yes", "yes", "yes", "no")
NEITHER = LayerCapacity("conv", "Conv2d", 9, math.inf)


def advice_on(
    fixable: tuple[str, ...],
    check: HeldOutCheck | None = None,
    layers: tuple[LayerCapacity, ...] = (),
    known: dict[str, int] = KNOWN,
    margin: float = -1.0,
    doubts: tuple[DoubtfulLabel, ...] = (),
) -> str:
    found = tuple(
        TargetFinding("new", i, 0, 1, margin, verdict) for i, verdict in enumerate(fixable)
    )
    mixing = NeighbourMixing(2, 0.0, 1.0)
    return advise(
        Diagnosis(
            "", "", "", known, "head", found, (), check, mixing, doubts, layers=layers, costs=COSTS
        )
    )


@pytest.mark.parametrize(
    ("advice", "words"),
    [
        (advice_on(SOME, HARMLESS, (DEEP, HEAD)), "Use method='convex', about 10 s"),
        (
            advice_on(("yes", "yes", "no", "no"), HARMLESS, (DEEP, HEAD)),
            f"{WHOLE} {LAST} is not enough",
        ),
        (
            advice_on(SURE, HARMFUL, (DEEP, HEAD)),
            f"{WHOLE} {LAST} would break too much on other data",
        ),
        (
            advice_on(SURE, None, (DEEP, HEAD)),
            f"{WHOLE} what {LAST} would break on other data is not known",
        ),
        (
            advice_on(SURE, HARMLESS, (DEEP, FAR_HEAD)),
            f"{WHOLE} {LAST} would have to change much more",
        ),
        (advice_on(("not tried",) * 4), "Use the default, method='auto', about 10 s."),
        (
            advice_on(SURE, HARMLESS, (DEEP, HEAD), doubts=(DOUBT,)),
            "Look at labels first: those of 1 of 4 targets",
        ),
        (advice_on(("no",) * 4, None, (NEITHER,)), "Get more data like the targets"),
        (advice_on(("not tried",), margin=math.nan), "Use method='auto', which is the swarm here"),
        (advice_on((), known={**KNOWN, "targeted": 0}), "Nothing to repair"),
        (advice_on(("no",), known={**KNOWN, "passed": 0}), "Get data"),
    ],
)
def test_the_advice_follows_the_figures(advice, words):
    assert advice.startswith(words)


def test_an_advice_gives_its_reasons_in_figures():
    advice = advice_on(SOME, HARMLESS, (DEEP, HEAD))
    assert "the last layer can fix 3 of 4 targets without known regressions" in advice
    assert "fixing one repairs 1.0 other targets and breaks 0.1 passed samples" in advice
    assert "a change of conv by 1.0% of its norm, of head by 3.0%" in advice
