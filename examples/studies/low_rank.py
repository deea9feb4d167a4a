"""Repairs trained networks by all weights and by adapters (LoRA); prints a row per repair.

    python -m pip install "lightning_nrl[lora]"
    python examples/studies/low_rank.py                  # three small networks, rank 8
    python examples/studies/low_rank.py ViT --ranks 2 8 --seeds 3
    python examples/studies/low_rank.py vehicles-C       # half an hour

Small networks read the digits of the quickstart, whose later zeros are slashed: a convolutional
network, a ViT with patches of 2 x 2 pixels, and a BERT whose words are the grey levels of pixels.
`state` is the optimizer's, at its largest. `patch` is the file of the change: for adapters the
folder that `PeftModel.from_pretrained` loads. `differ` counts known samples that adapters beside
the old weights predict in another way than merged weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from problems import (
    PROBLEMS,
    DigitNet,
    Problem,
    SlashedZeros,
    Target,
    interval,
    markdown,
    quiet_trainer,
    start,
)
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_nrl import RepairReport, repair
from lightning_nrl.methods import FineTunePolish

SIZE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "num_labels": 10,
}


class Transformer(DigitNet):
    """A network of `transformers` with random weights, trained as `DigitNet` is."""

    def __init__(self, network: nn.Module, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        del self.features, self.classifier
        self.network = network
        self._encode = encode

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self._encode(images)).logits


def grey_levels(images: Tensor) -> Tensor:
    return (16 * images).long().clamp(0, 16).flatten(1)


def vit() -> LightningModule:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **SIZE)
    return Transformer(ViTForImageClassification(config), nn.Identity())


def bert() -> LightningModule:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=17, max_position_embeddings=64, **SIZE)
    return Transformer(BertForSequenceClassification(config), grey_levels)


SMALL: dict[str, Callable[[], LightningModule]] = {"CNN": DigitNet, "ViT": vit, "BERT": bert}
NETWORKS = {name: Problem(SlashedZeros, make, 15, Target.all()) for name, make in SMALL.items()}
NETWORKS["vehicles-C"] = PROBLEMS["vehicles-C"]


class StateSize:
    """Largest size of an optimizer's state, in bytes."""

    def __init__(self) -> None:
        self.largest = 0

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        tensors = [x for state in optimizer.state.values() for x in state.values()]
        n_bytes = sum(x.nbytes for x in tensors if isinstance(x, Tensor))
        self.largest = max(self.largest, n_bytes)


@contextmanager
def measured_state() -> Iterator[StateSize]:
    size = StateSize()
    handle = register_optimizer_step_post_hook(size)
    try:
        yield size
    finally:
        handle.remove()


def trained(problem: Problem, seed: int, epochs: int | None, path: Path) -> None:
    seed_everything(seed, verbose=False)
    trainer = quiet_trainer(epochs or problem.epochs)
    trainer.fit(problem.network(), datamodule=problem.data(seed))
    trainer.save_checkpoint(path)


def megabytes(path: Path) -> float:
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files) / 1e6


def numbers(report: RepairReport, state: StateSize) -> list[float]:
    known, unseen = report.pooled("known"), report.pooled("unseen")
    differ = 0.0
    for step in report.steps:
        if step.name == "adapter":
            differ = float(step.note.split("; ")[1].split(" ")[0])
    files = report.files
    patch = files.get("adapter", files.get("patch"))
    return [
        known.targeted,
        known.repaired_in_target,
        known.broken,
        unseen.repaired,
        unseen.broken,
        100 * unseen.accuracy_before,
        100 * unseen.accuracy_after,
        state.largest / 1e6,
        0.0 if patch is None else megabytes(Path(patch)),
        sum(report.seconds.values()),
        differ,
    ]


HEADS = {
    "targets": ".0f",
    "repaired": ".1f",
    "broken": ".1f",
    "unseen: repaired": ".1f",
    "broken, unseen": ".1f",
    "accuracy before": ".2f",
    "after": ".2f",
    "state, MB": ".2f",
    "patch, MB": ".3f",
    "seconds": ".0f",
    "differ": ".0f",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(SMALL), metavar="NETWORK")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="of the training, by default the network's")
    chosen = parser.parse_args()
    start()
    rows = []
    for name in chosen.networks:
        problem = NETWORKS[name]
        table: dict[str, list[list[float]]] = {}
        for seed in range(chosen.seeds):
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = Path(folder) / "trained.ckpt"
                trained(problem, seed, chosen.epochs, checkpoint)
                for rank in (None, *chosen.ranks):
                    label = f"{name}, all weights" if rank is None else f"{name}, rank {rank}"
                    run = partial(repair, quiet_trainer(), problem.network(), seed=seed)
                    with measured_state() as state:
                        report = run(
                            datamodule=problem.data(seed),
                            ckpt_path=checkpoint,
                            target=problem.target,
                            unseen="test",
                            method=FineTunePolish(lora=rank),
                            dirpath=Path(folder) / label,
                            verbose=False,
                        )
                    table.setdefault(label, []).append(numbers(report, state))
        for label, lines in table.items():
            columns = zip(*lines, strict=True)
            cells = map(interval, columns, HEADS.values())
            rows.append([label, *cells])
    print(markdown(list(HEADS), rows))


if __name__ == "__main__":
    main()
