"""Diagnoses failures before a repair: which can be fixed, and what prevents it. A few seconds.

    python examples/diagnose.py

The data and the network are in `digits.py`. The script prints tables and, with matplotlib, draws
`diagnosis.png`.
"""

from __future__ import annotations

from digits import DigitNet, SlashedZeros, slashed_zero
from lightning.pytorch import seed_everything
from output import quiet_trainer, start
from rich import print

from lightning_nrl import ConfigurationError, Target, diagnose

if __name__ == "__main__":
    given = start(
        __doc__, **{"--seed": {"type": int, "default": 0, "help": "of data and training"}}
    )
    epochs = 8 if given.fast else 30
    seed_everything(given.seed, verbose=False)
    trainer = quiet_trainer(epochs)
    network, data = DigitNet(), SlashedZeros(given.seed)
    trainer.fit(network, datamodule=data)

    diagnosis = diagnose(
        trainer,
        network,
        datamodule=data,
        target=Target.where(slashed_zero),
        seed=given.seed,
    )
    print(diagnosis)
    print(f"\nIt took {sum(diagnosis.seconds.values()):.1f} s.")
    try:
        diagnosis.plot("diagnosis.png")
        print("The figure:  diagnosis.png")
    except ConfigurationError as error:
        print(error)
