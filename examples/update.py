"""Replaces an old model by a new one, whose regressions a repair fixes.

    python examples/update.py

The old network was trained on 200 of scikit-learn's handwritten digits. A new one, trained from
scratch on 600, is far more accurate, but it misreads some digits that the old one read correctly.
A gate refuses the new model and accepts the repaired one. Both models are tested on a suite of 400
digits. Later digits are only counted.
"""

from __future__ import annotations

import torch
from digits import DigitNet
from lightning.pytorch import seed_everything
from output import quiet_trainer, start
from rich import box, print
from rich.table import Table
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import ReleaseGate, repair
from lightning_nrl.release import ReleaseReport

RULES = [
    "instance in suite",  # no sample of the suite may break
    "accuracy in later",  # no more unseen samples may break than are repaired
]


def digits() -> tuple[TensorDataset, ...]:
    """Returns the training digits of the old and the new model, the suite, and later digits."""
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.tensor(data.target)[order]
    ends = (slice(0, 200), slice(0, 600), slice(600, 1000), slice(1000, None))
    return tuple(TensorDataset(images[rows], labels[rows], order[rows]) for rows in ends)


def judged(new: DigitNet, old: DigitNet, loaders: dict[str, DataLoader]) -> ReleaseReport:
    """Tests the new model with the release gate and returns its report."""
    gate = ReleaseGate(reference=old, rules=RULES, verbose=False)
    quiet_trainer(1, gate).test(new, loaders, verbose=False)
    return gate.report


if __name__ == "__main__":
    fast = start(__doc__).fast
    few, more, suite, later = digits()
    loaders = {"suite": DataLoader(suite, 256), "later": DataLoader(later, 256)}

    seed_everything(0, verbose=False)
    old, new = DigitNet(), DigitNet()
    for model, data in ((old, few), (new, more)):
        quiet_trainer(8 if fast else 30).fit(model, DataLoader(data, 32, shuffle=True))
    verdicts = {"as trained": judged(new, old, loaders)}

    report = repair(
        quiet_trainer(),
        new,
        train_dataloaders=DataLoader(more, 32, shuffle=True),
        val_dataloaders=loaders["suite"],
        reference=old,  # targets: samples that the old model gets right and the new one wrong
        unseen=loaders["later"],
        max_time=3 if fast else None,
        verbose=False,
    )
    verdicts["repaired"] = judged(new, old, loaders)

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption="broken: the old model is right, the new one wrong.",
    )
    for head in (
        "new model",
        "broken:\nsuite",
        "\nlater",
        "accuracy:\nsuite",
        "\nlater",
        "\nverdict",
    ):
        table.add_column(head, justify="left" if head == "new model" else "right")
    for name, verdict in verdicts.items():
        counts = [row.counts for row in verdict.rows]
        shares = [f"{count.accuracy_after:.2%}" for count in counts]
        table.add_row(name, *(str(count.broken) for count in counts), *shares, verdict.status)
    print(table)
    print(
        f"The old model: {counts[0].accuracy_before:.2%} on the suite, "
        f"{counts[1].accuracy_before:.2%} on later digits."
    )
