"""Is an early repair better? The quickstart, repaired after some epochs of its training: one table.

    python examples/studies/early_repair.py --seeds 15

A network is trained for 15 epochs. Repaired are its checkpoints after 3, 6 and 10 epochs and the last one; nothing is
trained after that; and a second training is repaired within, every five epochs, and goes on from there. All is counted
on unseen data, beside the last checkpoint as it was trained. What was run before is read from `runs/early_repair/`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from problems import PROBLEMS, RUNS, DigitNet, SlashedZeros, interval, markdown, quiet_trainer, start
from torch import Tensor

from lightning_nrl import RepairInTraining, repair

EPOCHS = 15
EARLY = (3, 6, 10)
EVERY = 5
SETTINGS = {"target": PROBLEMS["slashed-zeros"].target, "method": "convex", "verbose": False}
NAMES = {
    "trained": "15 epochs, not repaired",
    **{str(epoch): f"{epoch} epochs, then repaired" for epoch in (*EARLY, EPOCHS)},
    "within": f"repaired within, every {EVERY} epochs",
}


def trained(seed: int, folder: Path, *callbacks: Callback) -> tuple[DigitNet, SlashedZeros]:
    """A network and its data, all with one seed."""
    seed_everything(seed, verbose=False)
    model, data = DigitNet(), SlashedZeros(seed)
    options = {"accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": True}
    quiet_trainer(EPOCHS, *callbacks, **options).fit(model, datamodule=data)
    return model, data


@torch.no_grad()
def right(model: DigitNet, data: SlashedZeros) -> Tensor:
    """`n` bool, which unseen samples it gets right."""
    images, digits, _ = data.data["test"].tensors
    return model.eval()(images).argmax(1) == digits


def run(seed: int) -> dict[str, list[float]]:
    """Of each row: accuracy, share of the slashed zeros that are right, and what is broken and repaired."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        model, data = trained(seed, folder, saved)
        slashed = data.data["test"].tensors[2]
        before = right(model, data)
        found = {"trained": before}
        for epoch in (*EARLY, EPOCHS):
            trainer = quiet_trainer(EPOCHS, accelerator="cpu", default_root_dir=folder)
            path = folder / f"epoch={epoch - 1}.ckpt"
            repair(trainer, model, datamodule=data, ckpt_path=str(path), seed=seed, **SETTINGS)
            found[str(epoch)] = right(model, data)
        within = RepairInTraining(every_n_epochs=EVERY, seed=seed, dirpath=folder / "within", **SETTINGS)
        model, data = trained(seed, folder, within)
        found["within"] = right(model, data)
    return {
        row: [
            float(now.float().mean()),
            float(now[slashed].float().mean()),
            float((before & ~now).sum()),
            float((~before & now).sum()),
        ]
        for row, now in found.items()
    }


def main(seeds: Sequence[int]) -> None:
    folder = RUNS / "early_repair"
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in seeds:
        file = folder / f"{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(run(seed)))
        runs.append(json.loads(file.read_text()))
    last = [one[str(EPOCHS)][0] for one in runs]
    rows = []
    for row, name in NAMES.items():
        columns = list(zip(*(one[row] for one in runs), strict=True))
        signs = [(a > b) - (a < b) for a, b in zip(columns[0], last, strict=True)]
        percent = [interval([100 * value for value in column], ".2f") for column in columns[:2]]
        counts = [f"{fmean(column):.1f}" for column in columns[2:]]
        rows.append([name, *percent, *counts, ", ".join(str(signs.count(sign)) for sign in (1, 0, -1))])
    against = "better, equal, worse than at the end"
    print(markdown(("accuracy, %", "slashed zeros right, %", "broken", "repaired", against), rows))
    earlier = sum(max(one[str(epoch)][0] for epoch in EARLY) > one[str(EPOCHS)][0] for one in runs)
    print(f"\nThe best repaired model is of an earlier checkpoint in {earlier} of {len(runs)} seeds.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=15)
    start()
    torch.set_num_threads(1)
    main(range(parser.parse_args().seeds))
