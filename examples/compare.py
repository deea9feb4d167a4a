"""Repairs beside what people do instead: fine-tuning, distillation, interpolation, retraining. Half a minute.

    python examples/compare.py

The data and the network are in `digits.py`. Prints one table; with matplotlib it also draws `comparison.png`.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
from digits import DigitNet, SlashedZeros
from lightning.pytorch import Trainer, seed_everything
from rich import print

from lightning_nrl import ConfigurationError, Target, compare

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of data, training and methods")
    parser.add_argument("--methods", nargs="*", help="names of methods; all if there are none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is so small that threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")

    seed_everything(arguments.seed, verbose=False)
    trainer = Trainer(
        max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    network, data = DigitNet(), SlashedZeros(arguments.seed)
    trainer.fit(network, datamodule=data)

    comparison = compare(
        trainer,
        network,
        datamodule=data,
        target=Target.where(lambda batch: batch[2], name="slashed zero"),
        seed=arguments.seed,
        methods=arguments.methods,
    )
    print(comparison)
    try:
        comparison.plot("comparison.png")
        print("The curves:  comparison.png")
    except ConfigurationError as error:
        print(error)
