"""A repair is judged, and holds, in the precision in which the model is deployed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digit_models import Classifier, Digits, quick_repair, quiet_trainer
from lightning_package import Callback, Trainer
from torch import Tensor

PRECISIONS = ["32-true", "64-true", "16-true", "bf16-true", "bf16-mixed"]


class Answers(Callback):
    """What the trainer's own validation loop says about each sample."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Classifier) -> None:
        pl_module.answers = []  # type: ignore[assignment]


class Recorded(Classifier):
    answers: list[Tensor]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)  # Adam's squares underflow in float16

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.answers.append(self(batch[0]).argmax(1) == batch[1])


def answers(model: Recorded, precision: str, path: Path) -> Tensor:
    trainer = quiet_trainer(path, Answers(), precision=precision)
    trainer.validate(model, [Digits().repair_dataloader()], verbose=False)
    return torch.cat(model.answers)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", ["network.3", "network.1"])
def test_nothing_breaks_in_the_precision_of_training(tmp_path: Path, precision: str, layer: str) -> None:
    model, start = Recorded(), Recorded()
    repair = quick_repair(layer=layer)

    class Remember(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Classifier) -> None:
            start.load_state_dict(pl_module.state_dict())

    trainer = quiet_trainer(tmp_path, Remember(), repair, Answers(), max_epochs=2, precision=precision)
    trainer.fit(model, datamodule=Digits())
    before, after = (answers(m, precision, tmp_path) for m in (start, model))
    (split,) = (split for split in repair.report.splits if split.split == "repair")
    assert split.broken == int((before & ~after).sum()) == 0
    assert split.repaired_ids == tuple((~before & after).nonzero().flatten().tolist())
    assert repair.report.status == "repaired"
    saved = torch.load(repair.repaired_model_path, weights_only=True)["state_dict"][f"{layer}.weight"]
    assert saved.dtype == model.network[1].weight.dtype
