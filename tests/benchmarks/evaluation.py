"""SampleResults of 10,000 samples against `trainer.validate` on the same data.

Run with `python tests/benchmarks/evaluation.py`.
"""

from __future__ import annotations

import logging
import warnings

import torch
from bench import compare, milliseconds, ratio, show
from lightning_package import pl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl._trainer.loaders import make_source
from lightning_nrl._utils.preserve import preserve
from lightning_nrl.data.targets import Target
from lightning_nrl.evaluation.evaluator import Evaluator


class Classifier(pl.LightningModule):
    """A small convolutional network with the least validation step there is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        logits = self(batch[0])
        self.log("loss", F.cross_entropy(logits, batch[1]))
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data = TensorDataset(torch.randn(10_000, 1, 28, 28), torch.randint(0, 10, (10_000,)))
    loader = DataLoader(data, batch_size=100)
    model = Classifier()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(model, loader, verbose=False)

    def evaluate() -> None:
        source = make_source(loader, "val", trainer=trainer, model=model, passed=True, failed=True)
        with preserve(model):
            Evaluator(model).run([source], Target.label(3))

    validated, evaluated = compare([lambda: trainer.validate(model, loader, verbose=False), evaluate])
    row = [milliseconds(validated), milliseconds(evaluated), f"{ratio(evaluated, validated):.2f}"]
    show("SampleResults of 10,000 samples", ["trainer.validate", "Evaluator.run", "ratio"], [row])


if __name__ == "__main__":
    main()
