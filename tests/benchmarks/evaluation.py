"""SampleResults of 10,000 samples against `trainer.validate` on the same data.

Run with `python tests/benchmarks/evaluation.py`.
"""

from __future__ import annotations

import torch
from bench import Validated, compare, milliseconds, quiet_trainer, ratio, show
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl._trainer.loaders import make_source
from lightning_nrl._utils.preserve import preserve
from lightning_nrl.data.targets import Target
from lightning_nrl.evaluation.evaluator import Evaluator


def main() -> None:
    torch.manual_seed(0)
    trainer = quiet_trainer()
    data = TensorDataset(torch.randn(10_000, 1, 28, 28), torch.randint(0, 10, (10_000,)))
    loader = DataLoader(data, batch_size=100)
    layers = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    model = Validated(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)))
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
