"""Trains a small network on handwritten digits, with a record, and repairs it on slashed zeros, in
seconds.
"""

from __future__ import annotations

import torch

from lightning_nrl import RegressionFreeRepair, Target, TrainingHistory


def slashed_zero(batch):
    return batch[2]


def main() -> None:
    from digits import DigitNet, SlashedZeros  # of examples/
    from lightning.pytorch import Trainer, seed_everything

    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    repair = RegressionFreeRepair(
        target=Target.where(slashed_zero), method="swarm", unseen="test", verbose=False
    )
    trainer = Trainer(
        max_epochs=15,
        accelerator="cpu",
        callbacks=[TrainingHistory("val", prefix="training"), repair],
        log_every_n_steps=20,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitNet(), datamodule=SlashedZeros(0))


if __name__ == "__main__":
    main()
