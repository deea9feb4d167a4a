from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_nrl import ConfigurationError
from lightning_nrl.tasks import Segmentation

# One logit a pixel, for class 1.
LOGITS = torch.tensor([[[[-1.0, 2.0], [-3.0, 0.5]]]])
TRUTH = torch.tensor([[[0, 1], [0, 0]]])


def mean_iou(prediction: Tensor, truth: Tensor, ignored: int = -100) -> float:
    """Of one image, by sets of pixels."""
    shares = []
    for c in sorted(set(truth.flatten().tolist()) - {ignored}):
        counted = truth != ignored
        hit = ((prediction == c) & (truth == c) & counted).sum()
        shares.append(float(hit / (((prediction == c) | (truth == c)) & counted).sum()))
    return sum(shares) / len(shares)


def test_an_image_passes_if_its_mean_iou_reaches_the_threshold() -> None:
    # 2/3 of class 0 and 1/2 of class 1
    assert mean_iou((LOGITS[0, 0] > 0).long(), TRUTH[0]) == pytest.approx(7 / 12)
    assert Segmentation(iou=0.58).passed(LOGITS, TRUTH).tolist() == [True]
    assert Segmentation(iou=0.59).passed(LOGITS, TRUTH).tolist() == [False]


def test_the_margin_is_the_lead_of_the_pixel_that_decides() -> None:
    # Leads are 1, 2, 3 and -0.5. The two most certain pixels alone give (1/3 + 1/3) / 2, three 7/12, all of them 1.
    assert Segmentation(iou=0.3).margin(LOGITS, TRUTH).tolist() == [2.0]
    assert Segmentation(iou=0.5).margin(LOGITS, TRUTH).tolist() == [1.0]
    assert Segmentation(iou=0.6).margin(LOGITS, TRUTH).tolist() == [-0.5]


def test_the_margin_leads_to_that_pixel_in_a_small_image_and_to_its_neighbours_in_rank_in_a_large_one() -> None:
    logits = LOGITS.clone().requires_grad_()
    Segmentation(iou=0.6).margin(logits, TRUTH).sum().backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [0.0, 0.0, 0.0, -1.0]
    # 300 pixels of class 0 with leads 300, 299, ..., 1: half of them are needed, the 150th has a lead of 151.
    line = -torch.arange(300.0, 0, -1).view(1, 1, 300)
    line.requires_grad_()
    margin = Segmentation(iou=0.5).margin(line, torch.zeros(1, 300, dtype=torch.int64))
    assert margin.tolist() == [151.0]
    margin.sum().backward()
    assert line.grad is not None
    # A window of 2 %, 3 on either side, each with a seventh.
    assert line.grad.flatten().nonzero().flatten().tolist() == list(range(146, 153))
    torch.testing.assert_close(line.grad[0, 0, 149], torch.tensor(-1 / 7))


def test_one_logit_a_pixel_is_that_of_class_1_over_a_0() -> None:
    two = torch.cat([torch.zeros_like(LOGITS), LOGITS], 1)
    task = Segmentation()
    for truth in (TRUTH, TRUTH[:, None], TRUTH.bool()):
        task.check(LOGITS, truth)
        assert torch.equal(task.margin(LOGITS, truth), task.margin(two, TRUTH))
        assert torch.equal(task.loss(LOGITS, truth), task.loss(two, TRUTH))
    assert torch.equal(task.divergence(LOGITS, -LOGITS), task.divergence(two, torch.cat([LOGITS * 0, -LOGITS], 1)))


def test_the_loss_is_the_mean_cross_entropy_of_the_pixels_that_count() -> None:
    # (ln(1 + e^-1) + ln(1 + e^-2) + ln(1 + e^-3)) / 3, the last pixel ignored
    truth = torch.tensor([[[0, 1], [0, 255]]])
    loss = Segmentation(ignore_index=255).loss(LOGITS, truth)
    torch.testing.assert_close(loss, torch.tensor([0.162926]))


def test_ignored_pixels_do_not_count() -> None:
    truth, task = torch.tensor([[[0, 1], [0, 255]]]), Segmentation(iou=1.0, ignore_index=255)
    task.check(LOGITS, truth)
    assert task.passed(LOGITS, truth).tolist() == [True]
    assert task.margin(LOGITS, truth).tolist() == [1.0]


def test_the_foreground_alone_may_count_and_where_there_is_none_the_rest() -> None:
    logits, truth = LOGITS.expand(2, -1, -1, -1), torch.cat([TRUTH, torch.zeros_like(TRUTH)])
    # Class 1 has an IoU of 1/2; the second image has only class 0, of which two pixels of four are right.
    assert Segmentation(iou=0.5, classes=(1,)).passed(logits, truth).tolist() == [True, True]
    assert Segmentation(iou=0.51, classes=[1]).passed(logits, truth).tolist() == [False, False]
    assert Segmentation(iou=0.51).passed(logits, truth).tolist() == [True, False]


def test_pixels_that_are_no_numbers_are_wrong() -> None:
    logits = torch.full((1, 1, 2, 2), torch.nan)
    assert Segmentation().passed(logits, TRUTH).tolist() == [False]
    assert Segmentation().margin(logits, TRUTH).tolist() == [-torch.inf]


def test_volumes_are_images_of_three_dimensions() -> None:
    logits, truth = torch.randn(2, 3, 2, 4, 5), torch.randint(0, 3, (2, 2, 4, 5))
    Segmentation().check(logits, truth)
    assert torch.equal(Segmentation().margin(logits, truth), Segmentation().margin(logits.flatten(3), truth.flatten(2)))


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (LOGITS[0, 0], TRUTH, r"needs logits \[samples, classes, ...\], the model returned \[2, 2\]"),
        (LOGITS, TRUTH[:, :1], r"logits \[1, 1, 2, 2\] for labels \[1, 1, 2\]"),
        (LOGITS, TRUTH.float(), "found torch.float32"),
        (LOGITS, TRUTH + 1, "there is a label 2"),
        (LOGITS, TRUTH * 0 - 100, "1 samples of a batch have the label -100"),
    ],
)
def test_what_does_not_fit_is_refused(output: Tensor, target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{message}[\\s\\S]*HINT:"):
        Segmentation().check(output, target)


def test_classes_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="the model returned 2 logits a pixel"):
        Segmentation(classes=(2,)).check(LOGITS, TRUTH)


@pytest.mark.parametrize("wrong", [{"iou": 0}, {"iou": 50}, {"classes": ()}, {"classes": 1}, {"classes": ["a"]}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"`Segmentation.{next(iter(wrong))}="):
        Segmentation(**wrong)


def test_it_says_what_right_means() -> None:
    assert str(Segmentation()) == "Segmentation: mean IoU at least 0.5"
    assert str(Segmentation(0.75, (1, 2))) == "Segmentation: mean IoU of classes 1, 2 at least 0.75"


def test_a_reserve_is_a_margin_to_keep() -> None:
    # The leads are 1, 2, 3 and -0.5; three pixels must be right, so the margin is 1.
    logits, truth = torch.tensor([[[[-1.0, 2.0], [-3.0, 0.5]]]]), torch.tensor([[[0, 1], [0, 0]]])
    for reserve, expected in ((1.0, True), (1.25, False), (-torch.inf, True)):
        passed, loss = Segmentation(iou=0.5).passed_and_loss(logits, truth, torch.tensor([reserve]), with_loss=False)
        assert (passed.tolist(), loss) == ([expected], None)
