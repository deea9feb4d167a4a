"""Some failures matter more than others: one network repaired again and again, each time with something else to heed.

    python examples/studies/importance.py

All failures are to be repaired, by a change of the last layer alone, where not all of them can be. The zeros with a
slash through them (see `../digits.py`) are one slice of the data, all other digits another. For each way to say what
counts the table has, slice by slice, how many failures were repaired.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from lightning.pytorch import seed_everything
from problems import DigitNet, SlashedZeros, markdown, quiet_trainer, start
from torch import Tensor

from lightning_nrl import RegressionFreeRepair, RepairReport, SampleOptions, Target, repair


def slices(batch: tuple[Tensor, Tensor, Tensor]) -> list[str]:
    """The slice of each sample of a batch `(image, digit, slashed)`."""
    return ["slashed" if slashed else "other" for slashed in batch[2].tolist()]


def slashed_more(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A failure on a slashed zero counts for ten."""
    return torch.where(batch[2], 10.0, 1.0)


def others_more(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A failure on anything else counts for ten."""
    return torch.where(batch[2], 1.0, 10.0)


WAYS: dict[str, dict[str, Any]] = {
    "all alike": {},
    "slashed count for 10": {"importance": slashed_more},
    "others count for 10": {"importance": others_more},
    "hard ones (focal)": {"importance": "focal"},
    "quota: all others": {"quotas": {"other": "100%"}},
    "doubtful labels aside": {"set_aside": "doubtful"},
}


def trained(epochs: int, seed: int) -> tuple[DigitNet, SlashedZeros]:
    """A network that has never seen a slashed zero, and its data."""
    seed_everything(seed, verbose=False)
    model, data = DigitNet(), SlashedZeros(seed)
    quiet_trainer(epochs, accelerator="cpu").fit(model, datamodule=data)
    return model, data


def repaired(model: DigitNet, data: SlashedZeros, folder: str, seed: int, **counts: Any) -> RepairReport:
    """The report of one repair; the network is as it was afterwards."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = RegressionFreeRepair(
        target=Target.all(),
        method="convex",
        samples=SampleOptions(slices=slices, **counts),
        unseen="test",
        seed=seed,
        dirpath=folder,
        verbose=False,
    )
    report = repair(quiet_trainer(accelerator="cpu"), model, datamodule=data, callback=callback)
    model.load_state_dict(before)
    return report


def row(report: RepairReport) -> list[str]:
    """Repaired of targeted by slice, and broken, on known data; then repaired and broken on unseen data."""
    cells = []
    for name in ("slashed", "other"):
        one = next(one for one in report.slices if (one.name, one.role) == (name, "known"))
        cells.append(f"{one.repaired_in_target} of {one.targeted}")
    known, unseen = report.pooled("known"), report.pooled("unseen")
    return [*cells, str(known.broken), f"{unseen.repaired} : {unseen.broken}", report.status]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start()
    torch.set_num_threads(1)
    model, data = trained(given.epochs, given.seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = [[way, *row(repaired(model, data, folder, given.seed, **counts))] for way, counts in WAYS.items()]
    print(markdown(("slashed", "other", "broken", "unseen", "verdict"), rows))
