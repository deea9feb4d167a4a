from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nrl import ConfigurationError
from lightning_nrl.tasks import Sequence

# Two sequences of three tokens, the last of the second is padding.
LOGITS = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 0.5]], [[0.0, 0.25], [2.0, 1.0], [9.0, 0.0]]])
LABELS = torch.tensor([[0, 1, 0], [1, 1, -100]])


def test_a_sequence_passes_if_all_of_its_tokens_are_right() -> None:
    task = Sequence()
    assert task.margin(LOGITS, LABELS).tolist() == [0.5, -1.0]
    assert task.passed(LOGITS, LABELS).tolist() == [True, False]
    assert task.prediction(LOGITS) is None
    assert task.label(LABELS) is None


def test_a_share_of_the_tokens_may_do() -> None:
    assert Sequence(share=0.5).margin(LOGITS, LABELS).tolist() == [2.0, 0.25]
    assert Sequence(share=0.5).passed(LOGITS, LABELS).tolist() == [True, True]


def test_seven_tenths_of_ten_tokens_are_seven() -> None:
    lead = torch.tensor([1.0] * 7 + [-1.0] * 3)
    logits, labels = torch.stack([lead, torch.zeros(10)], 1)[None], torch.zeros(1, 10, dtype=torch.int64)
    assert Sequence(share=0.7).passed(logits, labels).tolist() == [True]
    assert Sequence(share=0.71).passed(logits, labels).tolist() == [False]


def test_classes_may_come_before_tokens() -> None:
    task = Sequence(class_dim=1)
    turned = LOGITS.transpose(1, 2)
    task.check(turned, LABELS)
    assert torch.equal(task.margin(turned, LABELS), Sequence().margin(LOGITS, LABELS))
    assert torch.equal(task.loss(turned, LABELS), Sequence().loss(LOGITS, LABELS))
    assert torch.equal(task.divergence(turned, -turned, LABELS), Sequence().divergence(LOGITS, -LOGITS, LABELS))


def test_the_loss_is_the_mean_cross_entropy_of_the_tokens_that_count() -> None:
    # (ln(1 + e^-3) + ln(1 + e^-2) + ln(1 + e^-0.5)) / 3 and (ln(1 + e^-0.25) + ln(1 + e)) / 2
    torch.testing.assert_close(Sequence().loss(LOGITS, LABELS), torch.tensor([0.216531, 0.944600]))


def test_the_divergence_leaves_padding_out() -> None:
    student, teacher = LOGITS.clone(), LOGITS.clone()
    student[1, 2] = torch.tensor([0.0, 7.0])
    assert Sequence().divergence(student, teacher, LABELS).tolist() == [0.0, 0.0]
    assert float(Sequence().divergence(student, teacher)[1]) > 1


def test_the_margin_leads_to_the_token_that_decides() -> None:
    logits = LOGITS.clone().requires_grad_()
    Sequence().margin(logits, LABELS).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, -1.0]]
    assert logits.grad[1].tolist() == [[0.0, 0.0], [-1.0, 1.0], [0.0, 0.0]]


def test_a_tie_and_what_is_no_number_do_not_pass() -> None:
    logits = torch.tensor([[[1.0, 1.0]], [[torch.nan, 0.0]]])
    labels = torch.zeros(2, 1, dtype=torch.int64)
    assert Sequence().passed(logits, labels).tolist() == [False, False]
    assert Sequence().margin(logits, labels).tolist() == [0.0, -torch.inf]


def test_a_reserve_is_a_margin_to_keep() -> None:
    # The margins are 0.5 and -1 if every token counts, 2 and 0.25 if half of them do.
    for share, reserve, expected in (
        (1.0, [0.5, -2.0], [True, False]),
        (1.0, [0.625, -2.0], [False, False]),
        (0.5, [2.0, 0.25], [True, True]),
        (0.5, [2.5, -torch.inf], [False, True]),
        (0.5, [torch.inf, 0.375], [False, False]),
    ):
        passed, loss = Sequence(share).passed_and_loss(LOGITS, LABELS, torch.tensor(reserve))
        assert passed.tolist() == expected
        assert loss is not None
        assert torch.equal(loss, Sequence(share).loss(LOGITS, LABELS))


def test_a_subclass_with_a_margin_of_its_own_is_asked_for_it() -> None:
    class Doubled(Sequence):
        def margin(self, output: Any, target: Any) -> torch.Tensor:
            return 2 * super().margin(output, target)

    passed, loss = Doubled().passed_and_loss(LOGITS, LABELS, torch.tensor([1.0, 1.0]), with_loss=False)
    assert (passed.tolist(), loss) == ([True, False], None)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        (LOGITS[0], LABELS, r"Sequence needs logits \[samples, tokens, classes\], the model returned \[3, 2\]"),
        (LOGITS, LABELS[:, :2], r"logits \[2, 3, 2\] for labels \[2, 2\]"),
        (
            LOGITS.transpose(1, 2),
            LABELS,
            r"\[2, 2, 3\] for labels \[2, 3\].\nHINT: write `Sequence\(class_dim=1\)",
        ),
        (LOGITS, LABELS.float(), r"whole labels \[samples, ...\], found torch.float32"),
        (LOGITS, torch.tensor([0, 1]), r"found torch.int64 \[2\]"),
        (LOGITS, LABELS + 1, "there is a label 2, and the model returned 2 logits"),
        (LOGITS, torch.where(LABELS == -100, -1, LABELS), "there is a label -1"),
        (LOGITS, torch.tensor([[0, 1, 0], [-100, -100, -100]]), "1 samples of a batch have the label -100"),
    ],
)
def test_what_does_not_fit_is_refused(output: torch.Tensor, target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{message}[\\s\\S]*") as error:
        Sequence().check(output, target)
    assert "HINT:" in str(error.value)


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 1.5}, {"share": True}, {"class_dim": 2}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"`Sequence.{next(iter(wrong))}="):
        Sequence(**wrong)


def test_it_says_what_right_means() -> None:
    assert str(Sequence()) == "Sequence: every token right"
    assert str(Sequence(share=0.9)) == "Sequence: at least 0.9 of the tokens right"
