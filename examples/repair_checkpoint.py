"""Repairs a checkpoint that was trained some time ago: no training, the same report and files.

python examples/repair_checkpoint.py               # trains a checkpoint first, to have one
python examples/repair_checkpoint.py digits.ckpt   # repairs this one

The data and the network are in `digits.py`.
"""

from __future__ import annotations

import argparse
import logging
import warnings

from digits import DigitNet, SlashedZeros
from lightning.pytorch import Trainer, seed_everything

from lightning_nrl import Target, repair


def train() -> str:
    """What happened long ago: a plain training, without a thought of repair."""
    seed_everything(0, verbose=False)
    trainer = Trainer(max_epochs=30, accelerator="cpu", enable_model_summary=False)
    trainer.fit(DigitNet(), datamodule=SlashedZeros())
    return trainer.checkpoint_callback.best_model_path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint of DigitNet")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    checkpoint = parser.parse_args().checkpoint or train()

    trainer = Trainer(accelerator="cpu", enable_model_summary=False)
    data, network = SlashedZeros(), DigitNet()
    report = repair(
        trainer,
        network,
        datamodule=data,
        ckpt_path=checkpoint,
        target=Target.where(lambda batch: batch[2], name="slashed zero"),
        unseen="test",
    )

    if report.status == "repaired":
        repaired = DigitNet.load_from_checkpoint(report.files["checkpoint"])  # an ordinary checkpoint
        trainer.test(repaired, datamodule=data)
