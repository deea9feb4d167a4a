"""Repairs at the end of `fit` with the callback, then tests the repaired checkpoint.

    python examples/repair_in_fit.py

The training data have no slashed zeros. Later data do, and most of them are misread (`digits.py`).
"""

from __future__ import annotations

from digits import DigitNet, SlashedZeros
from lightning.pytorch import Trainer, seed_everything
from output import start, summary
from rich import print
from torch import Tensor

from lightning_nrl import RegressionFreeRepair, Target


def slashed_zero(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Marks the samples to repair, one bool each, in a batch as the data loader returns it."""
    _image, _digit, slashed = batch
    return slashed


if __name__ == "__main__":
    fast = start(__doc__).fast
    seed_everything(0, verbose=False)
    model, data = DigitNet(), SlashedZeros()
    repair = RegressionFreeRepair(
        target=Target.where(slashed_zero),  # default: all failures
        unseen="test",  # data that is only counted
        max_time=10 if fast else None,  # seconds; default: about as much work as the fit
        verbose=False,
    )
    trainer = Trainer(
        max_epochs=8 if fast else 30,
        accelerator="cpu",
        callbacks=[repair],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)  # trains, repairs, judges, logs, saves

    print(summary(repair=repair.report))
    if repair.repaired_model_path:  # a Lightning checkpoint; None if nothing was accepted
        tested = trainer.test(
            model, datamodule=data, ckpt_path=repair.repaired_model_path, verbose=False
        )
        print(f"Lightning's own test of the repaired checkpoint: {tested[0]['test/accuracy']:.2%}")
    print(f"The whole report: {repair.report.files['html']}")
