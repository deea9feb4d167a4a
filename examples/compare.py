"""Compares a repair with fine-tuning, distillation, interpolation and retraining. Half a minute.

    python examples/compare.py

The data and the network are in `digits.py`. The script prints a table and, with matplotlib, draws
`comparison.png`.
"""

from __future__ import annotations

from digits import DigitNet, SlashedZeros, slashed_zero
from lightning.pytorch import seed_everything
from output import quiet_trainer, start
from rich import print

from lightning_nrl import ConfigurationError, Target, compare

if __name__ == "__main__":
    options = {
        "--seed": {"type": int, "default": 0, "help": "of data, training and methods"},
        "--methods": {"nargs": "*", "help": "names of methods; default: all"},
    }
    given = start(__doc__, **options)
    epochs = 5 if given.fast else 30
    seed_everything(given.seed, verbose=False)
    trainer = quiet_trainer(epochs)
    network, data = DigitNet(), SlashedZeros(given.seed)
    trainer.fit(network, datamodule=data)

    comparison = compare(
        trainer,
        network,
        datamodule=data,
        target=Target.where(slashed_zero),
        seed=given.seed,
        methods=given.methods,
    )
    print(comparison)
    try:
        comparison.plot("comparison.png")
        print("The curves:  comparison.png")
    except ConfigurationError as error:
        print(error)
