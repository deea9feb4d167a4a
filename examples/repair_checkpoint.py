"""Repairs a trained checkpoint without a fit.

    python examples/repair_checkpoint.py   # trains a checkpoint first
    python examples/repair_checkpoint.py digits.ckpt   # this one, of the network in `digits.py`

Only the last layer may change, so the repair takes a few seconds and the patch is small.
"""

from __future__ import annotations

from digits import DigitNet, SlashedZeros
from lightning.pytorch import Trainer, seed_everything
from output import start, summary
from rich import print

from lightning_nrl import Target, repair


def train(epochs: int) -> str:
    """Trains without the callback and returns the path of the checkpoint."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(DigitNet(), datamodule=SlashedZeros())
    return trainer.checkpoint_callback.best_model_path


if __name__ == "__main__":
    given = start(__doc__, checkpoint={"nargs": "?", "help": "a checkpoint of DigitNet"})
    checkpoint = given.checkpoint or train(epochs=8 if given.fast else 30)

    trainer = Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    data, network = SlashedZeros(), DigitNet()
    report = repair(
        trainer,
        network,
        datamodule=data,
        ckpt_path=checkpoint,
        target=Target.where(lambda batch: batch[2], name="slashed zero"),
        layer="classifier",
        unseen="test",
        verbose=False,
    )

    print(summary(repair=report))
    if report.status == "repaired":
        print(f"Weights changed: {report.change.changed} of {report.change.total:,}.")
        repaired = DigitNet.load_from_checkpoint(
            report.files["checkpoint"]
        )  # an ordinary checkpoint
        trainer.test(repaired, datamodule=data)
        print(f"The patch, which can be applied and reverted: {report.files.get('patch')}")
