"""Trains and repairs a network with DDP on two CPU processes (gloo).

    python examples/ddp.py

The repair needs no extra code: each process evaluates its share of the samples, and all get the
same repair. The data and the network are in `digits.py`. For GPUs, set `accelerator="gpu"`.
"""

from __future__ import annotations

import torch
from digits import DigitNet, SlashedZeros, slashed_zero
from lightning.pytorch import Trainer, seed_everything
from output import start, summary
from rich import print

from lightning_nrl import RegressionFreeRepair, Target

if __name__ == "__main__":
    fast = start(__doc__).fast
    seed_everything(0, verbose=False)
    repair = RegressionFreeRepair(
        target=Target.where(slashed_zero),
        unseen="test",
        max_time=3 if fast else None,
        verbose=False,
    )
    trainer = Trainer(
        max_epochs=5 if fast else 30,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[repair],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = DigitNet()
    trainer.fit(model, datamodule=SlashedZeros())

    sums = [x.double().sum() for x in model.state_dict().values()]
    weights = trainer.strategy.all_gather(torch.stack(sums))  # 2 x tensors
    if trainer.is_global_zero:
        print(summary(repair=repair.report))
        same = "the same" if torch.equal(*weights) else "DIFFERENT"
        print(f"{trainer.world_size} processes hold {same} weights, {repair.report.status}.")
