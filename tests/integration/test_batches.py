"""Batches as they come: of graphs, which cannot be cut, of names, and of what is no batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, quiet_trainer
from graphs import GraphNet, graph_loader
from lightning_package import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_nrl import ConfigurationError, DataOptions, RegressionFreeRepair
from lightning_nrl.errors import RepairError


class GraphClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = GraphNet()

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        return self.net.pooled(x, batch)

    def training_step(self, batch: Any, i: int) -> Tensor:
        return F.cross_entropy(self(batch.x, batch.batch), batch.y)

    def validation_step(self, batch: Any, i: int) -> None:
        right = (self(batch.x, batch.batch).argmax(1) == batch.y).float().mean()
        self.log("accuracy", right, batch_size=len(batch.y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def fitted(path: Path, model: LightningModule, train: Any, val: Any, **arguments: Any) -> Any:
    repair = RegressionFreeRepair(dirpath=path / "repair", **arguments)
    trainer = quiet_trainer(path, repair, max_epochs=3)
    trainer.fit(model, train, val)
    return repair.report, trainer


@pytest.mark.parametrize("method", ["convex", "finetune-polish"])
def test_graphs_are_repaired_and_counted_as_the_module_counts_them(tmp_path, method):
    torch.manual_seed(0)
    model, val = GraphClassifier(), graph_loader(60, seed=2)
    report, trainer = fitted(tmp_path, model, graph_loader(120, seed=1), val, method=method)
    known = report.splits[1]
    measured = trainer.validate(model, val, verbose=False)[0]["accuracy"]
    assert (known.kept + known.repaired) / 60 == pytest.approx(measured)
    assert (report.status, known.broken) == ("repaired", 0)


def test_a_layer_of_nodes_cannot_be_searched_and_that_is_known_before_training(tmp_path):
    graphs = graph_loader(40, seed=1)
    with pytest.raises(RepairError, match=r"`layer='net\.node'`: samples cannot be taken out"):
        fitted(tmp_path, GraphClassifier(), graphs, graphs, method="swarm", layer="net.node")


class Signals(LightningModule):
    """Reads `signal`, of which the default adapter knows nothing."""

    def __init__(self, copies: int = 1) -> None:
        super().__init__()
        self.layer, self.copies = nn.Linear(3, 2), copies

    def forward(self, signal: Tensor) -> Tensor:
        return self.layer(signal.repeat(self.copies, 1))

    def training_step(self, batch: Any, i: int) -> Tensor:
        raise AssertionError("this is found before training")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("copies", "truth", "problem"),
    [
        (1, "grade", "lacks a target key"),
        (2, "y", r"the model returned \[16, 2\] for 8 targets"),
    ],
)
def test_a_batch_that_does_not_fit_is_shown(tmp_path, copies, truth, problem):
    data = DataLoader([{"signal": torch.zeros(3), truth: 1}] * 20, 8)
    message = (
        rf"{problem}[\s\S]*signal: float32 \[8, 3\][\s\S]*HINT: [\s\S]*\(batch\['signal'\],\), {{}}"
    )
    with pytest.raises(ConfigurationError, match=message):
        fitted(tmp_path, Signals(copies), data, data)


class WithMetadata(Tensor):
    """Keeps its class in every operation and takes sizes as MONAI's `MetaTensor` does."""

    def new_empty(self, size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        plain = self.as_subclass(Tensor).new_empty(size=size, dtype=dtype, device=device)
        return plain.as_subclass(WithMetadata)


def with_metadata(batch: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [x.as_subclass(WithMetadata) for x in default_collate(batch)]


def test_tensors_with_metadata_are_repaired_as_plain_ones(tmp_path):
    def report(collate: Any) -> Any:
        data = Digits()
        train, val = (DataLoader(x, 64, collate_fn=collate) for x in (data.train, data.repair))
        torch.manual_seed(0)
        made, _ = fitted(
            tmp_path, Classifier(), train, val, method="convex", reference=Classifier()
        )
        return [(split.split, split.repaired_ids, split.kept) for split in made.splits]

    assert report(with_metadata) == report(default_collate)


class Labelled(Tensor):
    """Has names of its columns, without which it cannot be copied, as pina's `LabelTensor`."""

    labels: list[str]

    def clone(self, **options: Any) -> Labelled:
        copied = super().clone(**options).as_subclass(Labelled)
        copied.labels = list(self.labels)
        return copied


class Labelling(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(3).as_subclass(Labelled))
        self.points = {"inside": torch.zeros(3).as_subclass(Labelled)}

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.as_subclass(Labelled))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).as_subclass(Tensor)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_tensors_that_cannot_be_copied_without_their_attributes(tmp_path):
    data = Digits()
    train, val = DataLoader(data.train, 64), DataLoader(data.repair, 64)
    report, _ = fitted(tmp_path, Labelling(), train, val, method="finetune-polish")
    assert report.status == "repaired"
    assert Path(report.files["patch"]).exists()


class Fields(dict[str, Any]):
    """A batch as pina's, whose tensors torch's `tree_map` does not find."""


def test_labels_of_such_tensors_in_a_mapping_of_its_own(tmp_path):
    def labelled(rows: Any) -> Fields:
        x, y, _ = default_collate(rows)
        return Fields(x=x, y=y.as_subclass(Labelled))

    def predict(module: Any, batch: Fields) -> Any:
        return module(batch["x"]), batch["y"]

    class OfFields(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["x"]), batch["y"].as_subclass(Tensor))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    digits = Digits()
    loaders = [DataLoader(part, 64, collate_fn=labelled) for part in (digits.train, digits.repair)]
    data = DataOptions(adapter=predict)
    report, _ = fitted(tmp_path, OfFields(), *loaders, data=data, method="convex")
    assert report.status == "repaired"


class OwnTransfer(Digits):
    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        return [x.to(device) for x in (batch[0], batch[1], batch[2])]


def test_loaders_that_the_data_module_cannot_transfer_are_refused(tmp_path):
    data = OwnTransfer()
    given = DataLoader(TensorDataset(*data.repair.tensors[:2]), 64)
    repair = RegressionFreeRepair(data=DataOptions(failed=given))
    problem = r"`transfer_batch_to_device` raised IndexError[\s\S]*\[1\]: int64 \[64\][\s\S]*HINT"
    with pytest.raises(ConfigurationError, match=problem):
        quiet_trainer(tmp_path, repair, max_epochs=1).fit(Classifier(), datamodule=data)
