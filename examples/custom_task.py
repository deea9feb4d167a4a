"""A task of your own: what "right" means is yours to say. Here: the true digit is among the two best guesses.

    python examples/custom_task.py

A clerk is shown the network's two best guesses and picks one. A sample fails only if neither is right. Three functions
say so, one value a sample. The network and its data are in `digits.py`.
"""

from __future__ import annotations

import torch
from digits import DigitNet, SlashedZeros
from lightning.pytorch import Trainer, seed_everything
from output import start, summary
from rich import print
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl import RegressionFreeRepair
from lightning_nrl.tasks import Custom


def margin(logits: Tensor, digits: Tensor) -> Tensor:
    """By how much the true digit leads the second best of the others: above 0 where it is among the best two."""
    truth = logits.gather(1, digits[:, None])
    others = logits.masked_fill(F.one_hot(digits, logits.shape[1]).bool(), -torch.inf)
    return truth[:, 0] - others.topk(2).values[:, 1]


def among_two(logits: Tensor, digits: Tensor) -> Tensor:
    """Which samples are right, `n` bool."""
    return margin(logits, digits) > 0


def loss(logits: Tensor, digits: Tensor) -> Tensor:
    """What is to be made small, `n`."""
    return F.cross_entropy(logits, digits, reduction="none")


if __name__ == "__main__":
    fast = start(__doc__).fast
    seed_everything(0, verbose=False)
    repair = RegressionFreeRepair(
        task=Custom(passed=among_two, loss=loss, margin=margin),
        unseen="test",
        max_time=3 if fast else 10,
        verbose=False,
    )
    trainer = Trainer(
        max_epochs=5 if fast else 30,
        accelerator="cpu",
        callbacks=[repair],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitNet(), datamodule=SlashedZeros())
    print(summary(repair=repair.report))
    print("Accuracy here is the share of digits that are among the best two guesses.")
