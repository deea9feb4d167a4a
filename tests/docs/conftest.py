"""What the pages take for granted: a project with a trained model, data, checkpoints and a package
of functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from shutil import copytree
from types import ModuleType
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import lightning_nrl

CAMERA = """\
def camera(batch): return ["left" if place % 2 else "right" for place in batch[2].tolist()]
"""
MODULES = {
    "targets": "def is_occluded(batch): return batch[2] > 0\n",
    "slices": CAMERA,
    "data": CAMERA
    + "def weight(batch): return batch[2] + 1.0\ndef position(batch): return batch[2]\n",
    "adapters": "def predict(module, batch): return module(batch[0]), batch[1]\n",
    "rules": "def is_safe(output, target): return output.argmax(1) == target\n"
    "def cost(output, target): return (output.argmax(1) != target).float()\n",
}


SMALL: dict[str, dict[str, Any]] = {
    "repair": {"max_time": 1.0, "verbose": False},
    "compare": {"max_time": 0.5, "methods": ["convex", "fine-tuning"]},
    "sweep": {"method": lightning_nrl.ParticleSwarm(particles=4, iterations=2)},
}
"""Arguments of functions where a page does not say anything else."""
QUICKEST = {"method": "convex"}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
REPAIR = lightning_nrl.repair


def is_rare(batch: Any) -> torch.Tensor:
    return batch[2] % 3 == 0


@cache
def classes(package: Any) -> tuple[type, type]:
    """A module and a data module, of one of Lightning's packages."""

    class Data(package.LightningDataModule):
        """Digits; the third column of a batch counts the samples, so that it is a column of any
        kind.
        """

        def setup(self, stage: str) -> None:
            images, labels = load_digits(return_X_y=True)
            data = (
                torch.tensor(images[:700], dtype=torch.float32) / 16,
                torch.tensor(labels[:700]),
                torch.arange(700),
            )
            self.parts = [
                TensorDataset(*(part[first : first + n] for part in data))
                for first, n in ((0, 300), (300, 150), (450, 100), (550, 150))
            ]

        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.parts[0], batch_size=50, shuffle=True)

        def repair_dataloader(self) -> DataLoader:
            return DataLoader(self.parts[1], batch_size=50)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(self.parts[2], batch_size=50)

        def test_dataloader(self) -> DataLoader:
            return DataLoader(self.parts[3], batch_size=50)

    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
            self.classifier = nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.encoder(x))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=3e-3)

    return Net, Data


def quick(kind: type) -> type:
    """A Trainer as the pages use it, but with few epochs, on a CPU, and without a bar."""

    def start(self: Any, *arguments: Any, **named: Any) -> None:
        given = {"enable_progress_bar": False, "enable_model_summary": False, "devices": 1, **named}
        epochs = min(given.get("max_epochs") or 2, 2)
        kind.__init__(self, *arguments, **{**given, "max_epochs": epochs, "accelerator": "cpu"})

    return type("Trainer", (kind,), {"__init__": start})


def quickest(named: dict[str, Any]) -> dict[str, Any]:
    """The method that takes least, where a page asks for nothing that only others can do."""
    return (
        {}
        if {"reference", "task", "layer", "callback", "search", "settings", "methods"} & set(named)
        else QUICKEST
    )


def with_defaults(function: Any, **defaults: Any) -> Any:
    """Pages leave things out; here they are small. A page's ten seeds are one."""

    def call(*arguments: Any, **named: Any) -> Any:
        given = {**(quickest(named) if function is REPAIR else {}), **defaults, **named}
        if function is REPAIR and "method" in given and "max_time" not in named:
            given["max_time"] = 20.0  # a method that ends by itself, also on a busy machine
        return function(*arguments, **{**given, **({"seeds": 1} if "seeds" in given else {})})

    return call


class QuickRepair(lightning_nrl.RegressionFreeRepair):
    """A callback that takes a second, not as long as the fit took."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**{"max_time": 1.0, "verbose": False, **quickest(named), **named})


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that pages name; made once."""
    folder = tmp_path_factory.mktemp("project")
    Net, Data = classes(lightning)
    package = folder / "my_project"
    package.mkdir()
    (package / "__init__.py").write_text("def is_dark(batch): return batch[0].mean(1) > 0.3\n")
    for name, text in MODULES.items():
        (package / f"{name}.py").write_text(text)
    (folder / "suite.csv").write_text("split,id\ntest,4\n")
    for seed, names in enumerate((("old.ckpt", "best.ckpt"), ("new.ckpt", "retrained.ckpt"))):
        lightning.seed_everything(seed, verbose=False)
        trainer = lightning.Trainer(max_epochs=4, enable_checkpointing=False, **QUIET)
        trainer.fit(Net(), datamodule=Data())
        for name in names:
            trainer.save_checkpoint(folder / name)
    lightning_nrl.repair(
        lightning.Trainer(**QUIET),
        Net(),
        datamodule=Data(),
        ckpt_path=folder / "best.ckpt",
        method="convex",
        dirpath=folder / "lightning_logs/version_0/repair",
        verbose=False,
    )
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the project as the working folder."""
    copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_project"]:
        del sys.modules[name]


@pytest.fixture
def project(folder: Path, monkeypatch: pytest.MonkeyPatch, page: Path) -> dict[str, Any]:
    """The names that pages take for granted, in a folder of the page's own."""
    text = page.read_text(encoding="utf-8")
    package = pytorch_lightning if "import pytorch_lightning as L" in text else lightning
    if ".plot(" not in text:  # figures take longer than all else
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    Net, Data = classes(package)
    monkeypatch.setitem(sys.modules, "page", ModuleType("page"))
    for one in (lightning, pytorch_lightning):
        monkeypatch.setattr(one, "Trainer", quick(one.Trainer))
    small = {
        name: with_defaults(getattr(lightning_nrl, name), **defaults)
        for name, defaults in SMALL.items()
    }
    for name, value in {**small, "RegressionFreeRepair": QuickRepair}.items():
        monkeypatch.setattr(lightning_nrl, name, value)
    models = [Net(), Net()]
    for model in models:
        model.load_state_dict(torch.load("best.ckpt", weights_only=True)["state_dict"])
    data = Data()
    data.setup("fit")
    x, y, _ = data.parts[3].tensors
    return {
        "__name__": "page",
        **{name: getattr(lightning_nrl, name) for name in lightning_nrl.__all__},
        "L": package,
        "torch": torch,
        "nn": nn,
        "DataLoader": DataLoader,
        "ConcatDataset": ConcatDataset,
        **dict.fromkeys(("model", "module", "old"), models[0]),
        **dict.fromkeys(("new_model", "new"), models[1]),
        "Model": Net,
        "dm": Data(),
        "train": data.train_dataloader(),
        "val": data.val_dataloader(),
        "x": x,
        "y": y,
        "is_rare": is_rare,
    }
