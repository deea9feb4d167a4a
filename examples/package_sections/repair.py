"""Repairs MiniLM, a text encoder: packages that it sorts into a wrong section.

    python -m pip install -e ".[lora,plots]" --group package_sections
    python examples/package_sections/repair.py      # trains and repairs, half an hour

Fine-tunes MiniLM on descriptions of Debian's packages (`apt-cache dumpavail`, needs `apt-get
update`) and repairs what it gets wrong among later ones: by its last layer, by adapters (LoRA), and
by all weights. Each repair has a process of its own, whose largest memory is shown.
"""

from __future__ import annotations

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from classifier import SectionClassifier
from descriptions import SIZES, PackageDescriptions
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1]))
from output import quiet_trainer, start
from rich import box, print
from rich.table import Table

from lightning_nrl import DataOptions, RepairReport, repair

REPAIRS = {
    "last layer": {"layer": "classifier"},
    "adapters": {"lora": 8},
    "all weights": {},
}
CHECKPOINT = Path("sections.ckpt")


def train(data: PackageDescriptions) -> float:
    """Fine-tunes MiniLM for two epochs, saves it, and returns its accuracy on `test`."""
    seed_everything(0, verbose=False)
    model, trainer = SectionClassifier(len(data.sections)), quiet_trainer(2)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(CHECKPOINT)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    return metrics["accuracy"]


def repaired(name: str, sizes: dict[str, int], max_time: float) -> tuple[RepairReport, float]:
    """Repairs the checkpoint and returns the report and the largest memory in MB."""
    data = PackageDescriptions(sizes)
    report = repair(
        quiet_trainer(2),
        SectionClassifier(len(data.sections)),
        datamodule=data,
        ckpt_path=CHECKPOINT,
        unseen="test",
        data=DataOptions(render=data.text),
        max_time=max_time,
        verbose=False,
        **REPAIRS[name],
    )
    return report, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def results_table(results: dict[str, tuple[RepairReport, float]]) -> Table:
    """Tabulates the counts of each repair, and what it took."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    for head in (
        "known targets\nrepaired",
        "known\nbroken",
        "unseen repaired\n: broken",
        "points",
        "passes",
        "seconds",
        "memory,\nMB",
    ):
        table.add_column(head, justify="right")
    for name, (report, megabytes) in results.items():
        known, unseen = report.pooled("known"), report.pooled("unseen")
        table.add_row(
            name,
            f"{known.repaired_in_target} of {known.targeted}",
            f"{known.broken} of {known.passed}",
            f"{unseen.repaired} : {unseen.broken}",
            f"{100 * (unseen.accuracy_after - unseen.accuracy_before):+.2f}",
            f"{sum(report.passes.values()):.1f}",
            f"{sum(report.seconds.values()):.0f}",
            f"{megabytes:,.0f}",
        )
    return table


def draw(results: dict[str, tuple[RepairReport, float]], path: Path) -> None:
    """Draws unseen packages repaired and broken by each repair."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    unseen = [report.pooled("unseen") for report, _ in results.values()]
    for offset, colour, name in ((-0.2, "#005a44", "repaired"), (0.2, "#d55e00", "broken")):
        places = [place + offset for place in range(len(unseen))]
        counts = [getattr(split, name) for split in unseen]
        bars = axes.barh(places, counts, 0.4, color=colour, label=name)
        axes.bar_label(bars, padding=2, fontsize=8)
    axes.set_yticks(range(len(unseen)), list(results))
    axes.invert_yaxis()
    axes.set_xlabel(f"unseen packages, of {unseen[0].n:,}")
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    given = start(
        __doc__,
        **{
            "--figure": {"default": "sections.svg", "help": "where to draw the counts"},
            "--max-time": {"type": float, "default": 600.0, "help": "seconds for each repair"},
        },
    )
    sizes, max_time = SIZES, given.max_time
    if given.fast:
        sizes, max_time = dict.fromkeys(SIZES, 200), 20.0
    data = PackageDescriptions(sizes)
    print(f"{len(data.sections)} sections; sha256 of all descriptions: {data.digest}")
    print(f"Accuracy after fine-tuning: {train(data):.2%}")
    results = {}
    for name in REPAIRS:
        with ProcessPoolExecutor(1, get_context("spawn"), start, (__doc__,)) as pool:
            results[name] = pool.submit(repaired, name, sizes, max_time).result()
    print(results_table(results))
    draw(results, Path(given.figure))
