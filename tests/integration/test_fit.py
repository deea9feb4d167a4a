"""A repair after a real `fit` on real data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digit_models import Classifier, Digits, quick_repair, quiet_trainer, right

LAYERS = {"mlp": "network.1", "cnn": "network.3", "resnet": "network.2.second"}


@pytest.mark.parametrize("network", LAYERS)
@pytest.mark.parametrize("layer", ["head", "deep"])
def test_a_repaired_model_breaks_nothing_that_is_known(tmp_path: Path, network: str, layer: str) -> None:
    data, model = Digits(), Classifier(network)
    before: dict[str, torch.Tensor] = {}

    repair = quick_repair(layer="auto" if layer == "head" else LAYERS[network], unseen="test")
    original = repair.attempt

    def attempt(trainer, module, **named):  # type: ignore[no-untyped-def]
        before.update(train=right(module, data.train), repair=right(module, data.repair), test=right(module, data.test))
        return original(trainer, module, **named)

    repair.attempt = attempt  # type: ignore[method-assign]
    trainer = quiet_trainer(tmp_path, repair)
    trainer.fit(model, datamodule=data)

    report = repair.report
    assert report is not None
    after = {"train": right(model, data.train), "repair": right(model, data.repair), "test": right(model, data.test)}
    for split in report.splits:
        old, new = before[split.split], after[split.split]
        assert split.broken == int((old & ~new).sum())
        assert split.repaired == int((~old & new).sum())
        assert split.kept == int((old & new).sum())
        assert split.failing == int((~old & ~new).sum())
        if split.role == "known":
            assert split.broken == 0
    if report.status == "repaired":
        assert torch.equal(_repaired_in(report, "repair"), (~before["repair"] & after["repair"]).nonzero().flatten())
        (result,) = trainer.test(model, ckpt_path=repair.repaired_model_path, datamodule=data, verbose=False)
        assert result["test_right"] == int(after["test"].sum())
        loaded = Classifier.load_from_checkpoint(repair.repaired_model_path)
        assert torch.equal(right(loaded, data.repair), after["repair"])


def _repaired_in(report, split: str) -> torch.Tensor:  # type: ignore[no-untyped-def]
    (found,) = (s for s in report.splits if s.split == split)
    return torch.tensor(found.repaired_ids, dtype=torch.int64)
