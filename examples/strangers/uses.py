"""What the scripts in this folder have in common: small data, four uses of one module, and an independent count.

A script says how its module and its data are made, as the module's own documentation does, and what else is needed
(`Project`). `main` then runs the four uses and prints a line for each. Right samples are counted a second time by
`trainer.validate`, with the metric that the module itself logs, or in the way that the project says.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl import RegressionFreeRepair, RegressionMetrics, diagnose, repair

TRAINED_SAMPLES, VALIDATED_SAMPLES = 400, 200


def digits(size: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Handwritten digits of scikit-learn, `n x 1 x size x size` and their classes, for `train` and `val`."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images[order], dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target[order])
    if size != 8:
        images = F.interpolate(images, size)
    val = slice(TRAINED_SAMPLES, TRAINED_SAMPLES + VALIDATED_SAMPLES)
    return {
        "train": (images[:TRAINED_SAMPLES], labels[:TRAINED_SAMPLES]),
        "val": (images[val], labels[val]),
    }


@dataclass(frozen=True)
class Project:
    """A module of somebody else, with data.

    Attributes:
        package: the name under which the module's package is installed.
        lightning: `lightning.pytorch` or `pytorch_lightning`, whichever the module is of.
        make_module: a new module, with new weights.
        make_data: a data module, or loaders of training and validation data.
        metric: what the module logs as its validation accuracy, a share of `n_validated` samples.
        n_validated: the number of validation samples.
        epochs: how long it is trained; the old model of an update for half of them.
        options: arguments of `RegressionFreeRepair`, `repair` and `diagnose` that this module needs.
        counting: arguments of `RegressionMetrics` that it needs.
        weights_only: False if its checkpoints hold objects.
        trainer_options: arguments of the Trainer that it needs.
        count: counts right validation samples where `metric` is not their share.
    """

    package: str
    lightning: ModuleType
    make_module: Callable[[], Any]
    make_data: Callable[[], Any]
    metric: str = "val_accuracy"
    n_validated: int = VALIDATED_SAMPLES
    epochs: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    counting: Mapping[str, Any] = field(default_factory=dict)
    weights_only: bool = True
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    count: Callable[[Any, Any, Any], int] | None = None

    def trainer(self, folder: Path, callbacks: list[Any] | None = None, **arguments: Any) -> Any:
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return self.lightning.Trainer(
            default_root_dir=folder,
            callbacks=callbacks,
            **{**options, "max_epochs": self.epochs, **arguments, **self.trainer_options},
        )

    def data(self) -> dict[str, Any]:
        data = self.make_data()
        if isinstance(data, self.lightning.LightningDataModule):
            return {"datamodule": data}
        return dict(zip(("train_dataloaders", "val_dataloaders"), data, strict=True))

    def module(self, seed: int = 0) -> Any:
        self.lightning.seed_everything(seed, verbose=False)
        return self.make_module()

    def loaded(self, path: str | Path) -> Any:
        """The module with the weights of a checkpoint."""
        module = self.module()
        module.load_state_dict(torch.load(path, weights_only=self.weights_only)["state_dict"])
        return module

    def right(self, path: str | Path, folder: Path) -> int:
        """Validation samples that a checkpoint has right, as the module itself counts them."""
        module, trainer, data = self.loaded(path), self.trainer(folder), self.data()
        if self.count is not None:
            return self.count(trainer, module, data)
        loaders = {"dataloaders": data["val_dataloaders"]} if "val_dataloaders" in data else data
        trainer.validate(module, **loaders, verbose=False)
        return round(float(trainer.callback_metrics[self.metric]) * self.n_validated)


def main(description: str | None, project: Callable[[], Project]) -> None:
    """Runs the uses of one project and prints a line each; a use that fails is printed too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--max_time", type=float, default=20, help="seconds for each repair (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print the report of each repair, and errors in full")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    it = project()
    print(f"{it.package} {metadata.version(it.package)}, {it.lightning.__name__} {it.lightning.__version__}")
    options = {**it.options, "max_time": arguments.max_time, "verbose": arguments.verbose}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        old, trained = folder / "old.ckpt", folder / "trained.ckpt"
        for path, seed, epochs in ((old, 1, max(1, it.epochs // 2)), (trained, 0, it.epochs)):
            trainer = it.trainer(folder / path.stem, max_epochs=epochs)
            trainer.fit(it.module(seed), **it.data())
            trainer.save_checkpoint(path)

        def fit() -> str:
            """The callback in a training, and nothing else."""
            callback = RegressionFreeRepair(**options, dirpath=folder / "fit" / "repair")
            trainer = it.trainer(folder / "fit", [callback])
            trainer.fit(it.module(), **it.data())
            return counted(it, folder, callback.report, trainer.checkpoint_callback.best_model_path)

        def checkpoint() -> str:
            """The same of a checkpoint, without training."""
            trainer = it.trainer(folder / "repair")
            loading = {"ckpt_path": trained, "weights_only": it.weights_only}
            report = repair(trainer, it.module(), **it.data(), **loading, **options, dirpath=folder / "repair")
            return counted(it, folder, report, trained)

        def update() -> str:
            """A new model in the place of an old one: regressions counted while it trains, and repaired."""
            replaced = old if it.weights_only else it.loaded(old)
            metrics = RegressionMetrics(replaced, **it.counting)
            callback = RegressionFreeRepair(reference=replaced, **options, dirpath=folder / "update" / "repair")
            trainer = it.trainer(folder / "update", [metrics, callback])
            trainer.fit(it.module(), **it.data())
            logged = round(float(trainer.callback_metrics["regression/reference_accuracy"]) * it.n_validated)
            replaced_right = it.right(old, folder)
            line = counted(it, folder, callback.report, trainer.checkpoint_callback.best_model_path)
            known = next(split for split in callback.report.update if split.split == "val")
            regressions = round(float(trainer.callback_metrics["regression/broken"]))
            agree = logged == replaced_right and regressions == known.trained.broken
            return f"{line}; old model {logged} right, {regressions} regressions: {'agrees' if agree else 'DIFFERS'}"

        def diagnosis() -> str:
            """What can be repaired, before any repair."""
            loading = {"ckpt_path": trained, "weights_only": it.weights_only}
            found = diagnose(it.trainer(folder / "diagnose"), it.module(), **it.data(), **loading, **options)
            agree = found.known["targeted"] == it.n_validated - it.right(trained, folder)
            judged = found.count("yes") + found.count("no")
            fixable = f"{found.count('yes')} of {judged} that could be judged" if judged else "cannot be judged"
            return f"{found.known['targeted']} failures: {'agrees' if agree else 'DIFFERS'}; can be fixed: {fixable}"

        for name, use in (("fit", fit), ("repair", checkpoint), ("update", update), ("diagnose", diagnosis)):
            started = time.perf_counter()
            try:
                line = use()
            except Exception as error:  # a use that fails is a row of the table
                if arguments.verbose:
                    traceback.print_exc()
                line = f"FAILS {type(error).__name__}: {error}"
            print(f"  {name:8} {line} ({time.perf_counter() - started:.0f} s)", flush=True)


def counted(project: Project, folder: Path, report: Any, before: str | Path) -> str:
    """Targets repaired and samples broken as the report says, and both counts of right validation samples."""
    val = next(split for split in report.splits if split.split == "val")
    known = [split for split in report.splits if split.role == "known"]
    broken, repaired = (sum(getattr(split, name) for split in known) for name in ("broken", "repaired_in_target"))
    ours = val.passed, val.kept + val.repaired
    after = report.files.get("checkpoint") or before
    own = project.right(before, folder), project.right(after, folder)
    return (
        f"{report.status}, {repaired} of {sum(split.targeted for split in known)} targets, {broken} broken; "
        f"right of {val.n}: {ours[0]} -> {ours[1]}, its own validation {own[0]} -> {own[1]}: "
        f"{'agrees' if ours == own else 'DIFFERS'}"
    )
