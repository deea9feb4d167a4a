"""The default settings and a swarm alone beside rows of the paper's Table II: Fashion-MNIST with drift, EXP-C in small.

    python examples/studies/paper_rows.py            # ten runs a setting, as in the paper
    python examples/studies/paper_rows.py --runs 5
    python examples/studies/paper_rows.py --quick    # two runs a setting, on a network of a shorter training
    python examples/studies/paper_rows.py --settings swarm EXP-C1    # without the default, which may train on

The network is trained once and kept in `runs/`. The failures to be repaired are those of upside-down garments.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from statistics import mean

from fashion_mnist import DriftingFashion, FashionNet
from lightning.pytorch import Trainer, seed_everything
from rich import box, print
from rich.progress import track
from rich.table import Table

from lightning_nrl import RepairReport, Target, repair
from lightning_nrl.presets import paper_arguments

ANY = {"gate": "tolerance:100%"}  # the paper has no gate: what its settings give is taken, whatever it breaks
SETTINGS = {
    "default": {},
    "swarm": {"method": "swarm"},
    "EXP-B1": paper_arguments("EXP-B1") | ANY,
    "EXP-C1": paper_arguments("EXP-C1") | ANY,
}


def trained(data: DriftingFashion, epochs: int) -> Path:
    """The checkpoint of the network to be repaired; trained if there is none yet."""
    path = Path("runs") / f"fashion_{epochs}_epochs.ckpt"
    if not path.exists():
        seed_everything(0, verbose=False)
        trainer = Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False)
        trainer.fit(FashionNet(), datamodule=data)
        trainer.save_checkpoint(path)
    return path


def repaired(data: DriftingFashion, checkpoint: Path, seed: int, **setting: object) -> RepairReport:
    """One run of one setting; the seed is that of the repair, data and network stay the same."""
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return repair(
        trainer,
        FashionNet(),
        datamodule=data,
        ckpt_path=checkpoint,
        target=Target.where(lambda batch: batch[2], name="upside down"),
        unseen="test",
        seed=seed,
        dirpath="runs/paper_rows",
        verbose=False,
        **setting,
    )


def table_of(reports: dict[str, list[RepairReport]]) -> Table:
    """Means over the runs of each setting, and how many of them changed the weights without breaking known samples."""
    first = next(iter(reports.values()))
    known, unseen = (first[0].pooled(role) for role in ("known", "unseen"))
    table = Table(
        title=f"Means of {len(first)} runs",
        caption=f"known: {known.targeted} to be repaired, {known.passed} passed; unseen: {unseen.passed} passed, "
        f"{unseen.passed_in_target} of them in the target;\nclean: something repaired and nothing known broken",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    heads = ("setting", "known:\nrepaired", "\nbroken", "unseen:\nrepaired", "\nbroken", "of the\ntarget")
    for head in (*heads, "accuracy:\nuntouched", "\nrepaired", "\nclean"):
        table.add_column(head, justify="right")
    for setting, runs in reports.items():
        known, unseen = ([run.pooled(role) for run in runs] for role in ("known", "unseen"))
        counts = (
            mean(split.repaired_in_target for split in known),
            mean(split.broken for split in known),
            mean(split.repaired for split in unseen),
            mean(split.broken for split in unseen),
            mean(split.broken_in_target for split in unseen),
        )
        accuracies = (mean(split.accuracy_before for split in unseen), mean(split.accuracy_after for split in unseen))
        clean = sum(run.status == "repaired" and split.broken == 0 for run, split in zip(runs, known, strict=True))
        table.add_row(
            setting, *(f"{x:.1f}" for x in counts), *(f"{x:.4f}" for x in accuracies), f"{clean} of {len(runs)}"
        )
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="repairs of each setting, from seed 0")
    parser.add_argument("--quick", action="store_true", help="two runs on a network that was trained for less long")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which to run")
    arguments = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    data = DriftingFashion()
    checkpoint = trained(data, epochs=6 if arguments.quick else 20)
    seeds = range(2 if arguments.quick else arguments.runs)
    runs = [(name, seed) for name in arguments.settings for seed in seeds]
    reports: dict[str, list[RepairReport]] = {name: [] for name in arguments.settings}
    for name, seed in track(runs, description="Repairing"):
        reports[name].append(repaired(data, checkpoint, seed, **SETTINGS[name]))
    print(table_of(reports))
