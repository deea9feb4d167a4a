"""What cannot work is refused before the first training batch, with argument and hint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    OVERWRITING,
    Classifier,
    Digits,
    Untrainable,
    overwriting,
    quick_repair,
    quiet_trainer,
)
from lightning_package import LightningDataModule, SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_nrl import (
    ConfigurationError,
    DataOptions,
    Target,
    compare,
    diagnose,
    repair,
)
from lightning_nrl.errors import DataWarning

ARGUMENTS = {
    "`start_from='first'` is unknown": {"start_from": "first"},
    "`failed='valid'` is no split": {"failed": "valid"},
    "`passed` data: found int, not a DataLoader": {"passed": 3},
    "`adapter='nowhere:f'`": {"adapter": "nowhere:f"},
    "`limit='tolerance:1%'` needs calibration data": {"limit": "tolerance:1%"},
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_an_argument_without_a_meaning_is_refused_at_once(message):
    with pytest.raises(ConfigurationError, match=rf"^{re.escape(message)}[\s\S]*\nHINT: "):
        quick_repair(**ARGUMENTS[message])


def refused(path: Path, data: Any, *callbacks: Any, model: Any = None, **arguments: Any) -> str:
    model = model or Untrainable("cnn")
    with pytest.raises(ConfigurationError) as refusal:
        quiet_trainer(path, *callbacks, **arguments).fit(model, datamodule=data)
    problem, hint = str(refusal.value).split("\nHINT: ")
    assert problem.startswith("`")
    assert hint.endswith(".")
    return str(refusal.value)


@pytest.mark.parametrize("later", OVERWRITING)
def test_the_repair_must_not_stand_before_what_overwrites_it(tmp_path, later):
    message = refused(tmp_path, Digits(), quick_repair(), overwriting(later))
    assert f"`callbacks`: {later} comes after the repair" in message


def test_repairs_that_do_not_go_together_are_refused(tmp_path):
    message = refused(
        tmp_path, Digits(), quick_repair(target="label 3"), quick_repair(target="label 3", seed=1)
    )
    assert "`callbacks`: there are 2 RegressionFreeRepair of the same layer and target." in message
    second = quick_repair(layer="network.3", start_from="best")
    message = refused(tmp_path, Digits(), quick_repair(), second)
    assert message.startswith(
        "`start_from='best'`: the best checkpoint lacks the change by the repair before this one"
    )


class FSDPStrategy(SingleDeviceStrategy):
    """Has the name of a strategy that shards."""


class SingleDeviceXLAStrategy(SingleDeviceStrategy):
    """Has the name of one whose device is not one of torch's."""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FSDPStrategy, "shards the weights"),
        (SingleDeviceXLAStrategy, "runs on XLA"),
    ],
)
def test_a_strategy_without_whole_weights_on_torchs_device_is_refused(tmp_path, kind, words):
    message = refused(tmp_path, Digits(), quick_repair(), accelerator="auto", strategy=kind("cpu"))
    assert message.startswith(f"`strategy`: {kind.__name__} {words}")


class DTensor(nn.Parameter):
    """Has the name of a parameter of which each rank has a part."""


class ShardedByHand(Untrainable):
    def configure_model(self) -> None:
        layer = self.network[0]
        layer.weight = DTensor(layer.weight.detach())


def test_a_model_that_shards_itself_is_refused(tmp_path):
    message = refused(tmp_path, Digits(), quick_repair(), model=ShardedByHand("cnn"))
    assert message.startswith("`model`: 'network.0.weight' is a DTensor, split over ranks")


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from Digits().train_dataloader()


class Streamed(Digits):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=None)


class Several(Digits):
    def train_dataloader(self) -> Any:
        return {"a": DataLoader(self.train, 32), "b": DataLoader(self.val, 32)}


class WholeBatches(Digits):
    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.repair, batch_size=None)


class Empty(Digits):
    def repair_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*(x[:0] for x in self.repair.tensors)), 8)


class TrainAlone(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return Digits().train_dataloader()


class Web:
    """A loader that is no DataLoader, as those of webdataset."""

    def __init__(self, loader: DataLoader) -> None:
        self.dataset = loader.dataset
        self.loader = loader

    def __iter__(self) -> Any:
        return iter(self.loader)


class Wrapped(Digits):
    def train_dataloader(self) -> Any:
        return Web(super().train_dataloader())

    def test_dataloader(self) -> Any:
        return Web(super().test_dataloader())


class OfTrain(Digits):
    """Its unseen data are two of the known samples."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, sampler=SubsetRandomSampler([3, 5]))


def no_bools(batch: Any) -> Any:
    return batch[1]


BEFORE_TRAINING = [
    (Digits, {"layer": "netwrok.7"}, "`layer='netwrok.7'` is not in the model.*network.7"),
    (Digits, {"target": Target.where(no_bools)}, ".*returned torch.int64"),
    (Digits, {"importance": 7}, "`importance` raised LookupError: a batch has no column 7"),
    (
        Digits,
        {"dirpath": "s3://bucket/repair"},
        "`dirpath`: the files of a repair cannot go to 's3://bucket/repair'",
    ),
    (Digits, {"failed": "val", "unseen": "val"}, "`unseen.* are in `val` too, which is known"),
    (
        OfTrain,
        {"unseen": "test"},
        "`unseen.*`: 2 of its 2 samples are in `train` too, which is known data",
    ),
    (Digits, {"calibration": "val", "unseen": "val"}, "`calibration.* too, which is unseen data"),
    (Streamed, {}, r"`train` data: Stream yields whole batches.*DataLoader\(stream, batch_size=64"),
    (
        Wrapped,
        {},
        r"`train` data: found Web, not a DataLoader.*DataOptions\(passed=loader, failed=",
    ),
    (
        Wrapped,
        {"passed": "val", "failed": "val", "unseen": "test"},
        "`test` data: found Web, not a DataLoader.*: `unseen=loader`",
    ),
    (Several, {"unseen": "train"}, "`train` data: 2 data loaders at once.*such as 'train:a'"),
    (WholeBatches, {}, "`repair` data: its DataLoader asks the data set for whole batches"),
    (Empty, {}, "`repair` data: the data set is empty"),
    (
        TrainAlone,
        {"failed": "train", "unseen": "test"},
        r"`unseen='test'`: there is no `test_dataloader\(\)`",
    ),
]


@pytest.mark.parametrize(("data", "arguments", "message"), BEFORE_TRAINING)
def test_what_does_not_fit_is_refused_before_training(tmp_path, data, arguments, message):
    assert re.match(message, refused(tmp_path, data(), quick_repair(**arguments)), re.DOTALL)


def test_samples_of_another_loader_are_counted_if_its_data_are_known(tmp_path):
    data = Wrapped()
    callback = quick_repair(passed=DataLoader(data.train, 64))
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), datamodule=data)
    assert callback.report.reason.endswith("what breaks in them: `val`.")
    assert [split.n for split in callback.report.splits] == [400, 203]


def test_without_validation_data_the_train_data_are_repaired(tmp_path):
    callback = quick_repair()
    with pytest.warns(DataWarning, match="failures of the train data are repaired"):
        quiet_trainer(tmp_path, callback, max_epochs=1).fit(Classifier(), datamodule=TrainAlone())
    assert [(split.split, split.n) for split in callback.report.splits] == [("train", 400)]


class Trainer:
    """Of another package."""


@pytest.mark.parametrize("call", [repair, diagnose, compare])
def test_every_face_refuses_what_it_cannot_use(tmp_path, call):
    trainer, model = quiet_trainer(tmp_path), Untrainable()
    with pytest.raises(ConfigurationError, match="`trainer`: found a Trainer of `test_refusals`"):
        call(Trainer(), model)
    with pytest.raises(
        ConfigurationError, match=r"`model`: found a Linear of .*[\s\S]*HINT: .*_module`"
    ):
        call(trainer, torch.nn.Linear(1, 1))
    with pytest.raises(ConfigurationError, match="`failed=None` is no split"):
        call(trainer, model, datamodule=Digits(), data=DataOptions(failed=None))
