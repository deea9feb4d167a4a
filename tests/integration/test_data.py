"""Data in every shape that Lightning takes: read whole, in order, as in validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Few,
    Untrainable,
    is_noisy,
    quick_repair,
    quiet_trainer,
    right,
)
from lightning_package import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

import lightning_nrl
from lightning_nrl import (
    ConfigurationError,
    DataOptions,
    RepairReport,
    SampleOptions,
    Target,
    repair,
)
from lightning_nrl._trainer.reading.loaders import SeededDataset
from lightning_nrl.errors import DataWarning


def repaired(
    path: Path, data: Any, model: Any = None, **arguments: Any
) -> tuple[RepairReport, Any]:
    repair, model = quick_repair(**arguments), model or Classifier()
    quiet_trainer(path, repair, max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=data)
    return repair.report, model


def sizes(report: RepairReport) -> dict[str, int]:
    return {split.split: split.n for split in report.splits}


def assert_true(report: RepairReport, split: str, model: Classifier, data: Any) -> None:
    """The counts of a split are those of an independent pass over its samples, in order."""
    (found,) = (s for s in report.splits if s.split == split)
    now = right(model, data)
    assert found.kept + found.repaired == int(now.sum())
    assert set(found.repaired_ids) <= set(now.nonzero().flatten().tolist())


def test_a_shuffled_loader_that_drops_its_last_batch_is_read_whole_and_in_order(tmp_path):
    data = Digits(batch_size=96)  # 400 is no multiple of it
    assert data.train_dataloader().drop_last
    report, model = repaired(tmp_path, data)
    assert sizes(report) == {"train": 400, "repair": 203}
    assert_true(report, "train", model, data.train)
    assert_true(report, "repair", model, data.repair)


class OwnBatches(Sampler[list[int]]):
    """Every third position in batches of 10, in reverse, without saying so."""

    def __iter__(self) -> Iterator[list[int]]:
        positions = list(range(0, 400, 3)[::-1])
        return iter([positions[i : i + 10] for i in range(0, len(positions), 10)])

    def __len__(self) -> int:
        return 14


@pytest.mark.parametrize(
    ("batching", "n"),
    [
        ({"batch_sampler": OwnBatches()}, 134),
        ({"sampler": WeightedRandomSampler([1.0] * 400, 50), "batch_size": 32}, 400),
    ],
)
def test_a_sampler_over_a_subset_is_kept_to_and_any_other_is_not(tmp_path, batching, n):
    class Sampled(Digits):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.train, **batching)

    report, _ = repaired(tmp_path, Sampled(), failed="train", target=Target.label(3))
    assert sizes(report) == {"train": n}
    labels = Digits().train.tensors[1]
    targets = report.splits[0].targeted_ids
    assert targets
    assert all(labels[i] == 3 for i in targets)


class WithoutRepair(Digits):
    repair_dataloader = None


def test_splits_are_chosen_by_argument(tmp_path):
    data = Digits()
    splits = {"passed": "val", "failed": "repair", "unseen": "test"}
    report, _ = repaired(tmp_path, data, **splits)
    assert [(split.split, split.n, split.role) for split in report.splits] == [
        ("val", 100, "known"),
        ("repair", 203, "known"),
        ("test", 300, "unseen"),
    ]
    loader = DataLoader(data.repair, 64)
    report, model = repaired(tmp_path, data, passed=loader, failed=loader)
    assert sizes(report) == {"failed": 203}
    assert_true(report, "failed", model, data.repair)
    report, _ = repaired(tmp_path, WithoutRepair())
    assert sizes(report) == {"train": 400, "val": 100}


def test_unseen_data_are_set_up_once(tmp_path):
    class SetUp(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.stages = []
            self.prepared = self.test
            del self.test

        def setup(self, stage: str) -> None:
            self.stages.append(stage)
            if stage == "test":
                self.test = self.prepared

    data = SetUp()
    report, _ = repaired(tmp_path, data, unseen="test")
    assert data.stages == ["fit", "test"]
    assert sizes(report)["test"] == 300


class Wrapped(Dataset):
    """Samples of another data set, in another form."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)


class Named(Wrapped):
    """Samples as a mapping, with a name that no network can read."""

    def __init__(self, data: Any, keys: tuple[str, str]) -> None:
        super().__init__(data)
        self.keys = keys

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, digit, noisy = self.data[i]
        return {self.keys[0]: image, self.keys[1]: digit, "noisy": noisy, "name": f"digit {i}"}


class NamedDigits(Digits):
    def __init__(self, keys: tuple[str, str] = ("image", "label")) -> None:
        super().__init__()
        self.train, self.val, self.repair = (
            Named(part, keys) for part in (self.train, self.val, self.repair)
        )


class NamedClassifier(Classifier):
    keys = ("image", "label")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step((batch[self.keys[0]], batch[self.keys[1]]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_a_target_sees_the_whole_batch_extras_included(tmp_path):
    report, model = repaired(
        tmp_path, NamedDigits(), NamedClassifier(), target=Target.where(is_noisy)
    )
    plain = Digits().repair
    noisy = set(plain.tensors[2].nonzero().flatten().tolist())
    assert 0 < report.splits[1].targeted < report.splits[1].failing
    assert set(report.splits[1].targeted_ids) <= noisy
    assert_true(report, "repair", model, plain)


class ByKeyword(NamedClassifier):
    """Its forward takes keyword arguments, as text models do."""

    keys = ("scan", "label")

    def forward(self, scan: Tensor, noisy: Tensor | None = None) -> Tensor:
        return super().forward(scan)


class OddlyNamed(NamedClassifier):
    keys = ("scan", "digit")


def take_apart(batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    return (batch["scan"],), {}, batch["digit"]


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        (ByKeyword, None),
        (OddlyNamed, "test_data:take_apart"),
    ],
)
def test_a_mapping_without_usual_keys_becomes_keywords_or_is_adapted(tmp_path, model, adapter):
    report, found = repaired(tmp_path, NamedDigits(model.keys), model(), adapter=adapter)
    assert_true(report, "repair", found, Digits().repair)


def upside_down(self: Any, batch: Any, dataloader_idx: int) -> Any:
    """Augmentation on the device, guarded as the documentation of Lightning has it."""
    return (batch[0].flip(-2), *batch[1:]) if self.trainer.training else batch


class AugmentingDigits(Digits):
    on_after_batch_transfer = upside_down


class AugmentingClassifier(Classifier):
    on_after_batch_transfer = upside_down


def test_augmentation_on_the_device_is_left_to_training(tmp_path):
    data = Digits()
    report, model = repaired(tmp_path, AugmentingDigits())
    assert_true(report, "train", model, data.train)
    repair, model = quick_repair(), AugmentingClassifier()
    quiet_trainer(tmp_path, repair, max_epochs=1).fit(
        model, data.train_dataloader(), data.repair_dataloader()
    )
    assert_true(repair.report, "train", model, data.train)
    assert_true(repair.report, "val", model, data.repair)


class Jitter(Wrapped):
    def __getitem__(self, i: int) -> Any:
        image, digit, noisy = self.data[i]
        return image + 0.05 * torch.randn(image.shape), digit, noisy


class Jittered(Digits):
    """Every pass over its training data sees other images."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Jitter(self.train), 32, shuffle=True)


def drawn(data: Dataset[Any], n: int) -> TensorDataset:
    """The samples of a data set as a repair with the seed 0 reads them, one by one, last first."""
    samples = SeededDataset(data, 0)
    columns = zip(*[samples[i] for i in reversed(range(n))][::-1], strict=True)
    return TensorDataset(*(torch.stack(column) for column in columns))


def test_nothing_breaks_in_the_draws_that_count(tmp_path, trained, recwarn):
    data = Jittered()
    train_draws = drawn(Jitter(data.train), 1200)
    before = right(trained, train_draws)
    report = repair(
        quiet_trainer(tmp_path),
        trained,
        datamodule=data,
        data=DataOptions(draws=3),
        method="convex",
        verbose=False,
    )
    after = right(trained, train_draws)
    assert report.status == "repaired"
    assert sizes(report) == {"train": 1200, "repair": 203}
    assert int((before & ~after).sum()) == report.splits[0].broken == 0
    assert int((~before & after).sum()) == report.splits[0].repaired
    assert_true(report, "repair", trained, data.repair)
    assert "`train` draws at random" in report.reason
    assert not [w for w in recwarn if "samples that were read twice" in str(w.message)]


class Transformed(Wrapped):
    """Samples through a transform, as torchvision's data sets have it."""

    def __init__(self, data: Any, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__(data)
        self.transform = transform

    def __getitem__(self, i: int) -> Any:
        image, *rest = self.data[i]
        return (self.transform(image), *rest)


class WithTransforms(Digits):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            Transformed(self.train, lambda x: x + 0.05 * torch.randn(x.shape)), 32, shuffle=True
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Transformed(self.val, lambda x: x), 64)


def test_the_transform_of_the_validation_data_is_preferred_to_one_draw(tmp_path):
    report, model = repaired(tmp_path, data := WithTransforms())
    assert_true(report, "train", model, data.train)
    assert report.splits[0].broken == 0
    assert "`train` was read with the `transform` of the validation data." in report.reason


PACKAGE = Path(lightning_nrl.__file__).parent


def test_nothing_else_is_warned_of(tmp_path, recwarn):
    repaired(tmp_path, Digits(), unseen="test")
    assert not [
        w for w in recwarn if "HINT" in str(w.message) or PACKAGE in Path(w.filename).parents
    ]


def without_noise(samples: list[Any]) -> Any:
    return [torch.stack(column) for column in zip(*(s for s in samples if not s[2]), strict=True)]


class Lossy(Digits):
    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.repair, 64, collate_fn=without_noise)


def test_a_collate_function_that_drops_samples_is_refused_before_training(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"`repair` data: a batch of 64 samples came with \d+ targets"
    ):
        repaired(tmp_path, Lossy(), Untrainable())


class SeveralValidations(WithoutRepair):
    def val_dataloader(self) -> Any:
        return {"clean": DataLoader(self.val, 64), "noisy": DataLoader(self.repair, 64)}


class ValidatesSeveral(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


def test_all_validation_loaders_are_known(tmp_path):
    report, model = repaired(tmp_path, SeveralValidations(), ValidatesSeveral())
    assert sizes(report) == {"train": 400, "val:clean": 100, "val:noisy": 203}
    assert_true(report, "val:clean", model, Digits().val)
    assert_true(report, "val:noisy", model, Digits().repair)
    assert "Not counted" not in report.reason


def test_one_of_several_validation_loaders_is_named(tmp_path):
    data = SeveralValidations()
    report, model = repaired(tmp_path, data, ValidatesSeveral(), failed="val:noisy")
    assert sizes(report) == {"train": 400, "val:noisy": 203}
    assert report.reason.endswith("it is unknown what breaks in them: `val:clean`.")
    assert_true(report, "val:noisy", model, Digits().repair)
    with pytest.raises(
        ConfigurationError, match=r"`val` data have no loader '7'.\nHINT: take one of"
    ):
        repaired(tmp_path, data, ValidatesSeveral(), failed="val:7")


class MixedTraining(Few):
    repair_dataloader = None

    def train_dataloader(self) -> Any:
        loaders = {"a": super().train_dataloader(), "b": DataLoader(self.repair, 32)}
        return CombinedLoader(loaders, "max_size_cycle")


class TrainsOnTwo(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(super(TrainsOnTwo, self).training_step(one, batch_idx) for one in batch.values())


def test_all_samples_of_mixed_batches_are_known(tmp_path):
    callback = quick_repair(method="finetune-polish")
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(TrainsOnTwo(), datamodule=MixedTraining())
    assert sizes(callback.report) == {"train:a": 160, "train:b": 100, "val": 32}
    assert callback.report.steps[0].note.startswith("continued training")


@pytest.mark.parametrize(
    ("limit", "n", "said"),
    [
        ({"overfit_batches": 0.5}, [192, 128], "known data are 192 samples of `train`"),
        ({"limit_train_batches": 2}, [400, 203], "All 400 samples of `train` are known data"),
    ],
)
def test_limits_of_batches_and_known_data(tmp_path, limit, n, said):
    callback = quick_repair()
    quiet_trainer(tmp_path, callback, max_epochs=1, **limit).fit(Classifier(), datamodule=Digits())
    assert [split.n for split in callback.report.splits] == n
    assert said in callback.report.reason


class SplitAnew(WithoutRepair):
    """Splits at random in every `setup`."""

    def setup(self, stage: str) -> None:
        parts = random_split(self.train, [200, 100, 100])
        if stage == "fit":
            self.train_part, self.val_part, _ = parts
        else:
            self.test_part = parts[2]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_part, 32)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_part, 64)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_part, 64)


def test_test_data_that_a_new_split_makes_known_are_noticed(tmp_path):
    with pytest.warns(DataWarning, match=r"`unseen`: \d+ of the 100 samples of `test` are known"):
        report, _ = repaired(tmp_path, SplitAnew(), unseen="test")
    n_leaked = report.leaked["test"]
    assert n_leaked > 0
    assert sizes(report) == {"train": 200, "val": 100, "test": 100 - n_leaked}


class Paired(NamedClassifier):
    """Fails where a batch has another number of names than of images."""

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        assert len(batch["name"]) == len(batch["image"])
        return super().training_step(batch, batch_idx)


def test_the_training_of_a_repair_goes_on_with_changed_targets(tmp_path):
    seen = []

    def darker(batch: Any) -> Any:
        seen.append(batch["label"])
        return {**batch, "image": batch["image"] / 2}

    repair = quick_repair(
        method="finetune-polish", target=Target.label(3), data=DataOptions(augment=darker)
    )
    torch.manual_seed(0)
    quiet_trainer(tmp_path, repair, max_epochs=2).fit(Paired(), datamodule=NamedDigits())
    assert repair.report.steps[0].note == "continued training, 24 epochs in 3 rounds"
    targets = repair.report.pooled("known").counts.targeted
    assert torch.cat(seen).unique().tolist() == [3]
    # Each once in six epochs, but for what a last batch drops, and at most twice in the others.
    assert 23 * targets < len(torch.cat(seen)) < 42 * targets


def test_doubted_labels_are_set_aside_and_listed(tmp_path):
    model, data = Classifier(lr=0.01), Digits()
    quiet_trainer(tmp_path).fit(model, datamodule=data)
    images, labels, _ = data.repair.tensors
    confidence = torch.where(right(model, data.repair), model(images).softmax(1).amax(1), 0)
    wrong = confidence.topk(3).indices.tolist()
    labels[wrong] = (labels[wrong] + 1) % 10  # wrong labels, where the model was surest
    report = repair(
        quiet_trainer(tmp_path),
        model,
        datamodule=data,
        method="convex",
        verbose=False,
        samples=SampleOptions(set_aside="doubtful"),
    )
    aside = {sample.id: sample for sample in report.set_aside}
    assert set(wrong) <= set(aside)
    assert not set(aside) & set(report.splits[1].targeted_ids)
    assert aside[wrong[0]].why == "its label looks wrong"
    assert aside[wrong[0]].label == int(labels[wrong[0]])
