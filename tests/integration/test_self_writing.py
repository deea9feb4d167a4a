"""A model that writes to its own weights is restored to the bit by all that does not repair it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, nobody, quick_repair, quiet_trainer, right
from lightning_package import Callback, Trainer
from self_writing import SELF_WRITING, NothingAtAll, classifier, fingerprint

from lightning_nrl import Target, diagnose, repair
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
    quiet_trainer(tmp_path, before, callback, after, max_epochs=1).fit(model, datamodule=Digits())
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
        report = repair(quiet_trainer(tmp_path), model, datamodule=Digits(), **QUICK, **arguments)
        assert report.status == status
        assert fingerprint(model) == before
    diagnose(quiet_trainer(tmp_path), model, datamodule=Digits())
    assert fingerprint(model) == before


def merged_in_training(model: Classifier) -> Classifier:
    """Merges adapters and sets training mode without `train()`, as Lightning's trainer does after
    each validation.
    """
    model.eval()
    for module in model.modules():
        module.training = True
    return model


@pytest.mark.parametrize("start", [Classifier.eval, merged_in_training])
def test_what_a_merged_adapter_computes_after_a_repair_is_what_was_counted(tmp_path, start):
    model, data = classifier("merge"), Digits()
    quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(model, datamodule=data)
    start(model)
    before = right(model, data.repair)
    start(model)
    patched, loaded = copy.deepcopy(model), classifier("merge")
    report = repair(
        quiet_trainer(tmp_path),
        model,
        datamodule=data,
        method=Polish(),
        verbose=False,
        dirpath=tmp_path,
    )
    (counts,) = [split.counts for split in report.splits if split.split == "repair"]
    assert (report.status, counts.broken) == ("repaired", 0)
    loaded.load_state_dict(torch.load(report.files["checkpoint"], weights_only=True)["state_dict"])
    Patch.load(report.files["patch"]).apply(patched)
    for deployed in (model, loaded, patched):
        after = right(deployed, data.repair)
        assert (int((before & ~after).sum()), int((after & ~before).sum())) == (0, counts.repaired)


@pytest.mark.parametrize("start", [Classifier.train, Classifier.eval, merged_in_training])
def test_a_checkpoint_that_is_loaded_into_a_merged_module_is_counted(tmp_path, start):
    model, data = classifier("merge"), Digits()
    trainer = quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    model.train()
    trainer.save_checkpoint(tmp_path / "fitted.ckpt")
    deployed = []
    start(model)
    report = repair(
        quiet_trainer(tmp_path),
        model,
        datamodule=data,
        ckpt_path=tmp_path / "fitted.ckpt",
        method=Polish(),
        verbose=False,
        dirpath=tmp_path,
    )
    for path in (tmp_path / "fitted.ckpt", report.files["checkpoint"]):
        loaded = classifier("merge")
        loaded.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        deployed.append(right(loaded, data.repair))
    before, after = deployed
    (counts,) = [split.counts for split in report.splits if split.split == "repair"]
    assert (int((before & ~after).sum()), int((after & ~before).sum())) == (0, counts.repaired)
