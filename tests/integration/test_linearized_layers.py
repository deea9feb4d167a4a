"""A deep layer repaired by linearized margins after a real fit on real data."""

from __future__ import annotations

from pathlib import Path

import pytest
from digit_models import Classifier, Digits, quiet_trainer, right

from lightning_nrl import RegressionFreeRepair

LAYERS = {"mlp": "network.1", "cnn": "network.3", "resnet": "network.2.second"}


@pytest.mark.parametrize("network", LAYERS)
def test_a_deep_layer_of_a_trained_network_is_repaired_without_a_regression(tmp_path: Path, network: str) -> None:
    data, model = Digits(), Classifier(network)
    repair = RegressionFreeRepair(method="linearized", layer=LAYERS[network], verbose=False, dirpath=tmp_path)
    original, before = repair.attempt, {}

    def attempt(trainer, module, **named):  # type: ignore[no-untyped-def]
        before.update(train=right(module, data.train), repair=right(module, data.repair))
        return original(trainer, module, **named)

    repair.attempt = attempt  # type: ignore[method-assign]
    quiet_trainer(tmp_path, repair).fit(model, datamodule=data)

    report = repair.report
    assert report is not None
    assert report.status == "repaired"
    after = {"train": right(model, data.train), "repair": right(model, data.repair)}
    assert not any(int((before[split] & ~after[split]).sum()) for split in before)
    repaired = int((~before["repair"] & after["repair"]).sum())
    assert repaired == report.pooled("known").repaired_in_target
    assert repaired >= 0.5 * report.pooled("known").targeted
