"""Time of a validation with `RegressionMetrics` against one without. 27 convolutions, 1,024 images of 32 x 32 pixels.

One trainer validates in turn with and without the callback, once the replaced model was asked.
Run with `python tests/benchmarks/monitoring.py`.
"""

from __future__ import annotations

import logging
import time
import warnings

import torch
from bench import ResNet27, milliseconds, ratio, show
from lightning_package import pl
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import RegressionMetrics

PAIRS = 9


class Classifier(pl.LightningModule):
    """The least validation step there is; training does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet27()
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        return None

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        logits = self(batch[0])
        self.log("loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Every(RegressionMetrics):
    """Is there in every other validation, and takes processor time of each from its first hook to its last one."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on = trainer.current_epoch % 2 == 0
        self.began = time.process_time()
        if self.on:
            super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.seconds[self.on].append(time.process_time() - self.began)


def measured(slices: bool, batch: int) -> list[str]:
    data = TensorDataset(torch.randn(1024, 3, 32, 32), torch.randint(0, 7, (1024,)))
    model, loader = Classifier(), DataLoader(data, batch_size=batch)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2 * PAIRS + 2,
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Every(ResNet27().eval(), slices=(lambda b: b[1]) if slices else None)],
    )
    trainer.fit(model, DataLoader(data, batch_size=1024), loader)
    ours, plain = (model.seconds[on][1:] for on in (True, False))  # one warm-up each
    return [f"{batch}", "7" if slices else "none", milliseconds(plain), milliseconds(ours), f"{ratio(ours, plain):.3f}"]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    header = ["batch", "slices", "validation", "with RegressionMetrics", "ratio"]
    rows = [measured(slices, batch) for slices, batch in ((False, 128), (True, 128), (True, 16))]
    show(f"A validation of 1,024 images, medians of {PAIRS} pairs", header, rows)


if __name__ == "__main__":
    main()
