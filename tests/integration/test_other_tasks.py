"""Repairs of models that do not give one class a sample, each task with each method, through a
Trainer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import assert_counted, quiet_trainer
from lightning_package import seed_everything
from options import with_options
from task_models import CASES, Case, Data, Net, Tokens, dim, rows_of_digits
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl import (
    ConfigurationError,
    OldModel,
    ParticleSwarm,
    PositiveCongruentTraining,
    RegressionFreeRepair,
    RegressionMetrics,
    Target,
    diagnose,
    repair,
)
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto
from lightning_nrl.tasks import Sequence
from lightning_nrl.updates import FocalDistillation

SWARM = ParticleSwarm(particles=12, iterations=8)


@pytest.fixture
def learned(trained_task: Callable[[str], Path]) -> Callable[[str], tuple[Case, Data, Net]]:
    """A case by its name, its data, and its trained model."""

    def load(name: str) -> tuple[Case, Data, Net]:
        data, model = CASES[name].make()
        model.load_state_dict(torch.load(trained_task(name), weights_only=True)["state_dict"])
        return CASES[name], data, model

    return load


def arguments(case: Case, **more: Any) -> dict[str, Any]:
    quick = {
        "task": case.task,
        "unseen": "test",
        "verbose": False,
        "localizer": NeuRecoverLite(n_weights=24),
    }
    return with_options({**quick, **more})


def by_split(case: Case, model: Net, data: Data) -> dict[str, Tensor]:
    return {name: case.counted(model, getattr(data, name)) for name in ("train", "repair", "test")}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("multilabel", Auto(SWARM)),
        ("regression", "finetune-polish"),
        ("ordinal", "auto"),
        ("segmentation", "finetune-polish"),
        ("sequence", "finetune-polish"),
        ("custom", SWARM),
    ],
)
def test_each_task_is_repaired(tmp_path, learned, name, method):
    case, data, model = learned(name)
    old = by_split(case, model, data)
    settings = arguments(case, method=method)
    report = repair(quiet_trainer(tmp_path), model, datamodule=data, **settings)
    assert report.status == "repaired", report.reason
    assert not any("it raised" in rung.note for rung in report.rungs)
    assert_counted(report, old, by_split(case, model, data))
    assert f"right means: {case.task}" in re.sub(r"[*`|]", "", report.to_markdown())


REFUSED = [
    ("sequence", {"method": "convex"}, r"'convex'` needs a logit for each class[\s\S]*HINT: "),
    ("ordinal", {"method": "convex"}, r"'convex'` needs a logit for each class[\s\S]*HINT: "),
    ("custom", {"method": "finetune-polish"}, r"Custom has no `margin`[\s\S]*HINT: [\s\S]*swarm"),
    (
        "multilabel",
        {"set_aside": "doubtful"},
        r"`set_aside='doubtful'` needs a logit for each class[\s\S]*HINT: ",
    ),
    (
        "regression",
        {"target": Target.label(3)},
        "'label 3' asks for classes, and the task has none",
    ),
    ("regression", {"task": "multilabel"}, "multilabel needs logits"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_what_a_task_lacks_is_refused_before_training(tmp_path, name, given, message):
    data, model = CASES[name].make()
    trainer = quiet_trainer(tmp_path, RegressionFreeRepair(**arguments(CASES[name], **given)))
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(model, datamodule=data)
    assert trainer.global_step == 0


@pytest.mark.parametrize("name", ["segmentation", "regression"])
def test_a_diagnosis_says_what_can_be_said_without_classes(tmp_path, learned, name):
    case, data, model = learned(name)
    diagnosis = diagnose(quiet_trainer(tmp_path), model, datamodule=data, task=case.task)
    assert diagnosis.known["targeted"] > 0
    # Costs of a swarm are told for a last Linear, which the network for segmentation lacks.
    assert ("swarm" in diagnosis.costs) == (name == "regression")
    assert "convex" not in diagnosis.costs
    assert str(case.task) in diagnosis.to_markdown()


def test_an_update_repairs_what_the_replaced_model_got_right(tmp_path, learned):
    case, data, old = learned("multilabel")
    seed_everything(1, verbose=False)
    _, new = case.make()
    reference = OldModel(old, cache=tmp_path / "old.csv")
    settings = arguments(case, reference=reference, method="finetune-polish")
    callback = RegressionFreeRepair(**settings)
    quiet_trainer(tmp_path, callback, max_epochs=12).fit(new, datamodule=data)
    was, now = by_split(case, old, data), by_split(case, new, data)
    for split in callback.report.update:
        assert split.final.broken == int((was[split.split] & ~now[split.split]).sum())
    assert (tmp_path / "old.csv").read_text().startswith("# weights ")


def test_validations_count_regressions_of_any_task(tmp_path, learned):
    case, data, old = learned("multilabel")
    _, new = case.make()
    data.val_dataloader = data.repair_dataloader
    trainer = quiet_trainer(tmp_path, RegressionMetrics(old, task="multilabel"), max_epochs=2)
    trainer.fit(new, datamodule=data)
    was, now = case.counted(old, data.repair), case.counted(new, data.repair)
    assert trainer.callback_metrics["regression/broken"] == int((was & ~now).sum())
    assert trainer.callback_metrics["regression/repaired"] == int((~was & now).sum())


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pads to the longest sample of a batch, so that a sample comes in several shapes."""
    strips, labels = (torch.stack(column) for column in zip(*samples, strict=True))
    longest = int((labels != -100).sum(1).max())
    return strips[:, :, : 8 * longest], labels[:, :longest]


def padded_rows() -> Data:
    """Rows of one to three digits; most have two."""
    strips, labels = rows_of_digits(3)
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(len(labels), generator=generator)
    length = 2 + (chance > 0.975).long() - (chance < 0.025).long()
    labels = labels.masked_fill(torch.arange(3) >= length[:, None], -100)
    return Data(strips, labels, dim, collate)


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target)


def test_sequences_of_several_lengths_are_repaired(tmp_path):
    seed_everything(0, verbose=False)
    data, model = padded_rows(), Net(Tokens(), token_loss)
    batches = (*data.train_dataloader(), *data.repair_dataloader())
    assert len({x.shape[2] for x, _ in batches}) > 1
    case = Case(
        Sequence(), padded_rows, lambda o, y: ((o.argmax(2) == y) | (y < 0)).all(1).tolist()
    )
    callback = RegressionFreeRepair(**arguments(case, method="finetune-polish"))
    quiet_trainer(tmp_path, callback, max_epochs=12).fit(model, datamodule=data)
    report = callback.report
    assert report.status == "repaired", report.reason
    assert not any(split.broken for split in report.splits if split.role == "known")
    for split in report.splits:
        passed = case.counted(model, getattr(data, split.split))
        assert split.kept + split.repaired == int(passed.sum())


def test_padding_is_not_distilled(tmp_path):
    seed_everything(0, verbose=False)
    data = padded_rows()
    old, new = (Net(Tokens(), token_loss, lr=0.0) for _ in range(2))
    term = FocalDistillation(base=1.0, focus=0.0)
    congruent = PositiveCongruentTraining(old, term, task=Sequence())
    trainer = quiet_trainer(tmp_path, congruent, max_epochs=1)
    trainer.fit(new, datamodule=data)
    x, y = data.train.tensors
    with torch.no_grad():
        new_logs, old_logs = (model.network(x).log_softmax(2) for model in (new, old))
    divergence, counts = (old_logs.exp() * (old_logs - new_logs)).sum(2), y != -100
    expected = float(((divergence * counts).sum(1) / counts.sum(1)).mean())
    logged = trainer.callback_metrics["regression/focal_distillation"]
    assert logged == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(float(divergence.mean()), rel=1e-3)


@pytest.mark.parametrize("name", ["regression", "segmentation", "sequence"])
def test_a_training_may_be_held_to_the_replaced_model(tmp_path, learned, name):
    case, data, old = learned(name)
    _, new = case.make()
    terms = ["focal_distillation", "margin_hinge"]
    trainer = quiet_trainer(
        tmp_path, PositiveCongruentTraining(old, term=terms, task=case.task), max_epochs=1
    )
    trainer.fit(new, datamodule=data)
    assert all(trainer.callback_metrics[f"regression/{term}"].isfinite() for term in terms)
