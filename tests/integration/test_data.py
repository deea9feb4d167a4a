"""Data in every shape that Lightning takes: read whole, in order, as in validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, Untrainable, mlp, quick_repair, quiet_trainer, right
from lightning_package import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

import lightning_nrl
from lightning_nrl import ConfigurationError, DataOptions, RegressionFreeRepair, RepairReport, Target, repair
from lightning_nrl._trainer.loaders import SeededDataset
from lightning_nrl.errors import DataWarning


def repaired(path: Path, data: Any, model: Any = None, **arguments: Any) -> tuple[RepairReport, Any]:
    repair, model = quick_repair(**arguments), model or Classifier()
    quiet_trainer(path, repair, max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=data)
    assert repair.report is not None
    return repair.report, model


def sizes(report: RepairReport) -> dict[str, int]:
    return {split.split: split.n for split in report.splits}


def assert_true(report: RepairReport, split: str, model: Classifier, data: Any) -> None:
    """The counts of a split are those of an independent pass over its samples, in order."""
    (found,) = (s for s in report.splits if s.split == split)
    now = right(model, data)
    assert found.kept + found.repaired == int(now.sum())
    assert set(found.repaired_ids) <= set(now.nonzero().flatten().tolist())


def test_a_shuffled_loader_that_drops_its_last_batch_is_read_whole_and_in_order(tmp_path: Path) -> None:
    data = Digits(batch_size=96)  # 400 is no multiple of it
    assert data.train_dataloader().drop_last
    report, model = repaired(tmp_path, data)
    assert sizes(report) == {"train": 400, "repair": 203}
    assert_true(report, "train", model, data.train)
    assert_true(report, "repair", model, data.repair)


SAMPLERS: dict[str, tuple[Callable[[Any], dict[str, Any]], int]] = {
    "subset": (lambda n: {"sampler": SubsetRandomSampler(range(0, n, 3)), "batch_size": 32}, 134),
    "subset in batches": (
        lambda n: {"batch_sampler": BatchSampler(SubsetRandomSampler(range(0, n, 3)), 32, drop_last=True)},
        134,
    ),
    "weighted": (lambda n: {"sampler": WeightedRandomSampler([1.0] * n, 50), "batch_size": 32}, 400),
}


class OwnSampler(Sampler[int]):
    """Every third position, in reverse, without saying so."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, self.n, 3)[::-1])


class OwnBatches(OwnSampler):
    """The same in batches of 10."""

    def __iter__(self) -> Iterator[Any]:
        positions = list(super().__iter__())
        return iter([positions[i : i + 10] for i in range(0, len(positions), 10)])

    def __len__(self) -> int:
        return 14


class RandomThird(OwnSampler):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.n)[: self.n // 3].tolist())


SAMPLERS |= {
    "own": (lambda n: {"sampler": OwnSampler(n), "batch_size": 32}, 134),
    "own in batches": (lambda n: {"batch_sampler": OwnBatches(n)}, 134),
    "own at random": (lambda n: {"sampler": RandomThird(n), "batch_size": 32}, 400),
    "zero weights": (
        lambda n: {"sampler": WeightedRandomSampler([float(i % 3 == 0) for i in range(n)], 50), "batch_size": 32},
        134,
    ),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_sampler_over_a_subset_is_kept_to_and_any_other_is_not(tmp_path: Path, kind: str) -> None:
    make, n = SAMPLERS[kind]

    class Sampled(Digits):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.train, **make(400))

    report, _ = repaired(tmp_path, Sampled(), failed="train", target=Target.label(3))
    assert sizes(report) == {"train": n}
    labels = Digits().train.tensors[1]
    assert all(labels[i] == 3 for i in report.splits[0].targeted_ids)
    assert n == 400 or all(i % 3 == 0 for i in report.splits[0].targeted_ids)
    assert report.splits[0].targeted > 0


def test_workers_read_the_same(tmp_path: Path) -> None:
    class Workers(Digits):
        def repair_dataloader(self) -> DataLoader:
            return DataLoader(self.repair, 64, num_workers=2, shuffle=True, persistent_workers=True)

    alone, _ = repaired(tmp_path / "alone", Digits())
    report, model = repaired(tmp_path / "workers", Workers())
    assert report.splits == alone.splits
    assert_true(report, "repair", model, Digits().repair)


def test_validation_data_stand_in_for_repair_data(tmp_path: Path) -> None:
    class WithoutRepair(Digits):
        repair_dataloader = None  # type: ignore[assignment]

    assert sizes(repaired(tmp_path, WithoutRepair())[0]) == {"train": 400, "val": 100}


def test_splits_are_chosen_by_argument(tmp_path: Path) -> None:
    report, _ = repaired(tmp_path, Digits(), passed="val", failed="repair", unseen="test")
    assert [(split.split, split.role, split.n) for split in report.splits] == [
        ("val", "known", 100),
        ("repair", "known", 203),
        ("test", "unseen", 300),
    ]


@pytest.mark.parametrize(("ready", "stages"), [(True, ["fit"]), (False, ["fit", "test"])])
def test_unseen_data_are_set_up_once_and_only_if_need_be(tmp_path: Path, ready: bool, stages: list[str]) -> None:
    class SetUp(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.stages: list[str] = []
            self.there = self.test
            if not ready:
                del self.test

        def setup(self, stage: str) -> None:
            self.stages.append(stage)
            if stage == "test":
                self.test = self.there

    data = SetUp()
    report, _ = repaired(tmp_path, data, unseen="test")
    assert data.stages == stages
    assert sizes(report)["test"] == 300


def test_data_loaders_are_given_by_argument(tmp_path: Path) -> None:
    data = Digits()
    report, model = repaired(tmp_path, data, failed=data.test_dataloader(), unseen=data.repair_dataloader())
    assert sizes(report) == {"train": 400, "failed": 300, "unseen": 203}
    assert_true(report, "failed", model, data.test)


def test_one_loader_for_passed_and_failed_samples_is_one_split(tmp_path: Path) -> None:
    data = Digits()
    loader = DataLoader(data.repair, 64)
    assert sizes(repaired(tmp_path, data, passed=loader, failed=loader)[0]) == {"failed": 203}
    assert sizes(repaired(tmp_path, data, passed="val", failed=DataLoader(data.val, 7))[0]) == {"val": 100}


class Named(Dataset):
    """Samples as a mapping, with a name that no network can read."""

    def __init__(self, data: Any, keys: tuple[str, str]) -> None:
        self.data, self.keys = data, keys

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, digit, noisy = self.data[i]
        return {self.keys[0]: image, self.keys[1]: digit, "noisy": noisy, "name": f"digit {i}"}


class NamedDigits(Digits):
    def __init__(self, keys: tuple[str, str] = ("image", "label")) -> None:
        super().__init__()
        self.train, self.val, self.repair = (Named(part, keys) for part in (self.train, self.val, self.repair))


class NamedClassifier(Classifier):
    keys = ("image", "label")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step((batch[self.keys[0]], batch[self.keys[1]]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def is_noisy(batch: Any) -> Tensor:
    return batch["noisy"] if isinstance(batch, Mapping) else batch[2]


@pytest.mark.parametrize(("data", "model"), [(Digits, Classifier), (NamedDigits, NamedClassifier)])
def test_a_target_sees_the_whole_batch_extras_included(tmp_path: Path, data: Any, model: Any) -> None:
    report, found = repaired(tmp_path, data(), model(), target=Target.where(is_noisy))
    plain = Digits().repair
    noisy = set(plain.tensors[2].nonzero().flatten().tolist())
    assert 0 < report.splits[1].targeted < report.splits[1].failing
    assert set(report.splits[1].targeted_ids) <= noisy
    assert_true(report, "repair", found, plain)


class ByKeyword(NamedClassifier):
    """Its forward takes keyword arguments, as text models do."""

    keys = ("scan", "label")

    def forward(self, scan: Tensor, noisy: Tensor | None = None) -> Tensor:
        return super().forward(scan)


def test_unseen_data_without_the_target_s_attribute_are_counted_all_the_same(tmp_path: Path) -> None:
    data = Digits()
    bare = DataLoader(TensorDataset(*data.test.tensors[:2]), 64)
    with pytest.warns(UserWarning, match="the target's failures are not counted on unseen data"):
        report, model = repaired(tmp_path, data, target=Target.where(is_noisy), unseen=bare)
    assert_true(report, "unseen", model, data.test)


def test_a_mapping_without_a_usual_key_goes_to_the_model_as_keywords(tmp_path: Path) -> None:
    report, model = repaired(tmp_path, NamedDigits(("scan", "label")), ByKeyword())
    assert_true(report, "repair", model, Digits().repair)


class OddlyNamed(NamedClassifier):
    keys = ("scan", "digit")


def take_apart(batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    return (batch["scan"],), {}, batch["digit"]


@pytest.mark.parametrize("adapter", [take_apart, "test_data:take_apart", "test_data.take_apart"])
def test_an_adapter_takes_other_batches_apart(tmp_path: Path, adapter: Any) -> None:
    report, model = repaired(tmp_path, NamedDigits(("scan", "digit")), OddlyNamed(), adapter=adapter)
    assert_true(report, "repair", model, Digits().repair)


def test_a_batch_that_nobody_understands_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"`adapter`: a batch with the keys \['digit', 'name', 'noisy', 'scan'"
    ):
        repaired(tmp_path, NamedDigits(("scan", "digit")), Untrainable())


class TwoEyes(Dataset):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        image, digit, _ = self.data[i]
        return (image, image.flip(-1)), digit


class TwoEyedDigits(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.train, self.val, self.repair = map(TwoEyes, (self.train, self.val, self.repair))


class TwoEyed(Classifier):
    """Looks at an image twice, with the repaired layer called once an eye."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.head = mlp()[:-1], nn.Linear(32, 10)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.network(left) + self.network(right))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(*batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def both_eyes(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    return tuple(batch[0]), {}, batch[1]


@pytest.mark.filterwarnings("ignore:`layer`")
@pytest.mark.parametrize("layer", ["head", "network.1"])
def test_a_model_may_have_several_inputs(tmp_path: Path, layer: str) -> None:
    model = TwoEyed()
    report, _ = repaired(tmp_path, TwoEyedDigits(), model, layer=layer, adapter=both_eyes)
    images, labels, _ = Digits().repair.tensors
    with torch.no_grad():
        now = model.eval()(images, images.flip(-1)).argmax(1) == labels
    assert report.splits[1].kept + report.splits[1].repaired == int(now.sum())
    assert report.splits[1].broken == report.splits[0].broken == 0


def upside_down(self: Any, batch: Any, dataloader_idx: int) -> Any:
    """Augmentation on the device, guarded as the documentation of Lightning has it."""
    return (batch[0].flip(-2), *batch[1:]) if self.trainer.training else batch


class AugmentingDigits(Digits):
    on_after_batch_transfer = upside_down


class AugmentingClassifier(Classifier):
    on_after_batch_transfer = upside_down


def test_augmentation_on_the_device_by_the_data_module_is_left_to_training(tmp_path: Path) -> None:
    report, model = repaired(tmp_path, AugmentingDigits())
    assert_true(report, "train", model, Digits().train)
    assert_true(report, "repair", model, Digits().repair)


def test_augmentation_on_the_device_by_the_model_is_left_to_training(tmp_path: Path) -> None:
    repair, model, data = quick_repair(), AugmentingClassifier(), Digits()
    quiet_trainer(tmp_path, repair, max_epochs=1).fit(model, data.train_dataloader(), data.repair_dataloader())
    assert_true(repair.report, "train", model, data.train)
    assert_true(repair.report, "val", model, data.repair)


class Jitter(Dataset):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        image, digit, noisy = self.data[i]
        return image + 0.05 * torch.randn(image.shape), digit, noisy


class Jittered(Digits):
    """Every pass over its training data sees other images."""

    workers = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Jitter(self.train), 32, shuffle=True, num_workers=self.workers)


def drawn(data: Dataset[Any], n: int) -> TensorDataset:
    """The samples of a data set as a repair with the seed 0 reads them, one by one, last first."""
    samples = SeededDataset(data, 0)
    columns = zip(*[samples[i] for i in reversed(range(n))][::-1], strict=True)
    return TensorDataset(*(torch.stack(column) for column in columns))


@pytest.mark.parametrize(("draws", "method"), [(1, "auto"), (3, "finetune-polish")])
def test_a_data_set_that_augments_at_random_breaks_nothing_in_the_draws_that_are_counted(
    draws: int, method: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data, model = Jittered(), Classifier()
    callback = RegressionFreeRepair(method=method, verbose=False, unseen="test", data=DataOptions(draws=draws))
    before: dict[str, Tensor] = {}

    class Before(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before["train"] = right(model, drawn(Jitter(data.train), 400 * draws))

    quiet_trainer(tmp_path, Before(), callback, max_epochs=3).fit(model, datamodule=data)
    report = callback.report
    assert report is not None
    now = right(model, drawn(Jitter(data.train), 400 * draws))
    train, repair, _ = report.splits
    assert (train.n, repair.n) == (400 * draws, len(data.repair))
    assert report.status == "repaired"
    assert int((before["train"] & ~now).sum()) == train.broken == repair.broken == 0
    assert int((~before["train"] & now).sum()) == train.repaired > 0
    assert repair.repaired > 20
    assert_true(report, "repair", model, data.repair)
    assert "`train` draws at random" in report.reason
    assert not [w for w in recwarn if "samples that were read twice" in str(w.message)]


def test_workers_read_the_same_draws(tmp_path: Path) -> None:
    by_workers = Jittered()
    by_workers.workers = 2
    model = Classifier()
    quiet_trainer(tmp_path, max_epochs=1).fit(model, datamodule=Digits())

    def report(data: Digits) -> RepairReport:
        return repair(quiet_trainer(tmp_path), deepcopy(model), datamodule=data, callback=quick_repair())

    found = report(by_workers)
    assert found.splits[0].broken == 0
    assert found.splits == report(Jittered()).splits


class OwnGenerator(Jitter):
    generator = torch.Generator().manual_seed(0)

    def __getitem__(self, i: int) -> Any:
        image, digit, noisy = self.data[i]
        return image + 0.05 * torch.randn(image.shape, generator=self.generator), digit, noisy


def test_data_that_do_not_stand_still_are_named_and_get_no_guarantee(tmp_path: Path) -> None:
    class Unstable(Digits):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(OwnGenerator(self.train), 32)

    with pytest.warns(DataWarning, match="`train` data: 32 of 32 samples that were read twice changed"):
        report, _ = repaired(tmp_path, Unstable())
    assert "No guarantee for `train`" in report.reason


class Transformed(Dataset):
    """Samples through a transform, as torchvision's data sets have it."""

    def __init__(self, data: Any, transform: Callable[[Tensor], Tensor]) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        image, *rest = self.data[i]
        return (self.transform(image), *rest)


def test_the_transform_of_the_validation_data_is_preferred_to_one_draw(tmp_path: Path) -> None:
    class WithTransforms(Digits):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(Transformed(self.train, lambda x: x + 0.05 * torch.randn(x.shape)), 32, shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(Transformed(self.val, lambda x: x), 64)

    data = WithTransforms()
    report, model = repaired(tmp_path, data)
    assert_true(report, "train", model, data.train)
    assert report.splits[0].broken == 0
    assert "`train` was read with the `transform` of the validation data." in report.reason


PACKAGE = Path(lightning_nrl.__file__).parent


def test_nothing_else_is_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    repaired(tmp_path, Digits(), unseen="test")
    assert not [w for w in recwarn if "HINT" in str(w.message) or PACKAGE in Path(w.filename).parents]


class Lossy(Digits):
    """Its collate function leaves out noisy samples."""

    def repair_dataloader(self) -> DataLoader:
        def collate(samples: list[Any]) -> Any:
            return [torch.stack(column) for column in zip(*(s for s in samples if not s[2]), strict=True)]

        return DataLoader(self.repair, 64, collate_fn=collate)


def test_a_collate_function_that_drops_samples_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`repair` data: a batch of 64 samples came with \d+ targets"):
        repaired(tmp_path, Lossy(), Untrainable())


def test_calibration_data_are_counted_and_limit_the_strength(tmp_path: Path) -> None:
    data = Digits()
    report, model = repaired(tmp_path, data, calibration="val", limit="tolerance:0", unseen="test")
    assert [(split.split, split.role) for split in report.splits] == [
        ("train", "known"),
        ("repair", "known"),
        ("val", "calibration"),
        ("test", "unseen"),
    ]
    assert report.splits[2].broken == 0
    assert_true(report, "val", model, data.val_dataloader().dataset)


class Asked(Digits):
    """Counts how often each of its loaders is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, int] = {}

    def count(self, split: str, loader: DataLoader) -> DataLoader:
        self.asked[split] = self.asked.get(split, 0) + 1
        return loader

    def train_dataloader(self) -> DataLoader:
        return self.count("train", super().train_dataloader())

    def val_dataloader(self) -> DataLoader:
        return self.count("val", super().val_dataloader())

    def repair_dataloader(self) -> DataLoader:
        return self.count("repair", super().repair_dataloader())

    def test_dataloader(self) -> DataLoader:
        return self.count("test", super().test_dataloader())


def test_each_loader_is_asked_for_once_a_pass(tmp_path: Path, trained: Classifier) -> None:
    data = Asked()
    callback = quick_repair(unseen="test", calibration="val")
    repair(quiet_trainer(tmp_path), trained, datamodule=data, callback=callback)
    # A pass before, over a batch of each, and the repair itself; and Lightning's own fit, which makes no step.
    assert data.asked == {"train": 3, "val": 2, "repair": 2, "test": 2}


class SeveralValidations(Digits):
    repair_dataloader = None  # type: ignore[assignment]

    def val_dataloader(self) -> Any:
        return {"clean": DataLoader(self.val, 64), "noisy": DataLoader(self.repair, 64)}


class Listed(SeveralValidations):
    def val_dataloader(self) -> Any:
        return list(super().val_dataloader().values())


class ValidatesSeveral(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


@pytest.mark.parametrize(("kind", "name"), [(SeveralValidations, "val:noisy"), (Listed, "val:1")])
def test_one_of_several_validation_loaders_is_named(tmp_path: Path, kind: type[Digits], name: str) -> None:
    report, model = repaired(tmp_path, kind(), ValidatesSeveral(), failed=name)
    assert sizes(report) == {"train": 400, name: 203}
    assert_true(report, name, model, Digits().repair)
    with pytest.raises(ConfigurationError, match=r"`val` data have no loader '7'.\nHINT: take one of"):
        repaired(tmp_path, kind(), ValidatesSeveral(), failed="val:7")


@pytest.mark.parametrize(
    ("arguments", "n", "said"),
    [
        ({"overfit_batches": 2}, [64, 128], "`overfit_batches`: known data are 64 samples of `train`"),
        ({"overfit_batches": 0.5}, [192, 128], "`overfit_batches`: known data are 192 samples of `train`"),
        ({"limit_train_batches": 2}, [400, 203], "All 400 samples of `train` are known data, whatever"),
        ({"limit_train_batches": 0.5}, [400, 203], "All 400 samples of `train` are known data, whatever"),
        ({"limit_val_batches": 0}, [400, 203], ""),
    ],
)
def test_it_is_said_what_limits_of_batches_mean_for_known_data(
    tmp_path: Path, arguments: dict[str, Any], n: list[int], said: str
) -> None:
    callback = quick_repair()
    quiet_trainer(tmp_path, callback, max_epochs=1, **arguments).fit(Classifier(), datamodule=Digits())
    assert callback.report is not None
    assert [split.n for split in callback.report.splits] == n
    assert said in callback.report.reason
    assert ("batches`" in callback.report.reason) == bool(said)


class SplitAnew(Digits):
    """Splits at random in every `setup`; test data are there after their own."""

    repair_dataloader = None  # type: ignore[assignment]

    def setup(self, stage: str) -> None:
        parts = random_split(Digits().train if self.reads_anew else self.train, [200, 100, 100])
        if stage == "fit":
            self.train_part, self.val_part, _ = parts
        else:
            self.test_part = parts[2]

    reads_anew = False

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_part, 32)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_part, 64)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_part, 64)


class ReadAnew(SplitAnew):
    reads_anew = True


@pytest.mark.parametrize("kind", [SplitAnew, ReadAnew])
def test_test_data_that_a_new_split_makes_known_are_noticed(tmp_path: Path, kind: type[Digits]) -> None:
    with pytest.warns(DataWarning, match=r"`unseen`: \d+ of the 100 samples of `test` are known"):
        report, _ = repaired(tmp_path, kind(), unseen="test")
    assert sizes(report) == {"train": 200, "val": 100, "test": 100}


def test_subsets_that_overlap_are_known_in_both(tmp_path: Path) -> None:
    class Overlapping(Digits):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(Subset(self.train, range(300)), 32)

        def repair_dataloader(self) -> DataLoader:
            return DataLoader(Subset(self.train, range(200, 400)), 32)

    report, model = repaired(tmp_path, Overlapping())
    images, labels, _ = Digits().train.tensors
    assert sizes(report) == {"train": 300, "repair": 200}
    assert_true(report, "train", model, TensorDataset(images[:300], labels[:300]))
    assert_true(report, "repair", model, TensorDataset(images[200:], labels[200:]))
