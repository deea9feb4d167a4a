"""Decides by rules whether a new model may replace the old one, and writes a report.

    python examples/release.py                        # the old model, fine-tuned on new data
    python examples/release.py --candidate repaired   # the old model, repaired

The data and the network are in `digits.py`. The exit status is 0 if the candidate is accepted and
1 if it is refused.
"""

from __future__ import annotations

import sys
from copy import deepcopy

from digits import DigitNet, SlashedZeros, slashed_zero
from lightning.pytorch import Trainer, seed_everything
from output import quiet_trainer, start
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from lightning_nrl import ReleaseGate, Target, repair
from lightning_nrl.release import ProtectedIntact

Batch = tuple[Tensor, Tensor, Tensor]


def digit(batch: Batch) -> Tensor:
    return batch[1]


def is_zero(batch: Batch) -> Tensor:
    return batch[1] == 0


if __name__ == "__main__":
    candidate = {"choices": ["tuned", "repaired"], "default": "tuned", "help": "the new model"}
    given = start(__doc__, **{"--candidate": candidate})
    epochs = 3 if given.fast else 30

    data = SlashedZeros()
    seed_everything(0, verbose=False)
    old = DigitNet()
    quiet_trainer(epochs).fit(old, datamodule=data)
    new = deepcopy(old)
    if given.candidate == "tuned":
        quiet_trainer(epochs).fit(new, data.repair_dataloader())
    else:
        repair(
            quiet_trainer(), new, datamodule=data, target=Target.where(slashed_zero), verbose=False
        )

    gate = ReleaseGate(
        reference=old,
        rules=[
            "instance in known",  # no known sample may break
            "nfr:2% in later",  # at most 2 % of samples like these break, with 95 % confidence
            "slices in later",  # no digit is significantly worse
            ProtectedIntact(where=is_zero),
        ],
        slices=digit,
    )
    known = DataLoader(ConcatDataset([data.data["train"], data.data["repair"]]), 256)
    trainer = Trainer(accelerator="cpu", callbacks=[gate], enable_progress_bar=False)
    trainer.test(new, {"known": known, "later": data.test_dataloader()}, verbose=False)
    sys.exit(gate.report.exit_status)
