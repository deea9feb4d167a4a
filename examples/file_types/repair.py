"""Repairs Magika, a deployed classifier of files: Octave files that it takes for Julia.

    python -m pip install -e ".[plots]" --group file_types
    python examples/file_types/collect.py     # downloads packages into `packages/`
    python examples/file_types/repair.py      # repairs the last layer

Known are the files of one half of the packages, unseen those of the other half. The repaired
weights are written into the ONNX file, and onnxruntime counts all files again.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from classifier import LABEL_INDEX, LABELS, MODEL, Magika
from files import PackageFiles, beginning, package
from lightning.pytorch import seed_everything
from matplotlib.figure import Figure
from onnxruntime import InferenceSession
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parents[1]))
from output import quiet_trainer, start, summary
from rich import box, print
from rich.table import Table

from lightning_nrl import DataOptions, RepairReport, SampleOptions, Target, repair
from lightning_nrl.release import recount
from lightning_nrl.updates import Predictions

LARGE_DIFFERENCE = 1e-4  # of probabilities
OCTAVE, JULIA = LABEL_INDEX["matlab"], LABEL_INDEX["julia"]


def torch_outputs(network: Magika, data: PackageFiles) -> dict[str, Tensor]:
    """Returns the probabilities of the labels (n x 214) of each split."""
    network.eval()
    with torch.inference_mode():
        return {
            split: torch.cat([network(batch[0]).softmax(1) for batch in DataLoader(samples, 128)])
            for split, samples in data.data.items()
        }


def onnx_outputs(path: Path, data: PackageFiles) -> dict[str, Tensor]:
    """Returns the same by onnxruntime."""
    session = InferenceSession(str(path))
    return {
        split: torch.cat(
            [
                torch.tensor(session.run(None, {"bytes": batch[0].int().numpy()})[0])
                for batch in DataLoader(samples, 128)
            ]
        )
        for split, samples in data.data.items()
    }


@dataclass(frozen=True)
class Agreement:
    """Outputs of a network and of its ONNX file for all files of the data, by split."""

    network: dict[str, Tensor]
    deployed: dict[str, Tensor]

    @classmethod
    def measure(cls, network: Magika, path: Path, data: PackageFiles) -> Agreement:
        return cls(torch_outputs(network, data), onnx_outputs(path, data))

    def predictions(self) -> dict[str, Tensor]:
        """Returns the predictions of the ONNX file."""
        return {split: outputs.argmax(1) for split, outputs in self.deployed.items()}

    def row(self, split: str, labels: Tensor) -> tuple[str, ...]:
        """Counts a split as the table shows it."""
        first, second = self.network[split], self.deployed[split]
        difference = (first - second).abs().amax(1)
        counts = (
            len(labels),
            (first.argmax(1) == labels).sum(),
            (second.argmax(1) == labels).sum(),
            (first.argmax(1) != second.argmax(1)).sum(),
        )
        return (
            *(f"{count:,}" for count in counts),
            f"{difference.max():.1e}",
            str(int((difference > LARGE_DIFFERENCE).sum())),
        )


def agreement_table(data: PackageFiles, **agreements: Agreement) -> Table:
    """Tabulates how far PyTorch and onnxruntime agree."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("")
    for head in (
        "\nfiles",
        "right by\nPyTorch",
        "by onnx-\nruntime",
        "predictions\nthat differ",
        "largest\ndifference",
        f"files above\n{LARGE_DIFFERENCE}",
    ):
        table.add_column(head, justify="right")
    for name, agreement in agreements.items():
        for split, samples in data.data.items():
            table.add_row(f"{name}, {split}", *agreement.row(split, samples.tensors[1]))
    return table


def draw(
    before: dict[str, Tensor], after: dict[str, Tensor], data: PackageFiles, path: Path
) -> None:
    """Draws the predictions of unseen Octave files before and after the repair."""
    octave = data.data["test"].tensors[1] == OCTAVE
    counts = [Counter(predicted["test"][octave].tolist()) for predicted in (before, after)]
    shown = [label for label, _ in counts[0].most_common(9)][::-1]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for offset, count, name in zip((0.2, -0.2), counts, ("before", "after"), strict=True):
        places = [place + offset for place in range(len(shown))]
        bars = axes.barh(places, [count[label] for label in shown], 0.4, label=name)
        axes.bar_label(bars, padding=2, fontsize=8)
    axes.set_yticks(range(len(shown)), [LABELS[label] for label in shown])
    axes.set_xlabel(f"{octave.sum()} unseen Octave files, by Magika's prediction")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def recounted(report: RepairReport, after: dict[str, Tensor], data: PackageFiles) -> str:
    """Says if the promise holds for onnxruntime's predictions of the known files."""
    passed = (after["train"] == data.data["train"].tensors[1]).int().tolist()
    lines = [f"train,{i},{value}\n" for i, value in enumerate(passed)]
    path = Path("onnx_predictions.csv")
    path.write_text("split,id,passed\n" + "".join(lines))
    return recount(report, Predictions.read(path)).reason


if __name__ == "__main__":
    given = start(
        __doc__,
        packages={"nargs": "?", "default": "packages", "help": "folder of collect.py"},
        **{"--figure": {"default": "magika.svg", "help": "where to draw the predictions"}},
    )
    seed_everything(0, verbose=False)
    data = PackageFiles(given.packages, most_of_a_kind=2 if given.fast else 20)
    before = Agreement.measure(Magika(), MODEL, data)

    network = Magika()
    report = repair(
        quiet_trainer(),
        network,
        datamodule=data,
        target=Target.confusion(OCTAVE, JULIA),
        layer="classifier",
        samples=SampleOptions(groups=package),
        data=DataOptions(render=beginning),
        unseen="test",
        verbose=False,
    )
    print(summary(repair=report))
    print(f"The repair took {sum(report.seconds.values()):.0f} s.")

    path = Path("repaired.onnx")
    network.write(str(path))
    after = Agreement.measure(network, path, data)
    print(agreement_table(data, before=before, after=after))
    print(f"{path}: {recounted(report, after.predictions(), data)}")
    draw(before.predictions(), after.predictions(), data, Path(given.figure))
