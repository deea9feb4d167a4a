"""How often a repair runs the body of the network, in passes: samples divided by known samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, quiet_trainer
from lightning_package import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nrl import BoundOptions, ParticleSwarm, RegressionFreeRepair
from lightning_nrl.records.splits import by_role

HEAD = "network.3"
SWARM = ParticleSwarm(particles=20, iterations=20)


class SmallBatches(Digits):
    """Has batches so small that checks on single ones hardly count."""

    sizes = (400, 60, 260, 60)

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.repair, self.batch_size)


class Counted(RegressionFreeRepair):
    """Counts samples through the body during the repair, apart with and without gradients."""

    def repair_now(self, trainer: Trainer, *given: Any, **arguments: Any) -> Any:
        self.visits = Counter[str]()

        def count(body: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            kind = "steps" if torch.is_grad_enabled() else "passes"
            self.visits[kind] += len(inputs[0])

        model = trainer.lightning_module
        assert isinstance(model, Classifier)
        with model.network[0].register_forward_hook(count):
            return super().repair_now(trainer, *given, **arguments)


def repaired(path: Path, **arguments: Any) -> tuple[float, Counted]:
    """The passes of a repair over the known data, without gradients, and the callback."""
    callback = Counted(dirpath=path, verbose=False, **arguments)
    quiet_trainer(path, callback).fit(Classifier(), datamodule=SmallBatches(16))
    assert callback.report.status == "repaired"
    known = sum(split.n for split in by_role(callback.report.splits)["known"])
    return callback.visits["passes"] / known, callback


@pytest.mark.parametrize(
    ("most", "has_curve", "arguments"),
    [
        (2.3, True, {"method": "swarm", "layer": HEAD}),
        (2.3, True, {"method": "convex", "layer": HEAD}),
        (4.0, True, {"layer": HEAD}),
        (3.3, False, {"method": SWARM, "layer": "network.1"}),
        (8.0, False, {}),
    ],
    ids=["swarm", "convex", "head", "inner", "all"],
)
def test_a_repair_makes_few_passes_besides_its_training(tmp_path, most, has_curve, arguments):
    passes, callback = repaired(tmp_path, **arguments)
    report = callback.report
    assert passes - report.passes.get("fit", 0.0) <= most, (passes, report.passes)
    # Checks before the repair run single batches.
    assert passes - 0.3 <= sum(report.passes.values()) <= passes
    assert f"{sum(report.passes.values()):.1f} passes over the known data" in report.render()
    # Strengths are only evaluated if that needs no pass.
    assert (len(report.strength) > 3, "By strength" in report.to_markdown()) == (has_curve,) * 2
    assert "strength" not in report.passes


def test_a_curve_that_is_asked_for_is_counted_by_passes(tmp_path):
    bounds = BoundOptions(strength=0.9)
    _, callback = repaired(tmp_path, method=SWARM, layer="network.1", bounds=bounds)
    assert [point.strength for point in callback.report.strength] == [0.9, 1.0]
    assert callback.report.passes["strength"] == 1.0
