"""Reports name samples as their user does, beside the positions that everything is matched by."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, Untrainable, quick_repair, quiet_trainer
from lightning_package import LightningModule
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_nrl import ConfigurationError, ReleaseGate, RepairReport, SampleOptions, TensorSource
from lightning_nrl._trainer.reading import loaders
from lightning_nrl.errors import DataWarning
from lightning_nrl.pipeline import Settings, repair_module
from lightning_nrl.release import ReleaseReport
from lightning_nrl.release.junit import to_junit
from lightning_nrl.report.tensorboard_plugin.repair_folders import RepairFolder
from lightning_nrl.report.tensorboard_plugin.tab_data import LoadedRepair


class Table(Dataset):
    """Rows as in Hugging Face's `datasets`, with a column of texts."""

    def __init__(self, data: Dataset, prefix: str) -> None:
        self.data = data
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, label, _ = self.data[i]
        return {"image": image, "label": label, "key": f"{self.prefix}/{i:04}.png"}

    def __getitems__(self, index: list[int]) -> list[dict[str, Any]]:
        return [self[i] for i in index]


class Stream(IterableDataset):
    def __init__(self, data: Dataset, prefix: str) -> None:
        self.table = Table(data, prefix)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(len(self.table)):
            yield self.table[i]


def plain(batch: dict[str, Any]) -> tuple[Any, Any]:
    return batch["image"], batch["label"]


class OnTables(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(plain(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(plain(batch), batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(plain(batch), batch_idx)


class NeverTrained(OnTables, Untrainable):
    training_step = Untrainable.training_step


def repaired(
    tmp_path: Path, kind: Any, model: LightningModule | None = None, sample_id: Any = "key"
) -> RepairReport:
    data = Digits()
    train, val, unseen = (
        DataLoader(kind(getattr(data, split), split), 32) for split in ("train", "repair", "test")
    )
    callback = quick_repair(failed="val", unseen=unseen, sample_id=sample_id, dirpath=tmp_path)
    quiet_trainer(tmp_path, callback, num_sanity_val_steps=0).fit(model or OnTables(), train, val)
    return callback.report


@pytest.mark.parametrize("kind", [Table, Stream])
def test_a_report_has_the_users_ids_of_flipped_samples(tmp_path, kind):
    report = repaired(tmp_path, kind)
    assert report.status == "repaired"
    prefixes = {"train": "train", "val": "repair", "unseen": "test"}
    saved = RepairReport.from_json((tmp_path / "report.json").read_text())
    titles = []
    for split in saved.splits:
        names = [f"{prefixes[split.split]}/{sample.id:04}.png" for sample in split.flipped]
        assert [sample.name for sample in split.flipped] == names
        titles += [f"{x.id} ({name})" for x, name in zip(split.flipped, names, strict=True)]
    assert any("test/" in title for title in titles)
    assert any("repair/" in title for title in titles)
    page = (tmp_path / "report.html").read_text()
    assert all(title.partition("(")[2][:-1] in page for title in titles)
    assert any(title in (tmp_path / "report.md").read_text() for title in titles)
    assert any(f"{title}: true" in page for title in titles)  # captions of pictures
    tab = LoadedRepair(RepairFolder("repair", tmp_path, tmp_path, 0, 0))
    rows = tab.details["flips"]["rows"]
    assert sorted(f"{row[1]} ({row[-1]})" for row in rows) == sorted(titles)


class FromDisk(Table):
    """Names samples by files and classes by folders with names that are no UTF-8."""

    classes = tuple(os.fsdecode(f"{i}\xff".encode("latin1")) for i in range(10))

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "key": os.fsdecode(f"{i}\xff".encode("latin1"))}


def test_ids_need_not_be_utf_8(tmp_path):
    report = repaired(tmp_path, FromDisk)
    assert {"json", "patch"} <= report.files.keys()
    saved = RepairReport.from_json((tmp_path / "report.json").read_text())
    assert saved.class_names[7] == r"7\udcff"
    assert all(sample.name == rf"{sample.id}\udcff" for sample in saved.splits[1].flipped)


def test_a_wrong_column_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match=r"(?s)`sample_id` raised LookupError.*'image'"):
        repaired(tmp_path, Table, NeverTrained(), sample_id="url")
    with pytest.raises(ConfigurationError, match=r"(?s)`sample_id` returned Tensor.*HINT: return"):
        repaired(tmp_path, Table, NeverTrained(), sample_id="image")


def few() -> tuple[torch.nn.Module, TensorSource]:
    """A model that gets every third sample wrong, which is far from the others."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(60, 4), torch.arange(60) % 3
    inputs[labels == 2] += 4
    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 0.0]))
    source = TensorSource(inputs, (labels == 2).long(), split="test", passed=True, failed=True)
    return model, source


def test_ids_may_repeat_and_be_missing():
    model, source = few()

    def patient(batch: Any) -> list[int | None]:
        return [7 if x > 4 else None for x in batch[0][:, 0].tolist()]

    samples = SampleOptions(sample_id=patient)
    report = repair_module(model, [source], Settings(samples=samples)).report
    flipped = report.splits[0].flipped
    assert {sample.name for sample in flipped} == {"7", ""}
    assert all((x.name == "7") == bool(source.inputs[x.id, 0] > 4) for x in flipped)


def test_a_column_that_fails_late_costs_names_and_no_repair():
    model, source = few()

    def only_first(batch: Any) -> list[str]:
        if len(batch[0]) > 1:
            raise ValueError("no such file")
        return ["first"]

    samples = SampleOptions(sample_id=only_first)
    with pytest.warns(DataWarning, match="`sample_id` raised ValueError: no such file"):
        report = repair_module(model, [source], Settings(samples=samples)).report
    assert report.status == "repaired"
    assert not any(sample.name for sample in report.splits[0].flipped)


def test_samples_that_cannot_be_read_again_cost_names_and_no_repair(monkeypatch):
    model, source = few()
    draw = TensorSource.draw

    def unplugged(self: TensorSource, batches: Any) -> Any:
        if sum(map(len, batches)) == len(names) + 1:  # the first sample is always read
            raise FileNotFoundError("the disk is gone")
        return draw(self, batches)

    settings = Settings(samples=SampleOptions(sample_id=lambda batch: [1] * len(batch[0])))
    names = repair_module(model, [source], settings).report.splits[0].flipped
    monkeypatch.setattr(TensorSource, "draw", unplugged)
    with pytest.warns(DataWarning, match="`sample_id`: names cannot be read: FileNotFoundError"):
        report = repair_module(model, [source], settings).report
    assert report.status == "repaired"
    assert not any(sample.name for sample in report.splits[0].flipped)


@pytest.mark.parametrize("kind", [Table, Stream])
def test_a_refused_release_names_the_broken_samples(trained, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(loaders, "PIECE_SIZE", 3)
    new = OnTables()
    new.load_state_dict(trained.state_dict())
    with torch.no_grad():
        new.network[3].bias[4] += 2
    data = DataLoader(kind(Digits().test, "night"), 16)

    def release(sample_id: str) -> None:
        gate = ReleaseGate(trained, sample_id=sample_id, verbose=False, dirpath=tmp_path)
        quiet_trainer(tmp_path, gate, enable_checkpointing=False).test(new, data, verbose=False)

    release("key")
    report = ReleaseReport.from_json((tmp_path / "report.json").read_text())
    broken = report.broken_ids["test"]
    assert len(broken) > 5
    assert report.broken_names == {"test": [f"night/{i:04}.png" for i in broken]}
    title = f"{broken[0]} (night/{broken[0]:04}.png)"
    assert title in (tmp_path / "report.html").read_text()
    assert title in to_junit(report)
    assert "night/" not in (tmp_path / "predictions.csv").read_text()
    with pytest.raises(ConfigurationError, match=r"(?s)`sample_id` raised LookupError.*'image'"):
        release("url")
