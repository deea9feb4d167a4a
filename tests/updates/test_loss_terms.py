"""Terms of a loss that hold to the old model, and the teachers that say what it says."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_nrl import ConfigurationError
from lightning_nrl.tasks import Multiclass
from lightning_nrl.updates import FocalDistillation, MarginHinge, Predictions
from lightning_nrl.updates.loss_terms import (
    ModelTeacher,
    OldAnswers,
    PredictedTeacher,
    parse_terms,
)

TASK = Multiclass()
STUDENT = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log()
RIGHT = torch.tensor([True, False])
LABELS = torch.tensor([0, 1])


def old_of(output: Tensor, target: Tensor) -> OldAnswers:
    return OldAnswers(TASK.passed(output, target), output, TASK.margin(output, target))


def test_distillation_is_stronger_where_the_old_model_is_right():
    old = OldAnswers(RIGHT, torch.zeros(2, 2))
    # The divergence is 1/2 ln(1/2 : 3/4) + 1/2 ln(1/2 : 1/4) = 0.143841.
    torch.testing.assert_close(
        FocalDistillation()(TASK, STUDENT, LABELS, old), torch.tensor([0.143841, 0.0])
    )
    both = FocalDistillation(weight=2.0, base=1.0, focus=5.0)(TASK, STUDENT, LABELS, old)
    torch.testing.assert_close(both, torch.tensor([1.726092, 0.287682]))
    # Divided by the temperature the logits are those above, and 4 times as much comes of it.
    soft = FocalDistillation(base=1.0, focus=0.0, temperature=2.0)(TASK, 2 * STUDENT, LABELS, old)
    torch.testing.assert_close(soft, torch.tensor([0.575364, 0.575364]))


def test_old_outputs_that_are_not_finite_teach_nothing():
    output = STUDENT.clone().requires_grad_()
    old = OldAnswers(RIGHT, torch.tensor([[math.nan, 0.0], [0.0, 0.0]]))
    found = FocalDistillation(base=1.0)(TASK, output, LABELS, old)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.143841]))
    found.sum().backward()
    assert output.grad[0].tolist() == [0.0, 0.0]
    assert output.grad[1].isfinite().all()


def test_the_hinge_asks_for_a_part_of_the_old_margin():
    output = torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 1.0], [0.0, 4.0, 1.0]], requires_grad=True)
    target = torch.tensor([0, 2, 2])  # margins 1, -3 and -3
    old = OldAnswers(torch.tensor([True, True, False]), None, torch.tensor([6.0, 4.0, 4.0]))
    found = MarginHinge()(TASK, output, target, old)
    assert found.tolist() == [2.0, 5.0, 0.0]
    found.sum().backward()
    assert output.grad.tolist() == [[-1.0, 0.0, 1.0], [0.0, 1.0, -1.0], [0.0, 0.0, 0.0]]
    limited = MarginHinge(weight=2.0, share=1.0, most=4.5)
    assert limited(TASK, output, target, old).tolist() == [7.0, 14.0, 0.0]
    unknown = OldAnswers(old.passed)
    assert MarginHinge(most=1.5)(TASK, output, target, unknown).tolist() == [0.5, 4.5, 0.0]


logits = st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=3), min_size=1, max_size=6
)


@settings(max_examples=100, deadline=None)
@given(
    logits,
    logits,
    st.integers(0, 2),
    st.floats(0.1, 10),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_terms_are_never_below_zero_and_zero_for_the_old_model_itself(
    new, old, label, temperature, dtype
):
    n = min(len(new), len(old))
    output, teacher = (torch.tensor(x[:n]).to(dtype) for x in (new, old))
    target = torch.full((n,), label)
    answers = old_of(teacher, target)
    for term in (
        FocalDistillation(base=1.0, temperature=temperature),
        MarginHinge(),
        MarginHinge(share=1.0),
    ):
        found = term(TASK, output, target, answers)
        assert found.shape == (n,)
        assert found.dtype == torch.float32
        assert (found >= -1e-4).all()
        assert term(TASK, teacher, target, answers).abs().max() < 1e-4
    # What the old model gets wrong, the hinge leaves alone; above the goal it asks for nothing.
    hinge = MarginHinge()(TASK, output, target, answers)
    assert (hinge[~answers.passed] == 0).all()
    assert answers.margin is not None
    reached = TASK.margin(output, target) >= 0.5 * answers.margin
    assert (hinge[reached] == 0).all()
    assert (hinge[answers.passed & ~reached] > 0).all()


def test_what_a_term_needs_is_asked_for():
    known = OldAnswers(RIGHT)
    with pytest.raises(ConfigurationError, match="distillation needs the old model"):
        FocalDistillation()(TASK, STUDENT, LABELS, known)
    with pytest.raises(ConfigurationError, match="have no margin to keep"):
        MarginHinge()(TASK, STUDENT, LABELS, known)
    with pytest.raises(ConfigurationError, match=r"returned \[2, 3\], but the new one \[2, 2\]"):
        FocalDistillation()(TASK, STUDENT, LABELS, OldAnswers(RIGHT, torch.zeros(2, 3)))


def test_terms_come_by_name_as_objects_or_several():
    assert parse_terms("margin_hinge") == (MarginHinge(),)
    terms = parse_terms(["focal_distillation", MarginHinge(most=1)])
    assert terms == (FocalDistillation(), MarginHinge(most=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_terms("focal distillation"), "did you mean 'focal_distillation'"),
        (lambda: parse_terms([]), "`term` has 0 terms"),
        (lambda: parse_terms(["margin_hinge", MarginHinge()]), "each with its own `name`"),
        (lambda: parse_terms(3), "`term=3` is no term"),
        (lambda: FocalDistillation(temperature=0), "`temperature=0` is no number above 0"),
        (lambda: FocalDistillation(base=-1), "`base=-1` is no number from 0"),
        (lambda: FocalDistillation(base=0, focus=0), "the term is always 0"),
        (lambda: MarginHinge(share=True), "`share=True` is no number above 0"),
        (lambda: MarginHinge(most=0), "`most=0` is no number above 0"),
    ],
)
def test_bad_terms_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


X = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
Y = torch.tensor([0, 1])


class Counted(nn.Module):
    """Returns its inputs, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.scale


def ids(batch: Any) -> Any:
    return batch[2]


def asked(teacher: Any, x: Tensor = X, y: Tensor = Y, where: Any = (0, 1)) -> Any:
    return teacher((x,), {}, y, (x, y, torch.tensor(where)), x)


def test_it_says_what_the_old_model_says():
    answers = asked(ModelTeacher(Counted(), TASK))
    assert answers.passed.tolist() == [True, False]
    assert answers.output.tolist() == X.tolist()
    assert answers.margin.tolist() == [1.0, -2.0]
    assert not answers.output.requires_grad


def test_with_an_index_each_sample_is_asked_about_once():
    model = Counted()
    teacher = ModelTeacher(model, TASK, index=ids)
    asked(teacher, where=[5, 2])
    assert model.calls == 1
    # The first samples that come back are run again, to see whether they are the same; from then on
    # none is.
    for _ in range(3):
        answers = asked(teacher, X.flip(0), Y.flip(0), [2, 5])
        assert answers.output.tolist() == X.flip(0).tolist()
    assert model.calls == 2
    asked(teacher, where=[5, 40])
    assert model.calls == 3


def test_samples_that_come_back_changed_are_asked_about_each_time():
    model = Counted()
    teacher = ModelTeacher(model, TASK, index=ids)
    asked(teacher)
    with pytest.warns(UserWarning, match="samples change between epochs"):
        assert asked(teacher, 2 * X).output.tolist() == (2 * X).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(teacher, 3 * X).output.tolist() == (3 * X).tolist()


def test_classes_in_another_order_and_classes_that_only_one_model_has():
    # Old classes 0, 1, 2 are the new ones 2, none and 0; the new class 1 is unknown to the old
    # model.
    teacher = ModelTeacher(Counted(), TASK, classes={0: 2, 2: 0})
    y, new = torch.tensor([2, 1]), torch.zeros(2, 3)
    answers = teacher((X,), {}, y, None, new)
    by_class = dict(zip(answers.columns.tolist(), answers.output[0].tolist(), strict=True))
    assert by_class == {2: 2.0, 0: 1.0}
    assert answers.passed.tolist() == [True, False]
    assert answers.margin.tolist() == [1.0, -math.inf]
    # The class that only the old model has wins: wrong, whatever the label is.
    x = torch.tensor([[0.0, 9.0, 1.0]])
    answers = teacher((x,), {}, torch.tensor([0]), None, new[:1])
    assert answers.margin.tolist() == [-8.0]


def test_predictions_say_what_was_right():
    predictions = Predictions({"train": {3: (0, None), 7: (2, None)}})
    teacher = PredictedTeacher(predictions, TASK, ids)
    assert asked(teacher, where=[3, 7]).passed.tolist() == [True, False]
    with pytest.raises(ConfigurationError, match=r"the samples \[4, 90\] of `train`"):
        asked(teacher, where=[4, 90])
    with pytest.raises(ConfigurationError, match=r"has predictions for no split, not for `train`"):
        PredictedTeacher(Predictions({}), TASK, ids)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda batch: batch[3], "`index` raised IndexError"),
        (lambda batch: batch[2].float(), r"`index` returned torch.float32 \[2\] for a batch of 2"),
    ],
)
def test_an_index_that_is_none_is_refused(index, message):
    with pytest.raises(ConfigurationError, match=message):
        asked(ModelTeacher(Counted(), TASK, index=index))


def test_another_number_of_samples_is_refused():
    with pytest.raises(ConfigurationError, match=r"model raised TypeError on a batch"):
        ModelTeacher(Counted(), TASK)((), {}, Y, (X, Y), X)
    with pytest.raises(ConfigurationError, match=r"returned \[2, 3\] for a batch of 1 samples"):
        ModelTeacher(Counted(), TASK)((X,), {}, Y[:1], None, X[:1])
