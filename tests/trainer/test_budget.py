"""Ranks that train together stay together, also where one of them fails: two gloo processes, one
made to fail.
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_package import Callback, LightningModule, Trainer, quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate
from toy_repairs import blobs
from two_processes import spawning

from lightning_nrl._trainer.lightning.private_parts import validating
from lightning_nrl._trainer.reading.loaders import make_source
from lightning_nrl._trainer.training.continue_training import ContinuedTraining
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import OtherRankError

FAILURES = ("none", "copy", "collate", "memory", "late memory", "bug")
"""What goes wrong on the second rank, if anything."""
LAST = 3
"""Of the 4 batches of an epoch."""


def fails(failure: str) -> bool:
    return Net.failure == failure and dist.get_rank() == 1


def collate(samples: Any) -> Any:
    if fails("collate"):
        raise TypeError("no batch")
    return default_collate(samples)


class Net(LightningModule):
    failure = "none"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if fails("copy"):
            raise TypeError("no copy")
        return super().__reduce_ex__(protocol)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if fails("memory") and batch_idx == 1:
            raise torch.OutOfMemoryError("out of memory")
        if fails("bug") and batch_idx == 2:
            raise ZeroDivisionError
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if fails("late memory") and self.trainer.global_step == LAST:
            raise torch.OutOfMemoryError("out of memory")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


class Continue(Callback):
    """Goes on with the training, once for each failure, and writes down how each rank fared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        outcomes = {
            f"{failure}, {seconds}": self.outcome(trainer, pl_module, failure, seconds)
            for failure, seconds in product(FAILURES, (math.inf, 60.0))
        }
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(outcomes))

    def outcome(self, trainer: Trainer, model: Any, failure: str, seconds: float) -> str:
        data = DataLoader(TensorDataset(*blobs(32, 1.5)), 4, collate_fn=collate)
        Net.failure = failure
        with validating(trainer), preserve_state(model):
            source = make_source(
                data, "train", trainer=trainer, model=model, passed=True, failed=True
            )
            training = ContinuedTraining(
                trainer, model, [source], 3, (), trainer.train_dataloader, augment=None
            )
            try:
                state = training(seconds=seconds, seed=0, clock=StageTimer())
                result = "nothing" if state is None else "weights"
            except (OtherRankError, ZeroDivisionError) as error:
                result = type(error).__name__
        # If a rank were elsewhere, this would not add up.
        together = Collective.current(model.device).sum(torch.tensor([100 + trainer.global_rank]))
        return f"{result}, {int(together)}"


@pytest.mark.filterwarnings("ignore")
def test_all_ranks_leave_a_training_in_one_way(tmp_path):
    trainer = quiet_trainer(
        max_epochs=1,
        devices=2,
        strategy=spawning(),
        default_root_dir=tmp_path,
        callbacks=[Continue(tmp_path)],
    )
    trainer.fit(Net(), DataLoader(TensorDataset(*blobs(32)), 4, collate_fn=collate))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert list(ranks[0]) == list(ranks[1])
    for rank, outcomes in enumerate(ranks):
        for name, outcome in outcomes.items():
            expected = "weights" if "none" in name else "nothing"
            assert outcome == f"{expected}, 201", (rank, name)
