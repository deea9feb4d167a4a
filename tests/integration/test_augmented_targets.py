"""Batches in which the targets alone are changed, and a repair whose training goes on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, quick_repair, quiet_trainer
from torch.utils.data import TensorDataset, default_collate

from lightning_nrl import DataOptions, Target
from lightning_nrl._trainer.continue_training import AugmentingCollate, MarkedSamples
from lightning_nrl.errors import ConfigurationError

DATA = TensorDataset(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 2]))


def taken(augment: Any, *marked: bool) -> Any:
    samples = MarkedSamples(DATA, torch.tensor(marked))
    return AugmentingCollate(default_collate, augment)([samples[i] for i in range(len(samples))])


def tripled(batch: Any) -> Any:
    x, y = batch
    return [torch.cat([x, 10 * x, 100 * x]), y.repeat(3)]


def test_targets_are_changed_and_come_behind_the_others() -> None:
    x, y = taken(tripled, False, True, False)
    assert (x[:, 0].tolist(), y.tolist()) == ([1, 3, 2, 20, 200], [0, 2, 1, 1, 1])
    x, y = taken(tripled, True, True, True)
    assert x[:, 0].tolist() == [1, 2, 3, 10, 20, 30, 100, 200, 300]
    x, y = taken(lambda batch: pytest.fail("there are no targets"), False, False, False)
    assert x[:, 0].tolist() == [1, 2, 3]


def test_names_beside_tensors_are_joined_too() -> None:
    samples = [({"x": torch.tensor([1.0]), "name": "a"}, False), ({"x": torch.tensor([2.0]), "name": "b"}, True)]
    found = AugmentingCollate(default_collate, lambda batch: {**batch, "x": -batch["x"]})(samples)
    assert (found["x"][:, 0].tolist(), found["name"]) == ([1, -2], ["a", "b"])


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda batch: batch[0], "`augment`: the batch that it gives has 1 parts, the others have 2"),
        (lambda batch: [batch[0].repeat(1, 2), batch[1]], "`augment`: Sizes of tensors must match"),
        (lambda batch: 1 / 0, "`augment` raised ZeroDivisionError"),
    ],
)
def test_what_does_not_fit_says_so(augment: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        taken(augment, False, True, False)


def test_the_training_of_a_repair_goes_on_with_changed_targets(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def darker(batch: Any) -> Any:
        images, digits, *rest = batch
        seen.append(digits)
        return [images / 2, digits, *rest]

    repair = quick_repair(method="finetune-polish", target=Target.label(3), data=DataOptions(augment=darker))
    torch.manual_seed(0)
    quiet_trainer(tmp_path, repair, max_epochs=2).fit(Classifier(), datamodule=Digits())
    assert repair.report is not None
    assert repair.report.steps[0].note == "continued training"
    targets = repair.report.pooled("known").counts.targeted
    assert torch.cat(seen).unique().tolist() == [3]
    assert targets < len(torch.cat(seen)) <= 2 * targets  # each once in both epochs, but for what a last batch drops
