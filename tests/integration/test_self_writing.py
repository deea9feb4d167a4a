"""A model that writes to its own weights is given back, to the bit, by all that does not repair it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from digit_models import QUICK, Digits, nobody, quick_repair, quiet_trainer
from lightning_package import Callback, Trainer
from self_writing import SELF_WRITING, NothingAtAll, classifier, fingerprint

from lightning_nrl import Target, diagnose, repair

KINDS = list(SELF_WRITING)


class Watch(Callback):
    """Takes fingerprints before or after the hooks of another callback."""

    def __init__(self) -> None:
        self.prints: dict[str, list[object]] = {"start": [], "end": []}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.prints["start"].append(fingerprint(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.prints["end"].append(fingerprint(pl_module))

    @property
    def state_key(self) -> str:
        return f"Watch {id(self)}"


ENDS: dict[str, dict[str, Any]] = {
    "nothing to repair": {"target": Target.where(nobody, name="nobody")},
    "refused": {"gate": NothingAtAll()},
}


@pytest.mark.parametrize("status", list(ENDS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_leaves_the_weights_as_training_left_them(tmp_path: Path, kind: str, status: str) -> None:
    model, before, after = classifier(kind), Watch(), Watch()
    callback = quick_repair(**ENDS[status])
    quiet_trainer(tmp_path, before, callback, after, max_epochs=1).fit(model, datamodule=Digits())
    assert callback.report.status == status
    # At the start there is the sanity check alone.
    assert before.prints == after.prints
    assert len(after.prints["start"]) == len(after.prints["end"]) == 1
    assert fingerprint(model)[:2] == after.prints["end"][0][:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_repairs_nothing_leaves_the_model_as_it_was(tmp_path: Path, kind: str) -> None:
    model = classifier(kind)
    before = fingerprint(model)
    for status, arguments in ENDS.items():
        report = repair(quiet_trainer(tmp_path), model, datamodule=Digits(), **QUICK, **arguments)
        assert report.status == status
        assert fingerprint(model) == before
    diagnose(quiet_trainer(tmp_path), model, datamodule=Digits())
    assert fingerprint(model) == before
