"""A model that writes to its own weights is restored to the bit by all that does not repair it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Few, nobody, quick_repair, quiet_trainer, right
from lightning_package import Callback, Trainer
from self_writing import SELF_WRITING, NothingAtAll, classifier, fingerprint
from torch import Tensor

from lightning_nrl import RepairReport, Target, diagnose, repair
from lightning_nrl.methods import Polish
from lightning_nrl.pipeline import Patch

KINDS = list(SELF_WRITING)


class Watch(Callback):
    """Takes fingerprints before or after the hooks of another callback."""

    def __init__(self) -> None:
        self.prints = {"start": [], "end": []}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.prints["start"].append(fingerprint(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.prints["end"].append(fingerprint(pl_module))

    @property
    def state_key(self) -> str:
        return f"Watch {id(self)}"


ENDS = {
    "nothing to repair": {"target": Target.where(nobody, name="nobody")},
    "refused": {"gate": NothingAtAll()},
}


@pytest.mark.parametrize("status", list(ENDS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_leaves_the_weights_as_training_left_them(tmp_path, kind, status):
    model, before, after = classifier(kind), Watch(), Watch()
    callback = quick_repair(**ENDS[status])
    quiet_trainer(tmp_path, before, callback, after, max_epochs=1).fit(model, datamodule=Few())
    assert callback.report.status == status
    # At the start there is the sanity check alone.
    assert before.prints == after.prints
    assert len(after.prints["start"]) == len(after.prints["end"]) == 1
    assert fingerprint(model)[:2] == after.prints["end"][0][:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_repairs_nothing_leaves_the_model_as_it_was(tmp_path, kind):
    model = classifier(kind)
    before = fingerprint(model)
    for status, arguments in ENDS.items():
        report = repair(quiet_trainer(tmp_path), model, datamodule=Few(), **QUICK, **arguments)
        assert report.status == status
        assert fingerprint(model) == before
    diagnose(quiet_trainer(tmp_path), model, datamodule=Few())
    assert fingerprint(model) == before


def merged_in_training(model: Classifier) -> Classifier:
    """Merges adapters and sets training mode without `train()`, as Lightning's trainer does after
    each validation.
    """
    model.eval()
    for module in model.modules():
        module.training = True
    return model


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network with an adapter, beside the weight."""
    folder, model = tmp_path_factory.mktemp("fitted"), classifier("merge")
    trainer = quiet_trainer(folder, max_epochs=2, enable_checkpointing=False)
    trainer.fit(model, datamodule=Few())
    model.train()
    trainer.save_checkpoint(folder / "fitted.ckpt")
    return folder / "fitted.ckpt"


def loaded(path: Any) -> Classifier:
    model = classifier("merge")
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return model


def polished(model: Classifier, folder: Path, **arguments: Any) -> RepairReport:
    """A repair that moves the weight with the adapter."""
    arguments |= {"datamodule": Few(), "method": Polish(), "target": "label 3", "verbose": False}
    report = repair(quiet_trainer(folder), model, **arguments)
    assert report.status == "repaired"
    assert "network.1.weight" in Patch.load(report.files["patch"]).names
    return report


def check_flips(report: RepairReport, before: Tensor, after: Tensor) -> None:
    """The samples that are right before and after are those that the report counts."""
    (counts,) = [split.counts for split in report.splits if split.split == "repair"]
    flips = int((before & ~after).sum()), int((after & ~before).sum())
    assert flips == (counts.broken, counts.repaired) == (0, counts.repaired)


@pytest.mark.parametrize("start", [Classifier.eval, merged_in_training])
def test_what_a_merged_adapter_computes_after_a_repair_is_what_was_counted(tmp_path, fitted, start):
    model = start(loaded(fitted))
    before = right(model, Few().repair)
    patched = copy.deepcopy(start(model))
    report = polished(model, tmp_path)
    Patch.load(report.files["patch"]).apply(patched)
    for deployed in (model, loaded(report.files["checkpoint"]), patched):
        check_flips(report, before, right(deployed, Few().repair))


@pytest.mark.parametrize("start", [Classifier.train, Classifier.eval, merged_in_training])
def test_a_checkpoint_that_is_loaded_into_a_merged_module_is_counted(tmp_path, fitted, start):
    report = polished(start(loaded(fitted)), tmp_path, ckpt_path=fitted)
    paths = fitted, report.files["checkpoint"]
    check_flips(report, *(right(loaded(path), Few().repair) for path in paths))
