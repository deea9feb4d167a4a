"""Data in every shape that Lightning takes: read whole, in order, as in validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Untrainable,
    is_noisy,
    mlp,
    quick_repair,
    quiet_trainer,
    right,
)
from lightning_package import Callback, CombinedLoader, LightningModule, Trainer
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
from lightning_nrl import (
    ConfigurationError,
    DataOptions,
    RegressionFreeRepair,
    RepairReport,
    SampleOptions,
    Target,
    repair,
)
from lightning_nrl._trainer.loaders import SeededDataset
from lightning_nrl.errors import DataWarning, TrainingWarning
from lightning_nrl.records.stats import upper_limit


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


def test_a_shuffled_loader_that_drops_its_last_batch_is_read_whole_and_in_order(
    tmp_path: Path,
) -> None:
    data = Digits(batch_size=96)  # 400 is no multiple of it
    assert data.train_dataloader().drop_last
    report, model = repaired(tmp_path, data)
    assert sizes(report) == {"train": 400, "repair": 203}
    assert_true(report, "train", model, data.train)
    assert_true(report, "repair", model, data.repair)


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


SAMPLERS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
    "subset in batches": (
        lambda n: {
            "batch_sampler": BatchSampler(SubsetRandomSampler(range(0, n, 3)), 32, drop_last=True)
        },
        134,
    ),
    "weighted": (
        lambda n: {"sampler": WeightedRandomSampler([1.0] * n, 50), "batch_size": 32},
        400,
    ),
    "own in batches": (lambda n: {"batch_sampler": OwnBatches(n)}, 134),
    "own at random": (lambda n: {"sampler": RandomThird(n), "batch_size": 32}, 400),
    "zero weights": (
        lambda n: {
            "sampler": WeightedRandomSampler([float(i % 3 == 0) for i in range(n)], 50),
            "batch_size": 32,
        },
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


class WithoutRepair(Digits):
    repair_dataloader = None  # type: ignore[assignment]


def test_splits_are_chosen_by_argument(tmp_path: Path) -> None:
    data = Digits()
    loader = DataLoader(data.repair, 64)
    ways: list[tuple[Digits, dict[str, Any], dict[str, int]]] = [
        (WithoutRepair(), {}, {"train": 400, "val": 100}),
        (
            data,
            {"passed": "val", "failed": "repair", "unseen": "test"},
            {"val": 100, "repair": 203, "test": 300},
        ),
        (data, {"passed": loader, "failed": loader}, {"failed": 203}),
        (data, {"passed": "val", "failed": DataLoader(data.val, 7)}, {"val": 100}),
    ]
    for given, arguments, expected in ways:
        report, _ = repaired(tmp_path, given, **arguments)
        assert sizes(report) == expected
        assert [split.role == "unseen" for split in report.splits] == [
            name == "test" for name in expected
        ]
    report, model = repaired(
        tmp_path, data, failed=data.test_dataloader(), unseen=data.repair_dataloader()
    )
    assert sizes(report) == {"train": 400, "failed": 300, "unseen": 203}
    assert_true(report, "failed", model, data.test)


@pytest.mark.parametrize(("ready", "stages"), [(True, ["fit"]), (False, ["fit", "test"])])
def test_unseen_data_are_set_up_once_and_only_if_need_be(
    tmp_path: Path, ready: bool, stages: list[str]
) -> None:
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


@pytest.mark.parametrize(("data", "model"), [(Digits, Classifier), (NamedDigits, NamedClassifier)])
def test_a_target_sees_the_whole_batch_extras_included(
    tmp_path: Path, data: Any, model: Any
) -> None:
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


class OddlyNamed(NamedClassifier):
    keys = ("scan", "digit")


def take_apart(batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    return (batch["scan"],), {}, batch["digit"]


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        (ByKeyword, None),
        (OddlyNamed, take_apart),
        (OddlyNamed, "test_data:take_apart"),
        (OddlyNamed, "test_data.take_apart"),
    ],
)
def test_a_mapping_without_usual_keys_becomes_keywords_or_is_adapted(
    tmp_path: Path, model: Any, adapter: Any
) -> None:
    report, found = repaired(tmp_path, NamedDigits(model.keys), model(), adapter=adapter)
    assert_true(report, "repair", found, Digits().repair)


def test_unseen_data_without_the_target_s_attribute_are_counted_all_the_same(
    tmp_path: Path,
) -> None:
    data = Digits()
    bare = DataLoader(TensorDataset(*data.test.tensors[:2]), 64)
    with pytest.warns(
        UserWarning, match="the failures in the target are not counted on held-out data"
    ):
        report, model = repaired(tmp_path, data, target=Target.where(is_noisy), unseen=bare)
    assert_true(report, "unseen", model, data.test)


class TwoEyes(Wrapped):
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


def test_augmentation_on_the_device_is_left_to_training(tmp_path: Path) -> None:
    data = Digits()
    report, model = repaired(tmp_path, AugmentingDigits())
    assert_true(report, "train", model, data.train)
    assert_true(report, "repair", model, data.repair)
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

    workers = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Jitter(self.train), 32, shuffle=True, num_workers=self.workers)

    def repair_dataloader(self) -> DataLoader:
        workers: dict[str, Any] = (
            {"num_workers": 2, "persistent_workers": True} if self.workers else {}
        )
        return DataLoader(self.repair, 64, shuffle=bool(workers), **workers)


def drawn(data: Dataset[Any], n: int) -> TensorDataset:
    """The samples of a data set as a repair with the seed 0 reads them, one by one, last first."""
    samples = SeededDataset(data, 0)
    columns = zip(*[samples[i] for i in reversed(range(n))][::-1], strict=True)
    return TensorDataset(*(torch.stack(column) for column in columns))


@pytest.mark.parametrize(("draws", "method"), [(1, "auto"), (3, "finetune-polish")])
def test_nothing_breaks_in_the_draws_that_count(
    draws: int, method: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data, model = Jittered(), Classifier()
    callback = RegressionFreeRepair(
        method=method, verbose=False, unseen="test", data=DataOptions(draws=draws)
    )
    before: dict[str, Tensor] = {}

    class Before(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before["train"] = right(model, drawn(Jitter(data.train), 400 * draws))

    quiet_trainer(tmp_path, Before(), callback, max_epochs=3).fit(model, datamodule=data)
    report = callback.report
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


def test_workers_read_the_same_samples_and_draws(tmp_path: Path, trained: Classifier) -> None:
    def report(data: Digits) -> RepairReport:
        return repair(
            quiet_trainer(tmp_path), deepcopy(trained), datamodule=data, callback=quick_repair()
        )

    by_workers = Jittered()
    by_workers.workers = 2
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

    with pytest.warns(
        DataWarning, match="`train` data: 32 of 32 samples that were read twice changed"
    ):
        report, _ = repaired(tmp_path, Unstable())
    assert "No guarantee for `train`" in report.reason


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


def test_the_transform_of_the_validation_data_is_preferred_to_one_draw(tmp_path: Path) -> None:
    report, model = repaired(tmp_path, data := WithTransforms())
    assert_true(report, "train", model, data.train)
    assert report.splits[0].broken == 0
    assert "`train` was read with the `transform` of the validation data." in report.reason


PACKAGE = Path(lightning_nrl.__file__).parent


def test_nothing_else_is_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    repaired(tmp_path, Digits(), unseen="test")
    assert not [
        w for w in recwarn if "HINT" in str(w.message) or PACKAGE in Path(w.filename).parents
    ]


def without_noise(samples: list[Any]) -> Any:
    return [torch.stack(column) for column in zip(*(s for s in samples if not s[2]), strict=True)]


class Lossy(Digits):
    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.repair, 64, collate_fn=without_noise)


def test_a_collate_function_that_drops_samples_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"`repair` data: a batch of 64 samples came with \d+ targets"
    ):
        repaired(tmp_path, Lossy(), Untrainable())


def test_calibration_data_are_counted_limit_the_strength_and_bound_what_breaks(
    tmp_path: Path,
) -> None:
    data = Digits()
    report, model = repaired(tmp_path, data, calibration="val", limit="tolerance:0", unseen="test")
    assert [(split.split, split.role) for split in report.splits] == [
        ("train", "known"),
        ("repair", "known"),
        ("val", "calibration"),
        ("test", "unseen"),
    ]
    split, bounds = report.splits[2], report.bounds
    assert_true(report, "val", model, data.val)
    assert split.broken == 0
    assert (bounds.broken, bounds.n) == (split.broken, split.passed)
    assert bounds.upper >= upper_limit(split.broken, split.passed) - 1e-12
    assert RepairReport.from_json(Path(report.files["json"]).read_text()).bounds == bounds
    assert f"broken {bounds.broken} of {bounds.n}" in Path(report.files["markdown"]).read_text()


class Asked(Digits):
    """Counts how often each of its loaders is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        for split in ("train", "val", "repair", "test"):
            setattr(
                self,
                f"{split}_dataloader",
                partial(self.count, split, getattr(self, f"{split}_dataloader")),
            )

    def count(self, split: str, make: Callable[[], DataLoader]) -> DataLoader:
        self.asked[split] += 1
        return make()


def test_each_loader_is_asked_for_once_a_pass(tmp_path: Path, trained: Classifier) -> None:
    data = Asked()
    callback = quick_repair(unseen="test", calibration="val")
    repair(quiet_trainer(tmp_path), trained, datamodule=data, callback=callback)
    # A pass before, over a batch of each, and the repair itself; and Lightning's own fit, which
    # makes no step.
    assert data.asked == {"train": 3, "val": 2, "repair": 2, "test": 2}


class SeveralValidations(WithoutRepair):
    def val_dataloader(self) -> Any:
        return {"clean": DataLoader(self.val, 64), "noisy": DataLoader(self.repair, 64)}


class Listed(SeveralValidations):
    def val_dataloader(self) -> Any:
        return list(super().val_dataloader().values())


class OddlyIndexed(Listed):
    """One validation loader has a sampler whose `indices` are no numbers."""

    def val_dataloader(self) -> Any:
        sampler = WeightedRandomSampler([1.0], 9)
        sampler.indices = ["one", "two"]
        return [DataLoader(self.val, 64, sampler=sampler), DataLoader(self.repair, 64)]


class ValidatesSeveral(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


class Mixed(SeveralValidations):
    def val_dataloader(self) -> Any:
        return CombinedLoader(super().val_dataloader(), "sequential")


@pytest.mark.parametrize(
    ("kind", "names", "failed"),
    [
        (SeveralValidations, ("val:clean", "val:noisy"), "auto"),
        (Listed, ("val:0", "val:1"), "val"),
        (Mixed, ("val:clean", "val:noisy"), ["val:clean", "val:noisy"]),
    ],
)
def test_all_validation_loaders_are_known(
    tmp_path: Path, kind: type[Digits], names: tuple[str, str], failed: Any
) -> None:
    report, model = repaired(tmp_path, kind(), ValidatesSeveral(), failed=failed)
    assert sizes(report) == {"train": 400, names[0]: 100, names[1]: 203}
    for name, data in zip(names, (Digits().val, Digits().repair), strict=True):
        assert_true(report, name, model, data)
    assert "Not counted" not in report.reason


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        (SeveralValidations, "val:noisy", "val:clean"),
        (Listed, "val:1", "val:0"),
        (OddlyIndexed, "val:1", "val:0"),
    ],
)
def test_one_of_several_validation_loaders_is_named(
    tmp_path: Path, kind: type[Digits], name: str, other: str
) -> None:
    report, model = repaired(tmp_path, kind(), ValidatesSeveral(), failed=name)
    assert sizes(report) == {"train": 400, name: 203}
    assert report.reason.endswith(f"Not counted, so it is unknown what breaks in them: `{other}`.")
    assert_true(report, name, model, Digits().repair)
    with pytest.raises(
        ConfigurationError, match=r"`val` data have no loader '7'.\nHINT: take one of"
    ):
        repaired(tmp_path, kind(), ValidatesSeveral(), failed="val:7")


class MixedTraining(WithoutRepair):
    def train_dataloader(self) -> Any:
        loaders = {"a": super().train_dataloader(), "b": DataLoader(self.repair, 32)}
        return CombinedLoader(loaders, "max_size_cycle")


class TrainsOnTwo(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(super(TrainsOnTwo, self).training_step(one, batch_idx) for one in batch.values())


def test_all_samples_of_mixed_batches_are_known(tmp_path: Path) -> None:
    callback = quick_repair(method="finetune-polish")
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(TrainsOnTwo(), datamodule=MixedTraining())
    assert sizes(callback.report) == {"train:a": 400, "train:b": 203, "val": 100}
    assert callback.report.steps[0].note.startswith("continued training")


@pytest.mark.parametrize(
    ("arguments", "n", "said"),
    [
        (
            {"overfit_batches": 2},
            [64, 128],
            "`overfit_batches`: known data are 64 samples of `train`",
        ),
        (
            {"overfit_batches": 0.5},
            [192, 128],
            "`overfit_batches`: known data are 192 samples of `train`",
        ),
        (
            {"limit_train_batches": 2},
            [400, 203],
            "All 400 samples of `train` are known data, whatever",
        ),
        (
            {"limit_train_batches": 0.5},
            [400, 203],
            "All 400 samples of `train` are known data, whatever",
        ),
        ({"limit_val_batches": 0}, [400, 203], ""),
    ],
)
def test_limits_of_batches_and_known_data(
    tmp_path: Path, arguments: dict[str, Any], n: list[int], said: str
) -> None:
    callback = quick_repair()
    quiet_trainer(tmp_path, callback, max_epochs=1, **arguments).fit(
        Classifier(), datamodule=Digits()
    )
    assert [split.n for split in callback.report.splits] == n
    assert said in callback.report.reason
    assert ("batches`" in callback.report.reason) == bool(said)


class SplitAnew(WithoutRepair):
    """Splits at random in every `setup`; test data are there after their own."""

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
def test_test_data_that_a_new_split_makes_known_are_noticed(
    tmp_path: Path, kind: type[Digits]
) -> None:
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


class Paired(NamedClassifier):
    """Fails where a batch has another number of names than of images."""

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        assert len(batch["name"]) == len(batch["image"])
        return super().training_step(batch, batch_idx)


def test_the_training_of_a_repair_goes_on_with_changed_targets(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def darker(batch: Any) -> Any:
        seen.append(batch["label"])
        return {**batch, "image": batch["image"] / 2}

    repair = quick_repair(
        method="finetune-polish", target=Target.label(3), data=DataOptions(augment=darker)
    )
    torch.manual_seed(0)
    quiet_trainer(tmp_path, repair, max_epochs=2).fit(Paired(), datamodule=NamedDigits())
    assert repair.report.steps[0].note == "continued training, 16 epochs"
    targets = repair.report.pooled("known").counts.targeted
    assert torch.cat(seen).unique().tolist() == [3]
    # Each once in eight epochs, but for what a last batch drops, and at most twice in the other
    # eight.
    assert 15 * targets < len(torch.cat(seen)) < 24 * targets


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (
            lambda batch: batch[:2],
            "`augment`: it returned a batch of 2 parts, but other batches have 3",
        ),
        (
            lambda batch: [batch[0].repeat(1, 1, 1, 2), *batch[1:]],
            "`augment`: Sizes of tensors must match",
        ),
        (lambda batch: 1 / 0, "`augment` raised ZeroDivisionError"),
    ],
)
def test_changed_targets_that_do_not_fit_say_so(
    tmp_path: Path, trained: Classifier, augment: Any, message: str
) -> None:
    given: dict[str, Any] = {
        "method": "finetune-polish",
        "data": DataOptions(augment=augment),
        "verbose": False,
    }
    with pytest.warns(TrainingWarning, match=message):
        report = repair(quiet_trainer(tmp_path), trained, datamodule=Digits(), **given)
    assert report.pooled("known").counts.broken == 0


def test_doubted_labels_are_set_aside_and_listed(tmp_path: Path) -> None:
    model, data = Classifier(), Digits()
    quiet_trainer(tmp_path, max_epochs=6).fit(model, datamodule=data)
    arguments: dict[str, Any] = {"method": "convex", "dirpath": tmp_path, "verbose": False}
    plain = repair(quiet_trainer(tmp_path), model, datamodule=data, **arguments)
    images, labels, _ = data.repair.tensors
    sure = model.eval()(images).softmax(1).amax(1)
    wrong = [
        i for i in sure.argsort(descending=True).tolist() if i not in plain.splits[1].targeted_ids
    ][:3]
    labels[wrong] = (labels[wrong] + 1) % 10  # wrong labels, where the model was surest
    arguments["samples"] = SampleOptions(set_aside="doubtful")
    report = repair(quiet_trainer(tmp_path), model, datamodule=data, **arguments)
    aside = {one.id: one for one in report.set_aside}
    assert set(wrong) <= set(aside)
    assert not set(aside) & set(report.splits[1].targeted_ids)
    assert aside[wrong[0]].why == "its label looks wrong"
    assert aside[wrong[0]].label == int(labels[wrong[0]])
