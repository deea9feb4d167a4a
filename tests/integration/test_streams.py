"""Repairs of models whose known and unseen data are streams."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    QUICK,
    Classifier,
    Digits,
    Few,
    Untrainable,
    quick_repair,
    quiet_trainer,
    same,
)
from lightning_package import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_nrl import ConfigurationError, RegressionFreeRepair, repair
from lightning_nrl.errors import DataWarning, TrainingWarning

SPLITS = ("train", "repair", "test")


class Stream(IterableDataset):
    """Yields the samples of map-style data in order."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self.data)):
            yield self.data[i]


class Growing(Stream):
    """Has one more sample on each read."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        self.n = 100

    def __iter__(self) -> Iterator[Any]:
        self.n += 1
        yield from (self.data[i] for i in range(self.n))


class Halved(Stream):
    """Has 160 samples on the first read, then 80."""

    n = 160

    def __iter__(self) -> Iterator[Any]:
        n, self.n = self.n, 80
        yield from (self.data[i] for i in range(n))


class Augmented(Stream):
    def __iter__(self) -> Iterator[Any]:
        for x, *others in super().__iter__():
            yield x + 0.1 * torch.randn(x.shape), *others


class Shuffled(Stream):
    def __iter__(self) -> Iterator[Any]:
        yield from (self.data[i] for i in torch.randperm(len(self.data)).tolist())


class Endless(Stream):
    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(super(Endless, self).__iter__() for _ in count())


class ReadOnce(Stream):
    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        self.samples = super().__iter__()

    def __iter__(self) -> Iterator[Any]:
        return self.samples


def by_index(data: Dataset) -> Dataset:
    return data


def fitted(
    tmp_path: Path,
    kinds: Sequence[Any],
    model: Classifier | None = None,
    **arguments: Any,
) -> tuple[RegressionFreeRepair, Classifier]:
    """Repairs with train, validation and unseen data of the given kinds of data sets."""
    data = Digits()
    train, val, unseen = (
        DataLoader(kind(getattr(data, split)), 32)
        for kind, split in zip(kinds, SPLITS, strict=True)
    )
    callback = quick_repair(failed="val", unseen=unseen, **arguments)
    model = model or Classifier()
    trainer = quiet_trainer(tmp_path, callback, num_sanity_val_steps=0)
    trainer.fit(model, train, val)
    return callback, model


def rights(model: Classifier, stream: IterableDataset) -> list[bool]:
    model.eval()
    with torch.no_grad():
        return [bool(model(x[None]).argmax(1) == label) for x, label, _ in stream]


def test_streams_are_repaired_like_the_same_samples_by_index(tmp_path):
    _, expected = fitted(tmp_path / "index", [by_index] * 3)
    streamed, repaired = fitted(tmp_path / "streams", [Stream] * 3)
    assert same(expected, repaired)
    assert streamed.report.status == "repaired"
    assert "`train` is a stream: its 400 samples were read once" in streamed.report.reason
    assert "`unseen` is a stream: its 300 samples" in streamed.report.reason
    assert "No guarantee" not in streamed.report.reason
    unrepaired = Classifier()
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=0)
    trainer.fit(unrepaired, DataLoader(Stream(Digits().train), 32))
    splits = {report.split: report for report in streamed.report.splits}
    for name, split in zip(("train", "val", "unseen"), SPLITS, strict=True):
        stream = Stream(getattr(Digits(), split))
        before, after = rights(unrepaired, stream), rights(repaired, stream)
        flips = list(enumerate(zip(before, after, strict=True)))
        ids = [i for i, (was_right, is_right) in flips if is_right and not was_right]
        assert ids == [x.id for x in splits[name].flipped if x.flip == "repaired"]
        broken = [i for i, (was_right, is_right) in flips if was_right and not is_right]
        assert splits[name].counts.broken == len(broken)
        assert name == "unseen" or not broken


class OnTwoLoaders(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return sum(super(OnTwoLoaders, self).training_step(x, batch_idx) for x in batch.values())


def test_the_default_method_trains_on_streams(tmp_path):
    data = Few()
    callback = RegressionFreeRepair(verbose=False)
    trainer = quiet_trainer(tmp_path, callback, num_sanity_val_steps=0)
    streams = {"a": DataLoader(Stream(data.train), 32), "b": DataLoader(Stream(data.train), 64)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)  # such as: the training cannot continue
        trainer.fit(
            OnTwoLoaders(), CombinedLoader(streams, "min_size"), DataLoader(Stream(data.repair), 64)
        )
    assert callback.report.known_counts.repaired_in_target


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Growing, "1 sample changed"),
        (Halved, "17 samples changed"),  # at least; the first epoch had 3 to 5 batches of 32
        (Augmented, "400 samples changed"),
        (Shuffled, r"\d+ samples changed or swapped places"),
    ],
)
def test_a_stream_that_changes_is_noticed(tmp_path, kind, words):
    with pytest.warns(DataWarning, match=rf"`train` data: {words}.*(.|\n)*neither shuffles"):
        callback, _ = fitted(tmp_path, [kind, Stream, Stream])
    assert "No guarantee for `train`: " in callback.report.reason
    assert "No guarantee for `val`: " not in callback.report.reason


def test_a_stream_that_has_lost_samples_since_the_check_is_noticed(tmp_path):
    data = Digits()
    train, val = DataLoader(Halved(data.train), 32), DataLoader(data.repair, 32)
    with pytest.warns(DataWarning, match="`train` data: 80 samples changed"):
        repair(quiet_trainer(tmp_path), Classifier(), train, val, **QUICK)


@pytest.mark.parametrize(
    ("kinds", "arguments", "message"),
    [
        (
            (Endless, Stream, Stream),
            {"stream_limit": 10**6},
            r"`train` data: a stream that is endless.*: \d+ of its samples take 1 MB.*"
            r"DataOptions\(stream_limit=2000000\)",
        ),
        ((Stream, Stream, Endless), {"stream_limit": 10**6}, "`unseen` data: a stream that is"),
        ((ReadOnce, Stream, Stream), {}, "`train` data: the stream is empty on a second read"),
    ],
)
def test_a_stream_that_cannot_be_kept_is_refused_before_training(
    tmp_path, kinds, arguments, message
):
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        fitted(tmp_path, kinds, Untrainable(), **arguments)


def test_a_fast_dev_run_reads_only_its_batches(tmp_path):
    data = Digits()
    callback = quick_repair(failed="val")
    trainer = quiet_trainer(tmp_path, callback, fast_dev_run=2)
    trainer.fit(
        Classifier(), DataLoader(Endless(data.train), 32), DataLoader(Endless(data.repair), 32)
    )
    assert "`train` is a stream: its 64 samples" in callback.report.reason


class NamedColumns(Classifier):
    """Takes batches of Hugging Face's `datasets`."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch["image"], batch["label"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["image"], batch["label"]), batch_idx)


@pytest.mark.parametrize("streamed", [False, True])
def test_data_sets_of_hugging_face_are_read(tmp_path, streamed):
    datasets = pytest.importorskip("datasets")

    def columns(data: Any) -> Any:
        images, labels, _ = data.tensors
        table = {"image": images.numpy(), "label": labels.numpy()}
        data = datasets.Dataset.from_dict(table).with_format("torch")
        return data.to_iterable_dataset() if streamed else data

    callback, _ = fitted(tmp_path, [columns] * 3, NamedColumns())
    assert callback.report.status == "repaired"
    assert ("is a stream" in callback.report.reason) == streamed
