"""Compares loss terms that keep a retrained model right where the old one was.

    python examples/studies/congruent.py   # ten seeds from scratch, all terms
    python examples/studies/congruent.py --start old   # the same, starting from the old weights
    python examples/studies/congruent.py --start old --interpolate   # and interpolates
    python examples/studies/congruent.py --terms plain "focal distillation" --seeds 3

The old network was trained on 300 of scikit-learn's handwritten digits, the new one on these and
300 more. Samples that the old model gets right and the new one wrong are counted on 997 unseen
images, after the training and after a repair. The repair also uses 200 validation images. Earlier
runs are read from `runs/congruent/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from problems import RUNS, DigitNet, markdown, quiet_trainer, start
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_nrl import (
    PositiveCongruentTraining,
    RegressionFreeRepair,
    RepairReport,
    WeightInterpolation,
)
from lightning_nrl.updates import FocalDistillation, MarginHinge, Oversampler

SPLITS = {"first": 300, "more": 300, "val": 200, "test": 997}
EPOCHS = 30
TERMS = {
    "plain": None,
    "focal distillation": FocalDistillation(),
    "with old errors": FocalDistillation(base=1, focus=5),
    "margin hinge": MarginHinge(),
    "both": [FocalDistillation(), MarginHinge()],
    "oversampling": None,
}


class MoreDigits(LightningDataModule):
    """Batches of `(image, digit, position)`: the first images, or all."""

    def __init__(self, seed: int, more: bool, hard_for: DigitNet | None = None) -> None:
        super().__init__()
        digits = load_digits()
        order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(seed))
        images = torch.tensor(digits.images[order], dtype=torch.float32).unsqueeze(1) / 16
        data = TensorDataset(images, torch.tensor(digits.target[order]), torch.arange(len(order)))
        n, known = SPLITS["first"], SPLITS["first"] + SPLITS["more"]
        self.train = Subset(data, range(known if more else n))
        self.val = Subset(data, range(known, known + SPLITS["val"]))
        self.test = Subset(data, range(known + SPLITS["val"], len(order)))
        self.sampler = None if hard_for is None else Oversampler.of(hard_for, self.train, seed=seed)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 64, shuffle=self.sampler is None, sampler=self.sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 256)


def position(batch: Sequence[torch.Tensor]) -> torch.Tensor:
    return batch[2]


def old_model(seed: int) -> Path:
    """Returns the checkpoint of the old model."""
    path = RUNS / "congruent" / f"old_{seed}.ckpt"
    if not path.exists():
        seed_everything(seed, verbose=False)
        trainer = quiet_trainer(EPOCHS, accelerator="cpu", limit_val_batches=0)
        trainer.fit(DigitNet(), datamodule=MoreDigits(seed, more=False))
        trainer.save_checkpoint(path)
    return path


def updated(seed: int, term: str, begin: str, interpolate: bool) -> RepairReport:
    """Trains the new model with one term and repairs its regressions, or reads an earlier run."""
    way = f"{term}{'_interpolated' * interpolate}_{begin}".replace(" ", "_")
    folder = RUNS / "congruent" / way / f"seed_{seed}"
    if not (folder / "report.json").exists():
        checkpoint = old_model(seed)
        old = DigitNet.load_from_checkpoint(checkpoint)
        seed_everything(seed + 1000, verbose=False)
        new = DigitNet()
        if begin == "old":
            new.load_state_dict(old.state_dict())
        terms = TERMS[term]
        congruent = (
            [] if terms is None else [PositiveCongruentTraining(checkpoint, terms, index=position)]
        )
        between = [WeightInterpolation(checkpoint, seed=seed, verbose=False)] if interpolate else []
        repair = RegressionFreeRepair(
            reference=checkpoint, unseen="test", seed=seed, dirpath=folder, verbose=False
        )
        data = MoreDigits(seed, more=True, hard_for=old if term == "oversampling" else None)
        trainer = quiet_trainer(
            EPOCHS, *congruent, *between, repair, accelerator="cpu", limit_val_batches=0
        )
        trainer.fit(new, datamodule=data)
    return RepairReport.from_json((folder / "report.json").read_text())


HEADS = (
    "trained: accuracy",
    "NFR, %",
    "(fewer : more)",
    "repaired: accuracy",
    "NFR, %",
    "(fewer : more)",
)


def row(name: str, reports: Sequence[RepairReport], first: Sequence[RepairReport]) -> list[str]:
    """Returns means over seeds on unseen data.

    Counts also the seeds with fewer and with more broken samples than in the first row.
    """
    cells = []
    for which in ("trained", "final"):
        splits, plain = (
            [getattr(one.pooled_update("unseen"), which) for one in of] for of in (reports, first)
        )
        pairs = [(mine.broken, other.broken) for mine, other in zip(splits, plain, strict=True)]
        rate = fmean(split.broken / split.n for split in splits)
        cells += [f"{fmean(split.accuracy_after for split in splits):.4f}", f"{100 * rate:.2f}"]
        cells.append(f"({sum(a < b for a, b in pairs)} : {sum(a > b for a, b in pairs)})")
    return [name, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, default=10, help="number of seeds, starting at --first"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--start", choices=("scratch", "old"), default="scratch", help="start of the new training"
    )
    parser.add_argument(
        "--interpolate", action="store_true", help="add rows with weights between old and new"
    )
    parser.add_argument("--terms", nargs="+", choices=list(TERMS), default=list(TERMS))
    given = parser.parse_args()
    start()
    torch.set_num_threads(1)
    seeds = range(given.first, given.first + given.seeds)
    found = {}
    for term, between in product(given.terms, (False, True) if given.interpolate else (False,)):
        name = f"{term}, interpolated" if between else term
        found[name] = [updated(seed, term, given.start, between) for seed in seeds]
    first = next(iter(found.values()))
    print(
        f"Trained from {given.start}, {len(seeds)} seeds; "
        "NFR: unseen samples that the old model alone gets right\n"
    )
    print(markdown(HEADS, [row(name, reports, first) for name, reports in found.items()]))


if __name__ == "__main__":
    main()
