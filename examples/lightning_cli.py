"""A repair from LightningCLI: all of it stands in a YAML file, no code.

    python examples/lightning_cli.py                                                 # fit, with lightning_cli.yaml
    python examples/lightning_cli.py fit --config my.yaml --trainer.max_epochs 10    # as LightningCLI has it

The file that LightningCLI leaves beside its checkpoints is all that the commands of this package need; what to call is
printed at the end.
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
            print("What could be repaired, and what stands in the way, before any repair:")
            print(f"PYTHONPATH={HERE} lightning-nrl diagnose --config {config} --ckpt_path {checkpoint}")
