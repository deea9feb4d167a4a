"""Training that is held to what the replaced model gets right."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Flat,
    Manual,
    cnn,
    flattened,
    quiet_trainer,
    right,
    same,
)
from lightning_package import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, OldModel, PositiveCongruentTraining
from lightning_nrl.callbacks import regression_loss
from lightning_nrl.updates import FocalDistillation, MarginHinge, Oversampler, Predictions


def third(batch: Any) -> Any:
    return batch[2]


class Numbered(Digits):
    """Batches of `(image, digit, position in the data set)`, not shuffled, so that fits can be
    compared.
    """

    def train_dataloader(self) -> DataLoader:
        images, labels, _ = self.train.tensors
        return DataLoader(TensorDataset(images, labels, torch.arange(len(labels))), self.batch_size)


def fit(folder: Path, model: LightningModule, *callbacks: Callback, **arguments: Any) -> Any:
    data = arguments.pop("data", None) or Numbered()
    trainer = quiet_trainer(
        folder, *callbacks, **{"enable_checkpointing": False, "max_epochs": 2, **arguments}
    )
    trainer.fit(model, datamodule=data)
    return trainer


class ByHand(Classifier):
    """What the term does, written into the step."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = [copy.deepcopy(teacher).eval()]  # no part of the module

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        with torch.no_grad():
            teacher = self.teacher[0](batch[0])
        was = teacher.argmax(1) == batch[1]
        apart = F.kl_div(
            logits.float().log_softmax(1), teacher.float().softmax(1), reduction="none"
        ).sum(1)
        return F.cross_entropy(logits, batch[1]) + (was.float() * apart).mean()


class OneLine(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return loss + regression_loss(self, batch, logits)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert regression_loss(self, batch, self(batch[0])) == 0


class OneLineByHand(Manual, OneLine):
    """Has the term in a step by hand."""


class PlainAndFlipped(Classifier):
    """Of its two calls the one on the batch counts."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1]) + 0 * self(batch[0].flip(3)).sum()


FORMS = {
    "plain": Classifier,
    "remembered": Classifier,
    "one line": OneLine,
    "plain and flipped": PlainAndFlipped,
    "compiled": lambda: torch.compile(Classifier(), backend="eager"),
}


@pytest.fixture(scope="module")
def by_hand(trained_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """Trained with the term in its step."""
    model = ByHand(Classifier.load_from_checkpoint(trained_path))
    fit(tmp_path_factory.mktemp("by hand"), model, accumulate_grad_batches=3)
    return model


@pytest.mark.filterwarnings("ignore:Attribute 'teacher' is an instance")
@pytest.mark.parametrize("form", FORMS)
def test_the_term_is_added_as_if_written_by_hand(form, by_hand, trained_path, tmp_path):
    model = FORMS[form]()
    index = third if form == "remembered" else None
    congruent = PositiveCongruentTraining(trained_path, index=index)
    trainer = fit(tmp_path, model, congruent, accumulate_grad_batches=3)
    torch.testing.assert_close(
        list(model.parameters()), list(by_hand.parameters()), rtol=1e-3, atol=1e-4
    )
    assert float(trainer.callback_metrics["regression/focal_distillation"]) > 0


def test_the_term_of_a_manual_optimisation(trained_path, tmp_path):
    by_hand = ByHand(Classifier.load_from_checkpoint(trained_path))
    fit(tmp_path, by_hand)
    fit(tmp_path, model := OneLineByHand(), PositiveCongruentTraining(trained_path))
    torch.testing.assert_close(
        list(model.parameters()), list(by_hand.parameters()), rtol=1e-3, atol=1e-4
    )


def test_nothing_but_the_loss_is_touched(old, tmp_path):
    terms = [FocalDistillation(weight=1e-30), MarginHinge(weight=1e-30)]
    models, teacher = [], copy.deepcopy(old)
    old.train()
    for callbacks in ([PositiveCongruentTraining(old, terms)], []):
        torch.manual_seed(3)
        model = Classifier("cnn")  # batch norm and dropout
        fit(tmp_path, model, *callbacks)
        models.append(model)
        assert "training_step" not in vars(model)
        assert not any(part._forward_hooks for part in model.modules())
    assert same(*models)
    assert same(old, teacher)
    assert all(part.training for part in old.modules())


class Failing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise KeyError("in the middle")
        return super().training_step(batch, batch_idx)


def test_a_training_that_fails_leaves_the_module_as_it_was(old, tmp_path):
    model = Failing()
    old.train()
    with pytest.raises(KeyError, match="in the middle"):
        fit(tmp_path, model, PositiveCongruentTraining(old))
    assert "training_step" not in vars(model)
    assert not model._forward_hooks
    assert old.training


class Augmented(Classifier):
    """Flips its images in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0].flip(3)), batch[1])


class Listening(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.heard = inside, []

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.heard.append(x)
        return self.inside(x)


def test_the_old_model_gets_the_inputs_that_the_new_one_got(old, tmp_path):
    teacher = Listening(cnn())
    fit(
        tmp_path,
        Augmented(),
        PositiveCongruentTraining(teacher),
        max_epochs=1,
        limit_train_batches=2,
    )
    images = Numbered().train.tensors[0]
    first, *steps = teacher.heard
    assert torch.equal(first, images[:32])  # before the first step, to see whether all fits
    assert [torch.equal(x, images[32 * i : 32 * i + 32].flip(3)) for i, x in enumerate(steps)] == [
        True,
        True,
    ]


def test_predictions_and_margins(old, trained_path, tmp_path):
    data = Numbered()
    was = right(old, data.train)
    rows = {
        at: (int(data.train.tensors[1][at]) if ok else 10, None)
        for at, ok in enumerate(was.tolist())
    }
    known = Predictions({"train": rows})
    models = [Classifier(), Classifier()]
    references = [(known, MarginHinge(most=0.5)), (old, MarginHinge(share=1e9, most=0.5))]
    for model, (reference, term) in zip(models, references, strict=True):
        fit(tmp_path, model, PositiveCongruentTraining(reference, term, index=third), data=data)
    assert same(*models)
    with pytest.raises(ConfigurationError, match="are found by data-set position"):
        PositiveCongruentTraining(known, MarginHinge(most=0.5))
    with pytest.raises(ConfigurationError, match="distillation needs the old model"):
        fit(tmp_path, Classifier(), PositiveCongruentTraining(known, index=third), data=data)


class OneMore(Flat):
    """Has one class more."""

    def forward(self, pixels: Tensor) -> Tensor:
        return F.pad(super().forward(pixels), (0, 1), value=-50.0)


def test_another_architecture_with_other_inputs_and_classes(old, tmp_path):
    reference = OldModel(OneMore(old), adapter=flattened, classes={9 - i: i for i in range(10)})
    models = [Classifier(), Classifier()]
    terms = ["focal_distillation", "margin_hinge"]
    for model, teacher in zip(models, (reference, old), strict=True):
        fit(tmp_path, model, PositiveCongruentTraining(teacher, terms))
    first, second = (list(model.parameters()) for model in models)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    with pytest.raises(
        ConfigurationError,
        match=r"returned \[32, 11\], but the new one \[32, 10\]\.\nHINT: map the old",
    ):
        fit(
            tmp_path,
            Classifier(),
            PositiveCongruentTraining(OldModel(OneMore(old), adapter=flattened)),
        )


class Twice(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0].flip(2)) + self(batch[0].flip(3)), batch[1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Twice,
            r"calls the model 2 times, .*\n"
            r"HINT: add `loss = loss \+ regression_loss\(self, batch, logits\)`",
        ),
        (Manual, r"uses manual optimisation, .*\nHINT: add `loss = loss \+"),
    ],
)
def test_a_step_that_it_cannot_be_added_to_is_refused(kind, message, old, tmp_path):
    model = kind()
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, model, PositiveCongruentTraining(old))
    assert "training_step" not in vars(model)


def test_what_does_not_fit_is_refused_before_the_first_step(old, tmp_path):
    untouched, model = Classifier(), Classifier()
    with pytest.raises(ConfigurationError, match="`reference` is the model in training"):
        fit(tmp_path, old, PositiveCongruentTraining(old))
    with pytest.raises(ConfigurationError, match="there are several PositiveCongruentTraining"):
        fit(tmp_path, model, PositiveCongruentTraining(old), PositiveCongruentTraining(old))
    with pytest.raises(ConfigurationError, match="`index` raised IndexError"):
        fit(tmp_path, model, PositiveCongruentTraining(old, index=lambda batch: batch[7]))
    assert same(untouched, model)
    assert "training_step" not in vars(model)


class Drawn(Callback):
    """Notes which samples this process was trained on."""

    def __init__(self) -> None:
        self.rows = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows += batch[2].tolist()


class Hard(Numbered):
    """The first fifty samples, ten of them twice."""

    def train_dataloader(self) -> DataLoader:
        images, labels, _ = (x[:50] for x in self.train.tensors)
        data = TensorDataset(images, labels, torch.arange(50))
        return DataLoader(
            data, self.batch_size, sampler=Oversampler(torch.arange(50) >= 10, oversample=2)
        )


def distributed_fit(folder: Path, strategy: str, devices: int) -> dict[str, Any]:
    """What a fit leaves: the weights, and which samples were seen."""
    model, drawn = Classifier(), Drawn()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
    congruent = PositiveCongruentTraining(
        folder / "trained.ckpt", ["focal_distillation", "margin_hinge"]
    )
    data = Hard(batch_size=60 // devices)  # a step has all samples, on however many processes
    means = {"strategy": strategy, "devices": devices, "limit_val_batches": 0}
    fit(folder, model, congruent, drawn, data=data, **means)
    assert "training_step" not in vars(model)
    return {"rows": drawn.rows, "state": dict(model.state_dict())}


def test_two_processes_train_as_one(trained_path):
    alone = distributed_fit(trained_path.parent, "auto", 1)
    first, second = in_two_processes(distributed_fit, trained_path.parent, "ddp", 2)
    assert Counter(first["rows"] + second["rows"]) == Counter(alone["rows"])
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    torch.testing.assert_close(first["state"], alone["state"], rtol=1e-3, atol=1e-3)
