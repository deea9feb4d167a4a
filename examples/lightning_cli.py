"""Repairs with LightningCLI: the callback is configured in a YAML file.

    python examples/lightning_cli.py   # fit, with lightning_cli.yaml
    python examples/lightning_cli.py fit --config my.yaml --trainer.max_epochs 10   # any arguments

LightningCLI saves its configuration next to the checkpoints. The commands of this package read that
file; the script prints an example.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from lightning.pytorch.cli import LightningCLI
from output import summary
from rich import print

from lightning_nrl import RegressionFreeRepair

HERE = Path(__file__).parent

if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning|torch")
    given = sys.argv[1:] or ["fit", "--config", str(HERE / "lightning_cli.yaml")]
    cli = LightningCLI(args=given)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, RegressionFreeRepair) and callback.report is not None:
            print(summary(repair=callback.report))
            checkpoint = cli.trainer.checkpoint_callback.best_model_path
            config = Path(cli.trainer.log_dir) / "config.yaml"
            print("To diagnose the failures of the model before the repair:")
            print(
                f"PYTHONPATH={HERE} lightning-nrl diagnose"
                f" --config {config} --ckpt_path {checkpoint}"
            )
