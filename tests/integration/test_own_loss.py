"""A module's own loss says which output has the logits and where the labels are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import quick_repair, quiet_trainer
from lightning_package import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import DataOptions, RegressionFreeRepair, ReleaseGate, compare, repair
from lightning_nrl.callbacks import PositiveCongruentTraining, RegressionMetrics
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.tasks import NamedHead

Loss = Callable[[Any, list[Tensor]], Tensor]


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss without one of torch's functions."""
    return -logits.log_softmax(1).gather(1, labels[:, None]).sigmoid().mean()


class Features(LightningModule):
    """Returns features and logits; `loss` gets both and the batch."""

    def __init__(self, loss: Loss, *, named: bool = False, logs: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.net = nn.Linear(4, 16), nn.Linear(16, 3)
        self.loss, self.named, self.logs = loss, named, logs

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).relu()
        if self.named:
            return {"features": h, "classes": self.net(h)}
        return h, self.net(h)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.logs:
            output = self(batch[0])
            logits = output["classes"] if self.named else output[1]
            self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def loader(n: int = 60, *, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] + torch.randn(n, generator=generator) > 0).long()
    domain = (x[:, 2] > 0).long()
    return DataLoader(TensorDataset(x, y, domain), batch_size=50)


def fit(path: Path, model: LightningModule, *callbacks: Any, **arguments: Any) -> None:
    trainer = quiet_trainer(path, *callbacks, max_epochs=1, **arguments)
    trainer.fit(model, loader(), loader(seed=1))


def classes(output: Any, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(output[1], batch[1])


LOSSES = {
    "cross entropy": classes,
    "nll": lambda output, batch: F.nll_loss(output[1].log_softmax(1), batch[1]),
    "mse": lambda output, batch: F.mse_loss(output[1], F.one_hot(batch[1], 3).float()),
    "module": lambda output, batch: nn.CrossEntropyLoss()(output[1], batch[1]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_another_output_than_that_of_the_loss_is_refused(tmp_path, name):
    problem = r"your loss .*compares output 1, \[50, 3\], with `batch\[1\]`"
    with pytest.raises(ConfigurationError, match=rf"{problem}[\s\S]*HINT: .*`output=1`"):
        fit(tmp_path, Features(LOSSES[name]), RegressionFreeRepair(verbose=False))


@pytest.mark.parametrize("named", [False, True])
def test_the_named_output_is_repaired(tmp_path, named):
    name = "classes" if named else 1
    model = Features(lambda output, batch: F.cross_entropy(output[name], batch[1]), named=named)
    callback = quick_repair(data=DataOptions(output=name), layer="net")
    fit(tmp_path, model, callback)
    (counts,) = [split.counts for split in callback.report.splits if split.split == "val"]
    x, y, _ = loader(seed=1).dataset.tensors
    n_right = int((model(x)[name].argmax(1) == y).sum())
    assert n_right == counts.kept + counts.repaired


def test_all_callbacks_and_functions_take_an_output(tmp_path):
    old, new = Features(classes), Features(classes)
    fit(tmp_path, new, RegressionMetrics(old, output=1), PositiveCongruentTraining(old, output=1))
    gate = ReleaseGate(old, output=1, verbose=False, require="any")
    quiet_trainer(tmp_path, gate).validate(new, loader(seed=1), verbose=False)
    assert gate.report is not None
    arguments = {"data": DataOptions(output=1), "layer": "net"}
    trainer = quiet_trainer(tmp_path)
    compare(trainer, new, loader(), loader(seed=1), unseen=None, methods=["convex"], **arguments)
    repair(quiet_trainer(tmp_path), new, loader(), loader(seed=1), verbose=False, **arguments)


def test_other_labels_than_those_of_the_loss_are_refused(tmp_path):
    model = Features(lambda output, batch: F.cross_entropy(output[1], batch[2]))
    callback = RegressionFreeRepair(data=DataOptions(output=1), verbose=False)
    hint = r"HINT: .*\n.*def f\(batch\):\n.*\(batch\[0\],\).*\n.*kwargs, batch\[2\]"
    with pytest.raises(ConfigurationError, match=rf"with `batch\[2\]`[\s\S]*{hint}"):
        fit(tmp_path, model, callback)


class Validated(Features):
    """Confirms the labels in its `validation_step`."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0])[1], batch[1]))


@pytest.mark.parametrize("is_validated", [True, False])
def test_labels_that_are_confirmed_or_given_stay(tmp_path, is_validated):
    data = DataOptions(output=1)
    model = Validated if is_validated else Features
    if not is_validated:
        data = DataOptions(output=1, adapter=lambda batch: ((batch[0],), {}, batch[1]))
    callback = quick_repair(data=data, layer="net")
    fit(tmp_path, model(lambda output, batch: F.cross_entropy(output[1], batch[2])), callback)
    (counts,) = [split.counts for split in callback.report.splits if split.split == "val"]
    assert counts.n == 60


def test_several_outputs_without_a_known_loss_are_refused(tmp_path):
    model = Features(lambda output, batch: focal(output[1], batch[1]))
    with pytest.raises(ConfigurationError, match=r"`output`: .*0, .*1,[\s\S]*HINT: .*`output=`"):
        fit(tmp_path, model, RegressionFreeRepair(verbose=False))


class Embedding(Features):
    """Compares logits of weights outside of `forward`, which returns an embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).relu()


def test_an_embedding_is_refused(tmp_path):
    model = Embedding(lambda h, batch: F.cross_entropy(model.net(h), batch[1]))
    with pytest.raises(ConfigurationError, match=r"\[50, 3\].*`batch\[1\]`.*\[50, 16\][\s\S]*HINT"):
        fit(tmp_path, model, RegressionFreeRepair(verbose=False))


class Clustered(Embedding):
    """Uses the largest feature, which is no class."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0]).argmax(1)


def test_an_accuracy_at_chance_with_columns_without_a_class_is_refused(tmp_path):
    model = Clustered(lambda h, batch: focal(model.net(h), batch[1]))
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(ConfigurationError, match=r"predicts classes that no label has[\s\S]*HINT"):
        repair(trainer, model, loader(300), loader(300, seed=1), verbose=False)
    gate = ReleaseGate(model, verbose=False)
    with pytest.raises(ConfigurationError, match="predicts classes that no label has"):
        quiet_trainer(tmp_path, gate).validate(model, loader(300), verbose=False)
    metrics = RegressionMetrics(model)
    with pytest.raises(ConfigurationError, match="predicts classes that no label has"):
        quiet_trainer(tmp_path, metrics, max_epochs=1).fit(model, loader(300), loader(300, seed=1))


def first_label(batch: list[Tensor]) -> Any:
    return (batch[0], 0), {}, batch[1]


class TakesTheBatch(Features):
    """Its `forward` takes the whole batch, as in pykale's `MultimodalNNTrainer`."""

    def forward(self, batch: Any) -> Tensor:
        return self.net(self.body(batch[:-2][0]).relu())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch[1])


@pytest.mark.parametrize("make", [RegressionMetrics, ReleaseGate])
def test_a_forward_that_fails_shows_the_batch(tmp_path, make):
    model, callback = TakesTheBatch(classes), make(TakesTheBatch(classes), adapter=first_label)
    trainer = quiet_trainer(tmp_path, callback, max_epochs=1)
    problem = r"raised TypeError on [\s\S]*HINT"
    data = [loader()] if make is ReleaseGate else [loader(), loader(seed=1)]
    run = trainer.validate if make is ReleaseGate else trainer.fit
    with pytest.raises(ConfigurationError, match=problem):
        run(model, *data)


def test_a_logged_accuracy_is_compared(tmp_path):
    model = Features(lambda output, batch: focal(output[1], batch[1]), logs=True)
    wrong = quick_repair(data=DataOptions(output=0))
    trainer = quiet_trainer(tmp_path, wrong, max_epochs=1)
    with pytest.warns(DataWarning, match=r"`val_acc`.* 0\.[0-9]+.*0\.[0-9]+.*\nHINT"):
        trainer.fit(model, loader(45), loader(45, seed=1))


def test_the_same_accuracy_is_silent(tmp_path, recwarn):
    fit(tmp_path, Features(classes, logs=True), quick_repair(data=DataOptions(output=1)))
    assert not [warning for warning in recwarn if "val_acc" in str(warning.message)]


def test_heads_that_are_not_counted_are_named(tmp_path):
    model = Features(lambda output, batch: F.cross_entropy(output["classes"], batch[1]), named=True)
    callback = quick_repair(task=NamedHead("classes"), layer="auto")
    fit(tmp_path, model, callback)
    assert "what breaks in them: output `features`" in callback.report.reason
