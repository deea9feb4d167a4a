"""What each task says of samples that are counted by hand, and what it refuses; what holds for all:
test_invariants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_nrl import ConfigurationError
from lightning_nrl import RegressionFreeRepair as Repair
from lightning_nrl.tasks import (
    Binary,
    Custom,
    Multiclass,
    Multilabel,
    NamedHead,
    Ordinal,
    Regression,
    Segmentation,
    Sequence,
    parse_task,
)

NAN, INF = math.nan, math.inf

TAGS = torch.tensor([[2.0, -1.0, 0.5], [1.0, -3.0, -0.25], [0.0, -1.0, -1.0]])
TAG_LABELS = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0]])
NUMBERS = torch.tensor([[1.25, 2.0], [1.0, 4.0], [1.5, 2.0]])
TRUE_NUMBERS = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
# Two sequences of three tokens, the last of the second is padding.
TOKENS = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 0.5]], [[0.0, 0.25], [2.0, 1.0], [9.0, 0.0]]])
TOKEN_LABELS = torch.tensor([[0, 1, 0], [1, 1, -100]])
# One logit a pixel, for class 1. Leads are 1, 2, 3 and -0.5; of the most certain pixels two give an
# IoU of (1/3 + 1/3) / 2, three (2/3 + 1/2) / 2.
PIXELS = torch.tensor([[[[-1.0, 2.0], [-3.0, 0.5]]]])
TRUTH = torch.tensor([[[0, 1], [0, 0]]])
HALF_IGNORED = torch.tensor([[[0, 1], [0, 255]]])
SEVEN_OF_TEN = torch.stack([torch.tensor([1.0] * 7 + [-1.0] * 3), torch.zeros(10)], 1)[None]


@pytest.mark.parametrize(
    ("task", "output", "target", "margin"),
    [
        # A logit of exactly 0 is on neither side.
        (Multilabel(), TAGS, TAG_LABELS, [-0.5, 0.25, 0.0]),
        (Multilabel(wrong=1), TAGS, TAG_LABELS, [1.0, 1.0, 1.0]),
        # 0.2 is a logit of ln(1/4) = -1.386294
        (Multilabel(threshold=0.2), TAGS[:1] - 3, TAG_LABELS[:1], [0.386294]),
        (Multilabel(), TAGS[:1] * NAN, TAG_LABELS[:1], [-INF]),
        (Regression(0.5), NUMBERS, TRUE_NUMBERS, [0.5, -3.0, 0.0]),
        # The tolerances are 0.5 + 0.25 * 1 = 0.75 and 0.5 + 0.25 * 2 = 1.
        (Regression(0.5, relative=0.25), NUMBERS[:1].half(), TRUE_NUMBERS[:1], [2 / 3]),
        (Regression(1.0), torch.tensor([NAN, INF]), torch.zeros(2), [-INF, -INF]),
        (Sequence(class_dim=1), TOKENS.transpose(1, 2), TOKEN_LABELS, [0.5, -1.0]),
        (Sequence(share=0.5), TOKENS, TOKEN_LABELS, [2.0, 0.25]),
        (Sequence(share=0.7), SEVEN_OF_TEN, torch.zeros(1, 10, dtype=torch.int64), [1.0]),
        (Sequence(share=0.71), SEVEN_OF_TEN, torch.zeros(1, 10, dtype=torch.int64), [-1.0]),
        (Sequence(), TOKENS * NAN, TOKEN_LABELS, [-INF, -INF]),
        (Segmentation(0.58), PIXELS, TRUTH, [1.0]),
        (Segmentation(0.59), PIXELS, TRUTH, [-0.5]),
        (Segmentation(1.0, ignore_index=255), PIXELS, HALF_IGNORED, [1.0]),
        (Segmentation(), PIXELS * NAN, TRUTH, [-INF]),
    ],
)
def test_margins_by_hand(task, output, target, margin):
    task.check(output, target)
    torch.testing.assert_close(task.margin(output, target), torch.tensor(margin))
    assert task.passed(output, target).tolist() == [value > 0 for value in margin]
    assert task.loss(output, target).dtype == torch.float32
    assert task.prediction(output) is task.label(target) is None


@pytest.mark.parametrize(
    ("task", "output", "target", "loss"),
    [
        # (ln 2 + ln(1 + e)) / 2 and ln 2
        (
            Multilabel(),
            torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
            torch.tensor([[1, 0], [1, -100]]),
            [1.003204, 0.693147],
        ),
        # errors of 1/2 and 0, 0 and 4, 1 and 0 tolerances: quadratic within one, linear beyond
        (Regression(0.5), NUMBERS, TRUE_NUMBERS, [0.0625, 1.75, 0.25]),
        # (ln(1 + e^-3) + ln(1 + e^-2) + ln(1 + e^-0.5)) / 3 and (ln(1 + e^-0.25) + ln(1 + e)) / 2
        (Sequence(), TOKENS, TOKEN_LABELS, [0.216531, 0.944600]),
        # (ln(1 + e^-1) + ln(1 + e^-2) + ln(1 + e^-3)) / 3, the last pixel ignored
        (Segmentation(ignore_index=255), PIXELS, HALF_IGNORED, [0.162926]),
    ],
)
def test_losses_by_hand(task, output, target, loss):
    torch.testing.assert_close(task.loss(output, target), torch.tensor(loss))


def test_one_logit_a_pixel_is_that_of_class_1_over_a_0():
    two, task = torch.cat([torch.zeros_like(PIXELS), PIXELS], 1), Segmentation()
    for truth in (TRUTH, TRUTH[:, None], TRUTH.bool(), TRUTH[:, None].float()):
        task.check(PIXELS, truth)
        assert torch.equal(task.margin(PIXELS, truth), task.margin(two, TRUTH))
        assert torch.equal(task.loss(PIXELS, truth), task.loss(two, TRUTH))
    assert torch.equal(
        task.divergence(PIXELS, -PIXELS), task.divergence(two, torch.cat([PIXELS * 0, -PIXELS], 1))
    )


def test_the_foreground_alone_may_count_and_where_there_is_none_the_rest():
    logits, truth = PIXELS.expand(2, -1, -1, -1), torch.cat([TRUTH, torch.zeros_like(TRUTH)])
    # Class 1 has an IoU of 1/2; the second image has only class 0, of which two pixels of four are
    # right.
    assert Segmentation(iou=0.5, classes=(1,)).passed(logits, truth).tolist() == [True, True]
    assert Segmentation(iou=0.51, classes=[1]).passed(logits, truth).tolist() == [False, False]
    assert Segmentation(iou=0.51).passed(logits, truth).tolist() == [True, False]


@pytest.mark.parametrize(
    ("task", "output", "target", "message"),
    [
        (Ordinal(), TAGS, TAG_LABELS, r"class numbers from 0 to 3 \[samples\], found"),
        (Ordinal(), TAGS, torch.tensor([0, 4, 1]), r"class numbers from 0 to 3"),
        (Ordinal(), TAGS, torch.tensor([0, 0.5, 1]), r"class numbers from 0 to 3"),
        (Ordinal(), TAGS[0], TAG_LABELS[0], r"needs logits \[samples, classes - 1\]"),
        (Multilabel(), TAGS, TAG_LABELS[:, :2], r"the logits, \[3, 3\], found torch.int64 \[3, 2"),
        (Multilabel(), TAGS, [[1, 0, 0]] * 3, "found list"),
        (Multilabel(), TAGS, TAG_LABELS * NAN, "found a label nan, neither 0 nor 1"),
        (Multilabel(), TAGS, TAG_LABELS * 0 - 100, "a sample has 0 known labels, so none need be"),
        (Multilabel(), TAGS[0], TAG_LABELS, r"multilabel needs logits \[samples, labels\]"),
        (Regression(1.0), TAGS, TAGS[0], r"outputs \[3, 3\] for targets \[3\]"),
        (Regression(1.0), NUMBERS, NUMBERS.T, r"outputs \[3, 2\] for targets \[2, 3\]"),
        (Regression(1.0), TAGS, [1.0], "tensor of numbers as target, found list"),
        (Regression(1.0), TAGS, TAGS * NAN, "9 numbers of a batch's target are NaN"),
        (Sequence(), TOKENS[0], TOKEN_LABELS, r"logits \[samples, tokens, classes\], the model"),
        (Sequence(), TOKENS.transpose(1, 2), TOKEN_LABELS, r"HINT: write `Sequence\(class_dim=1\)"),
        (Sequence(), TOKENS, TOKEN_LABELS + 0.5, "a label 0.5, and the model returned 2 logits"),
        (Sequence(), TOKENS, TOKEN_LABELS[0], r"labels \[samples, ...\], found torch.int64 \[3\]"),
        (Sequence(), TOKENS, TOKEN_LABELS + 1, "there is a label 2"),
        (Sequence(), TOKENS, TOKEN_LABELS.clamp(-1), "there is a label -1"),
        (Sequence(), TOKENS, TOKEN_LABELS * 0 - 100, "2 samples of a batch have the label -100"),
        (Segmentation(), PIXELS[0, 0], TRUTH, r"needs logits \[samples, classes, ...\], the model"),
        (Segmentation(), PIXELS, TRUTH[:, :1], r"logits \[1, 1, 2, 2\] for labels \[1, 1, 2\]"),
        (Segmentation(classes=(2,)), PIXELS, TRUTH, "the model returned 2 logits a pixel"),
    ],
)
def test_what_does_not_fit_is_refused(task, output, target, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        task.check(output, target)
    assert "HINT:" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (Multilabel, "threshold", [0, 1.0, "0.5"]),
        (Multilabel, "wrong", [-1]),
        (Regression, "tolerance", [0, INF, "0.1", None]),
        (Regression, "relative", [-1.0, True]),
        (Sequence, "share", [0, 1.5, True]),
        (Sequence, "class_dim", [2]),
        (Segmentation, "iou", [0, 50]),
        (Segmentation, "classes", [(), 1, ["a"]]),
    ],
)
def test_values_out_of_range_are_refused(kind, name, values):
    for value in values:
        with pytest.raises(ConfigurationError, match=f"`{kind.__name__}.{name}="):
            kind(**{"tolerance": 1.0, name: value} if kind is Regression else {name: value})


def test_names_stand_for_tasks_with_their_defaults():
    assert parse_task("multilabel") == Multilabel()
    assert parse_task("Segmentation") == Segmentation()
    assert type(parse_task("binary")) is Binary
    assert Repair(task="sequence").trainer_repair.task == Sequence()
    assert type(parse_task(None)) is type(parse_task("multiclass")) is Multiclass


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("regression", r"needs arguments.\nHINT: write Regression\(tolerance=0.1\)"),
        ("custom", "needs arguments"),
        ("multi-label", "did you mean 'multilabel'"),
        (Multilabel, "is no Task"),
        (3, "is no Task"),
    ],
)
def test_what_is_no_task_is_refused(task, message):
    with pytest.raises(ConfigurationError, match=message):
        Repair(task=task)


@pytest.mark.parametrize("task", [Binary(), Multiclass()])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_a_sample_is_that_of_class_1_over_a_0(task, shape):
    logits, labels = torch.tensor([2.0, -1.0, 0.5, 0.0]), torch.tensor([1, 0, 0, 0])
    output, two = logits.view(shape), torch.stack([torch.zeros(4), logits], 1)
    for truth in (labels, labels.bool(), labels[:, None].double()):
        task.check(output, truth)
        # A logit of 0 goes to class 0, as arg max and torchmetrics have it.
        assert task.passed(output, truth).tolist() == [True, True, False, True]
        assert task.margin(output, truth).tolist() == [2.0, 1.0, -0.5, 0.0]
        assert torch.equal(task.loss(output, truth), Multiclass().loss(two, labels))
        assert task.label(truth).tolist() == [1, 0, 0, 0]
    assert task.prediction(task.logits(output)).tolist() == [1, 0, 1, 0]
    assert torch.equal(task.divergence(output, -output), Multiclass().divergence(two, -two))
    with pytest.raises(ConfigurationError, match=r"label 2, .* logits[\s\S]*from 0 to 1"):
        task.check(output, labels * 2)
    with pytest.raises(ConfigurationError, match="binary needs one logit a sample"):
        Binary().check(two, labels)


LOGITS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
LABELS = torch.tensor([0, 0, 1])


class Named(NamedTuple):
    loss: Tensor
    logits: Tensor


@dataclass
class Output:
    prediction: Tensor
    attention: Tensor | None = None


def test_ordinal_predicts_how_many_thresholds_are_exceeded():
    logits = torch.tensor([[2.0, -1.0], [3.0, 0.5], [-0.5, -2.0], [0.25, NAN]])
    classes = torch.tensor([1, 1, 0, 1])
    task = Ordinal()
    task.check(logits, classes.float()[:, None])
    assert task.prediction(logits[:3]).tolist() == [1, 2, 0]
    assert task.passed(logits, classes).tolist() == [True, False, True, False]
    assert task.margin(logits, classes).tolist() == [1.0, -0.5, 0.5, -INF]
    # (ln(1 + e^-2) + ln(1 + e^-1)) / 2
    torch.testing.assert_close(task.loss(logits, classes)[0], torch.tensor(0.220095))


def test_conditional_probabilities_are_multiplied():
    # Both thresholds have a probability of 0.6, so both are exceeded with 0.36.
    logits = torch.full((2, 2), math.log(0.6 / 0.4))
    task = Ordinal(conditional=True)
    assert task.prediction(logits).tolist() == [1, 1]
    margin = task.margin(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(margin, torch.tensor([math.log(1.2), -math.log(1.2)]))
    # The second threshold is never asked about a sample of class 0: -ln(1 - 0.6) alone.
    loss = task.loss(logits, torch.tensor([2, 0]))
    torch.testing.assert_close(loss, -torch.tensor([0.6, 0.4]).log())


def test_multiclass_passes_by_arg_max_and_loses_by_cross_entropy():
    task = Multiclass()
    assert task.prediction(LOGITS).tolist() == [0, 1, 0]
    assert task.passed(LOGITS, LABELS).tolist() == [True, False, False]
    # ln(1 + 1), ln(1 + e), ln(1 + e^2)
    torch.testing.assert_close(
        task.loss(LOGITS, LABELS), torch.tensor([0.693147, 1.313262, 2.126928])
    )


def test_the_margin_is_to_the_best_other_class_and_the_divergence_from_the_teacher():
    task = Multiclass()
    output = torch.tensor([[3.0, 1.0, 2.0], [0.0, 4.0, 1.0]], requires_grad=True)
    margin = task.margin(output, torch.tensor([0, 2]))
    assert margin.tolist() == [1.0, -3.0]
    margin.sum().backward()
    assert output.grad.tolist() == [[1.0, 0.0, -1.0], [0.0, -1.0, 1.0]]
    # 1/2 ln(1/2 : 3/4) + 1/2 ln(1/2 : 1/4)
    student, teacher = torch.tensor([[0.75, 0.25]]).log(), torch.zeros(1, 2)
    torch.testing.assert_close(task.divergence(student, teacher), torch.tensor([0.143841]))


@pytest.mark.parametrize("shape", [(3, 0), (3, 2, 4)])
def test_output_that_is_no_logits_is_refused(shape):
    with pytest.raises(ConfigurationError, match=r"multiclass needs logits \[samples, classes\]"):
        Multiclass().passed(torch.zeros(shape), LABELS)


@pytest.mark.parametrize(
    "target",
    [
        LABELS[:, None].double(),
        torch.eye(2, dtype=torch.bool)[LABELS],
        torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.25, 0.75]]),
    ],
)
def test_labels_are_also_columns_floats_one_hot_and_soft(target):
    Multiclass().check(LOGITS, target)
    assert Multiclass().label(target).tolist() == [0, 0, 1]
    assert Multiclass().passed(LOGITS, target).tolist() == [True, False, False]
    assert Multiclass().margin(LOGITS, target).tolist() == [0.0, -1.0, -2.0]


def test_the_loss_of_soft_labels_is_the_cross_entropy_with_all_of_them():
    soft = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.25, 0.75]])
    # ln 2; ln(1 + 1 / e); ln(1 + e^2) - 2 / 4
    torch.testing.assert_close(
        Multiclass().loss(LOGITS, soft), torch.tensor([0.693147, 0.313262, 1.626928])
    )


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (torch.tensor([0.0, 0.5, 1.0]), "needs whole-number labels"),
        (torch.eye(3), "not probabilities of 2 classes"),
        (torch.tensor([[1, 1], [0, 1], [1, 0]]), "not probabilities of 2 classes"),
        (torch.zeros(6, dtype=torch.int64), "3 rows of logits for 6 targets"),
        ([0, 0, 1], r"multiclass needs whole-number labels \[samples\]"),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(target, found):
    with pytest.raises(ConfigurationError, match=found):
        Multiclass().check(LOGITS, target)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"loss": torch.tensor(1.0), "out": LOGITS, "aux": LOGITS + 1},
        {"loss": torch.tensor(1.0), "scores": LOGITS},
        Named(LABELS, LOGITS),
        Output(LOGITS),
        (LOGITS, LABELS),
        (torch.tensor(1.0), LOGITS, LABELS),
        [LOGITS],
    ],
)
def test_logits_are_found_in_what_models_return(output):
    assert Multiclass().logits(output) is LOGITS


@pytest.mark.parametrize(
    "output",
    [
        None,
        {"a": LOGITS, "b": LOGITS},
        (),
        ("a",),
        (torch.tensor(1.0),),
    ],
)
def test_output_without_logits_is_refused(output):
    with pytest.raises(ConfigurationError, match="has no tensor of logits"):
        Multiclass().logits(output)


HEAD, OTHER_HEAD = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.zeros(2, 5)
HEAD_LABELS = torch.tensor([1, 1])


@dataclass
class Heads:
    digit: Tensor
    colour: Tensor


@pytest.mark.parametrize(
    ("name", "output", "target"),
    [
        ("digit", Heads(HEAD, OTHER_HEAD), Heads(HEAD_LABELS, HEAD_LABELS - 1)),
        (1, (OTHER_HEAD, HEAD), (HEAD_LABELS - 1, HEAD_LABELS)),
        ("digit", {"digit": {"logits": HEAD}}, HEAD_LABELS),
    ],
)
def test_a_task_judges_the_head_as_it_would_judge_it_alone(name, output, target):
    task, alone = NamedHead(name), Multiclass()
    logits = task.logits(output)
    assert logits is HEAD
    task.check(logits, target)
    assert task.passed(logits, target).tolist() == [True, False]
    assert task.margin(logits, target).tolist() == [1.0, -2.0]
    assert task.label(target).tolist() == [1, 1]
    assert torch.equal(task.loss(logits, target), alone.loss(HEAD, HEAD_LABELS))
    assert not task.passed_and_loss(logits, target, torch.full((2,), 2.0))[0].any()
    assert torch.equal(task.divergence(logits, HEAD + 1, target), alone.divergence(HEAD, HEAD + 1))
    assert task.prediction(logits).tolist() == [1, 0]


def test_a_head_that_is_not_there_is_refused_with_what_is():
    with pytest.raises(
        ConfigurationError, match=r"not in the output[\s\S]*colour: float32 \[2, 5\]"
    ):
        NamedHead("digit").logits({"colour": OTHER_HEAD})


def test_the_task_of_a_head_may_be_a_name():
    assert NamedHead("digit", "multiclass").passed(HEAD, HEAD_LABELS).tolist() == [True, False]
    assert repr(NamedHead("digit", "sequence")) == repr(NamedHead("digit", Sequence()))
    with pytest.raises(ConfigurationError, match=r"`task='regression'` needs arguments"):
        NamedHead("digit", "regression")


OUTPUT, TARGET = torch.tensor([[1.0, 2.0], [0.0, 5.0]]), torch.tensor([[1.0, 2.25], [0.0, 2.0]])


def near(output: Tensor, target: Tensor) -> Tensor:
    return far(output, target) < 0.5


def far(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().amax(1)


def spare(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 - far(output, target)


def test_functions_say_what_passed_and_loss_mean():
    task = Custom(passed=near, loss=far, margin=spare)
    task.check(OUTPUT, TARGET)
    assert task.passed(OUTPUT, TARGET).tolist() == [True, False]
    assert task.loss(OUTPUT, TARGET).tolist() == [0.25, 3.0]
    margin = task.margin(OUTPUT, TARGET)
    assert margin.tolist() == [0.25, -2.5]
    assert task.divergence(OUTPUT, TARGET).tolist() == [0.03125, 4.5]
    assert task.loss(OUTPUT.half(), TARGET.half()).dtype == torch.float32


def test_addresses_will_do():
    task = Custom("test_tasks:near", "test_tasks.far", "test_tasks:spare")
    assert task.passed(OUTPUT, TARGET).tolist() == [True, False]
    assert str(task) == "Custom: passed by test_tasks:near"
    assert (
        repr(task)
        == "Custom(passed='test_tasks:near', loss='test_tasks.far', margin='test_tasks:spare')"
    )
    assert repr(Custom(near, far)) == "Custom(passed='test_tasks:near', loss='test_tasks:far')"


@pytest.mark.parametrize(
    "wrong", [{"passed": "nowhere:f"}, {"loss": 3}, {"margin": "test_tasks:missing"}]
)
def test_what_is_no_function_is_refused_by_its_name(wrong):
    with pytest.raises(ConfigurationError, match=f"`Custom.{next(iter(wrong))}"):
        Custom(**{"passed": near, "loss": far, **wrong})


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"passed": lambda o, t: o[:, :3] == t[:, :1, :1]}, "`Custom.passed` raised IndexError"),
        ({"passed": torch.eq}, r"`Custom.passed` returned torch.bool \[2, 2\] for a batch of 2"),
        ({"passed": lambda o, t: [True, False]}, "`Custom.passed` returned list"),
        ({"passed": far}, "`Custom.passed` returned torch.float32"),
        ({"loss": torch.dist}, r"`Custom.loss` returned torch.float32 \[\] for a batch"),
        ({"margin": far}, "`Custom.margin` returned 3 for a sample that did not pass"),
    ],
)
def test_functions_that_do_not_fit_are_refused(functions, message):
    task = Custom(**{"passed": near, "loss": far, "margin": spare, **functions})
    with pytest.raises(ConfigurationError, match=f"{message}[\\s\\S]*HINT:"):
        task.check(OUTPUT, TARGET)
