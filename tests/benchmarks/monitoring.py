"""Time of a validation with `RegressionMetrics` against one without. 27 convolutions, 1,024 images of 32 x 32 pixels.

One trainer validates in turn with and without the callback, once the replaced model was asked.
Run with `python tests/benchmarks/monitoring.py`.
"""

from __future__ import annotations

import time

import torch
from bench import ResNet27, Validated, milliseconds, quiet_trainer, ratio, show
from lightning_package import pl
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import RegressionMetrics

PAIRS = 9


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
    model = Validated(ResNet27())
    every = Every(ResNet27().eval(), slices=(lambda b: b[1]) if slices else None)
    trainer = quiet_trainer(max_epochs=2 * PAIRS + 2, num_sanity_val_steps=0, callbacks=[every])
    trainer.fit(model, DataLoader(data, batch_size=1024), DataLoader(data, batch_size=batch))
    ours, plain = (model.seconds[on][1:] for on in (True, False))  # one warm-up each
    return [f"{batch}", "7" if slices else "none", milliseconds(plain), milliseconds(ours), f"{ratio(ours, plain):.3f}"]


def main() -> None:
    torch.manual_seed(0)
    header = ["batch", "slices", "validation", "with RegressionMetrics", "ratio"]
    rows = [measured(slices, batch) for slices, batch in ((False, 128), (True, 128), (True, 16))]
    show(f"A validation of 1,024 images, medians of {PAIRS} pairs", header, rows)


if __name__ == "__main__":
    main()
