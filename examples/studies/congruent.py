"""Retraining with and without a term that holds the new model to what the old one gets right: one table.

    python examples/studies/congruent.py                  # ten seeds from scratch, all terms
    python examples/studies/congruent.py --start old      # the same, going on from the old weights
    python examples/studies/congruent.py --start old --interpolate  # and each with weights between old and new
    python examples/studies/congruent.py --terms plain "focal distillation" --seeds 3

A network for handwritten digits (scikit-learn) was trained on 300 images; it is replaced by one that is trained on
these and 300 more. What the new one breaks of the old one is counted on 997 images that nothing has looked at, right
after training and after the repair, which may look at 200 validation images too. What was run before is read from
`runs/congruent/`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from rich import box, print
from rich.table import Table
from seeds import reports_of
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import DigitNet

from lightning_nrl import PositiveCongruentTraining, RegressionFreeRepair, RepairReport, WeightInterpolation
from lightning_nrl.reference import FocalDistillation, MarginHinge, Oversampler

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
    """Batches of `(image, digit, position)`; the first images alone, or with those that came in later."""

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


def trainer_with(*callbacks: object) -> Trainer:
    return Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def old_model(seed: int, folder: Path) -> Path:
    """The checkpoint of the model in use."""
    path = folder / f"old_{seed}.ckpt"
    if not path.exists():
        seed_everything(seed, verbose=False)
        trainer = trainer_with()
        trainer.fit(DigitNet(), datamodule=MoreDigits(seed, more=False))
        trainer.save_checkpoint(path)
    return path


def update(seed: int, term: str, start: str, interpolate: bool, runs: Path, folder: Path) -> RepairReport:
    """Trains the new model in one of the ways, and repairs what it breaks."""
    checkpoint = old_model(seed, runs)
    old = DigitNet.load_from_checkpoint(checkpoint)
    seed_everything(seed + 1000, verbose=False)
    new = DigitNet()
    if start == "old":
        new.load_state_dict(old.state_dict())
    terms = TERMS[term]
    congruent = [] if terms is None else [PositiveCongruentTraining(checkpoint, terms, index=position)]
    between = [WeightInterpolation(checkpoint, seed=seed, verbose=False)] if interpolate else []
    repair = RegressionFreeRepair(reference=checkpoint, unseen="test", seed=seed, dirpath=folder, verbose=False)
    data = MoreDigits(seed, more=True, hard_for=old if term == "oversampling" else None)
    trainer_with(*congruent, *between, repair).fit(new, datamodule=data)
    for interpolation in between:
        assert interpolation.choice is not None
        print(f"seed {seed}: a share of {interpolation.choice.share:.2f} of the old weights")
    assert repair.report is not None
    return repair.report


def table_of(found: dict[str, list[RepairReport]], title: str) -> Table:
    """One row for each way of training: means over seeds on unseen data, against the model that is replaced."""
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("\n\ntraining")
    heads = ("trained:\n\naccuracy", "\n\nNFR, %", "\nseeds with\nfewer : more", "repaired:\n\naccuracy", "\n\nNFR, %")
    for head in (*heads, "\nseeds with\nfewer : more"):
        table.add_column(head, justify="right", no_wrap=True)
    first = next(iter(found.values()))
    for term, reports in found.items():
        cells = []
        for which in ("trained", "now"):
            splits = [getattr(report.pooled_update("unseen"), which) for report in reports]
            plain = [getattr(report.pooled_update("unseen"), which) for report in first]
            pairs = [(mine.broken, other.broken) for mine, other in zip(splits, plain, strict=True)]
            rate = mean(split.broken / split.n for split in splits)
            cells += [f"{mean(split.accuracy_after for split in splits):.4f}", f"{100 * rate:.2f}"]
            cells.append(f"{sum(a < b for a, b in pairs)} : {sum(a > b for a, b in pairs)}")
        table.add_row(term, *cells)
    table.caption = (
        f"{len(first)} seeds. NFR: share of the unseen samples that the old model gets right and the new one wrong. "
        f"Seeds with fewer and with more of them than {next(iter(found))!r}."
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--start", choices=("scratch", "old"), default="scratch")
    parser.add_argument("--interpolate", action="store_true", help="further rows with weights between old and new")
    parser.add_argument("--terms", nargs="+", choices=list(TERMS), default=list(TERMS))
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    runs, seeds = Path("runs") / "congruent", range(given.first, given.first + given.seeds)
    found = {}
    for term, between in product(given.terms, (False, True) if given.interpolate else (False,)):
        name = f"{term}, interpolated" if between else term
        print(f"\n{name}, from {given.start}")
        folder = runs / f"{name.replace(', ', '_').replace(' ', '_')}_{given.start}"
        run = partial(update, term=term, start=given.start, interpolate=between, runs=runs)
        found[name] = reports_of(folder, seeds, lambda seed, own, run=run: run(seed, folder=own))
    beginning = "from scratch" if given.start == "scratch" else "from the old weights"
    print(table_of(found, f"A digit network is replaced, the new one trained {beginning}"))


if __name__ == "__main__":
    main()
