"""Regressions counted in every validation."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Untrainable,
    digit,
    mlp,
    quiet_trainer,
    right,
    same,
)
from distributed_fit import Frozen
from lightning_package import (
    Callback,
    EarlyStopping,
    LightningModule,
    ModelCheckpoint,
    Trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset, TensorDataset
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, OldModel, RegressionMetrics
from lightning_nrl.updates import Predictions

KEYS = {
    "nfr",
    "pfr",
    "relative_nfr",
    "btc",
    "bec",
    "broken",
    "repaired",
    "accuracy",
    "reference_accuracy",
}


class Noisy(Digits):
    """Validates on the repair data, 203 samples in batches of 64, half of them with noise."""

    def __init__(self, n: int = 203, **loader: Any) -> None:
        super().__init__()
        self.n, self.loader = n, loader

    @property
    def counted(self) -> TensorDataset:
        return TensorDataset(*(x[: self.n] for x in self.repair.tensors))

    def val_dataloader(self) -> Any:
        return DataLoader(Subset(self.repair, range(self.n)), **{"batch_size": 64, **self.loader})


def by_hand(was: Tensor, now: Tensor) -> dict[str, float]:
    """All metrics, from which samples the two models get right."""
    n, broken, repaired = len(was), int((was & ~now).sum()), int((~was & now).sum())
    errors, passed = int((~now).sum()), int(was.sum())
    return {
        "nfr": broken / n,
        "pfr": repaired / n,
        "relative_nfr": (broken / n) / (passed / n * errors / n) if passed and errors else math.nan,
        "btc": 1 - broken / passed if passed else 1.0,
        "bec": (errors - broken) / errors if errors else math.nan,
        "broken": broken,
        "repaired": repaired,
        "accuracy": 1 - errors / n,
        "reference_accuracy": passed / n,
    }


def logged(metrics: Any, prefix: str = "regression") -> dict[str, float]:
    """The values below one prefix."""
    return {key: float(metrics[f"{prefix}/{key}"]) for key in KEYS if f"{prefix}/{key}" in metrics}


def close(found: dict[str, float], expected: dict[str, float]) -> bool:
    return found == pytest.approx(expected, rel=1e-5, nan_ok=True)


class Witness(Callback):
    """Notes each validation what was logged, and which samples a plain forward pass of its own gets
    right.
    """

    def __init__(self, data: TensorDataset, passes: list[int] | None = None) -> None:
        self.data, self.passes = data, passes
        self.logged = []
        self.right = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            assert not logged(trainer.callback_metrics)
            return
        if self.passes is not None:
            self.passes.append(pl_module.passes)
        self.right.append(right(pl_module, self.data))
        self.logged.append({name: float(x) for name, x in trainer.callback_metrics.items()})


def fit(
    folder: Path,
    *callbacks: Callback,
    data: Any = None,
    model: LightningModule | None = None,
    **arguments: Any,
) -> Trainer:
    arguments = {"enable_checkpointing": False, "max_epochs": 2, **arguments}
    trainer = quiet_trainer(folder, *callbacks, **arguments)
    trainer.fit(model or Classifier(lr=0.02), datamodule=data or Noisy())
    return trainer


@pytest.mark.parametrize("form", ["path", "predictions"])
def test_every_validation_counts_as_two_plain_passes_do(form, old, trained_path, tmp_path):
    data, reference = Noisy(), trained_path
    was = right(old, data.counted)
    if form == "predictions":
        answers = torch.where(was, data.counted.tensors[1], 10).tolist()
        reference = Predictions({"val": {at: (answer, None) for at, answer in enumerate(answers)}})
    witness = Witness(data.counted)
    metrics = RegressionMetrics(reference)
    fit(tmp_path, metrics, witness, data=data, val_check_interval=6, max_epochs=1)
    assert len(witness.logged) == 2
    for found, now in zip(witness.logged, witness.right, strict=True):
        assert close(logged(found), by_hand(was, now))
        assert found["regression/broken"] > 0
        assert {name for name in found if name.startswith("regression")} == {
            f"regression/{key}" for key in KEYS
        }


def test_slices_are_counted_apart(old, tmp_path):
    data = Noisy()
    witness, metrics = Witness(data.counted), RegressionMetrics(old, slices=digit, prefix="old")
    fit(tmp_path, metrics, witness, data=data, max_epochs=1)
    was, now, label = right(old, data.counted), witness.right[0], data.counted.tensors[1]
    found = witness.logged[0]
    for name in range(10):
        rows = label == name
        assert close(logged(found, f"old/{name}"), by_hand(was[rows], now[rows]))
    assert close(logged(found, "old"), by_hand(was, now))


class Counting(Classifier):
    """Counts the passes of its network."""

    def __init__(self, style: str = "self") -> None:
        super().__init__()
        self.style, self.passes = style, 0
        self.network.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.passes += 1

    def on_validation_epoch_start(self) -> None:
        self.passes = 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.style == "part":
            self.network(batch[0])
        elif self.style == "halves":
            for half in batch[0].split(32):
                self(half)
        elif self.style == "twice":
            self(batch[0].flip(2))
            self(batch[0])
        else:
            self(batch[0])


@pytest.mark.parametrize(
    ("style", "passes"), [("self", 4), ("part", 4), ("twice", 8), ("halves", 10)]
)
def test_no_pass_is_made_but_the_step_s_own(style, passes, old, tmp_path, recwarn):
    data, model = Noisy(), Counting(style)
    witness = Witness(data.counted, passes=[])
    fit(tmp_path, RegressionMetrics(old), witness, data=data, model=model, max_epochs=1)
    # There are four batches; the last one has 11 samples, which are one call.
    assert witness.passes == [passes]
    warned = [w for w in recwarn if "each batch costs one more pass" in str(w.message)]
    assert bool(warned) == (style == "halves")
    assert close(logged(witness.logged[0]), by_hand(right(old, data.counted), witness.right[0]))


def test_one_of_several_loaders_counts(old, tmp_path):
    data, metrics = Several(), RegressionMetrics(old, dataloader=1)
    witness = Witness(data.val)
    fit(tmp_path, metrics, witness, data=data, model=Counting(), max_epochs=1)
    assert close(logged(witness.logged[0]), by_hand(right(old, data.val), witness.right[0]))


def test_a_validation_alone_counts_the_same(trained_path, old, tmp_path):
    data = Noisy()
    trainer = quiet_trainer(tmp_path, RegressionMetrics(old))
    (metrics,) = trainer.validate(
        model := Classifier(), datamodule=data, ckpt_path=trained_path, verbose=False
    )
    assert close(logged(metrics), by_hand(right(old, data.counted), right(model, data.counted)))


def test_checkpoints_and_early_stopping_follow_it(old, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="regression/nfr", filename="{epoch}", mode="min")
    stop = EarlyStopping("regression/btc", patience=1, mode="max", min_delta=1.0)
    data = Noisy()
    witness = Witness(data.counted)
    metrics = RegressionMetrics(old)
    trainer = fit(
        tmp_path, witness, best, stop, metrics, data=data, enable_checkpointing=True, max_epochs=9
    )
    assert trainer.current_epoch == 2
    rates = [found["regression/nfr"] for found in witness.logged]
    assert float(best.best_model_score) == pytest.approx(min(rates))
    again = Classifier.load_from_checkpoint(best.best_model_path)
    was, now = right(old, data.counted), right(again, data.counted)
    assert by_hand(was, now)["nfr"] == pytest.approx(min(rates))


def test_only_what_is_validated_counts_and_everything_is_left_as_found(old, tmp_path):
    data = Noisy()
    few = TensorDataset(*(x[:128] for x in data.repair.tensors))
    trained = []
    for callback in (RegressionMetrics(old), Callback()):
        torch.manual_seed(1)
        witness, model = Witness(few), Classifier("cnn", lr=0.02)
        fit(tmp_path, callback, witness, data=data, model=model, limit_val_batches=2)
        trained.append(model.state_dict())
        assert not model._forward_hooks
        if isinstance(callback, RegressionMetrics):
            assert close(logged(witness.logged[-1]), by_hand(right(old, few), witness.right[-1]))
    assert same(trained[0], trained[1])


class Several(Noisy):
    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), DataLoader(self.val, 50)]


class Drawn(BatchSampler):
    """Batches in another order each time."""

    def __iter__(self) -> Any:
        batches = list(super().__iter__())
        return iter([batches[i] for i in torch.randperm(len(batches))])


@pytest.mark.filterwarnings(
    "ignore:Your `val_dataloader`'s sampler", "ignore:Total length of `list`"
)
@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (
            Noisy(shuffle=True),
            {},
            r"`val` data: RandomSampler gives .* another order each time\.\nHINT: validate without",
        ),
        (
            Noisy(batch_size=1, batch_sampler=Drawn(range(203), 8, drop_last=False)),
            {},
            r"`val` data: Drawn gives .* another order each time",
        ),
        (Noisy(), {"dataloader": 1}, r"`dataloader=1`: there are 1 .*\nHINT: count them from 0"),
        (
            Noisy(),
            {"slices": lambda batch: batch[0]},
            r"`slices` returned Tensor .*64 samples\.\nHINT: return one name",
        ),
        (Noisy(), {"reference": nn.Linear(3, 2).state_dict()}, "`reference` lacks"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(data, arguments, message, tmp_path):
    metrics = RegressionMetrics(**{"reference": OldModel(mlp()), **arguments})
    # Without the sanity check, in which some of these data would fail on their own.
    with pytest.raises(ConfigurationError, match=re.compile(message, re.DOTALL)):
        fit(tmp_path, metrics, data=data, model=Untrainable(), num_sanity_val_steps=0)


def test_labels_that_moved_are_noticed(old, tmp_path):
    data = Noisy()
    images, labels, noisy = data.repair.tensors
    moving = labels.clone()
    data.repair = TensorDataset(images, moving, noisy)

    class Moving(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            moving[:2] = (labels[:2] + 1) % 10

    with pytest.raises(ConfigurationError, match=r"2 samples have another label than when"):
        fit(tmp_path, RegressionMetrics(old), Moving(), data=data)


def distributed_fits(folder: Path, strategy: str, devices: int) -> dict[str, dict[str, float]]:
    """Metrics by slice of fits that take no step: an even split, and odd ones, where ranks see
    copies.
    """

    class Still(Frozen):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(
                self.network(batch[0]) if self.inside else self(batch[0]), batch[1]
            )

    found = {}
    for n, inside in ((200, False), (203, True), (3, False)):
        metrics = RegressionMetrics(OldModel(folder / "trained.ckpt"), slices=digit)
        model = Still()
        model.inside = inside
        where = {"strategy": strategy, "devices": devices, "limit_train_batches": 1}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="`validation_step` does not call")
            trainer = fit(folder, metrics, data=Noisy(n), model=model, max_epochs=1, **where)
        found[str(n)] = {
            name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name
        }
    return found


def test_two_processes_count_as_one(trained_path):
    alone = distributed_fits(trained_path.parent, "auto", 1)
    for together in in_two_processes(distributed_fits, trained_path.parent, "ddp", 2):
        assert alone.keys() == together.keys()
        for n, found in alone.items():
            assert together[n] == pytest.approx(found, nan_ok=True), n
    assert alone["200"]["regression/broken"] > 0


def test_loaders_of_ones_own_are_counted_instead(old, tmp_path):
    """The validation shuffles its data, which are refused by themselves."""
    data = Noisy(batch_size=64, shuffle=True)
    suite = data.counted
    stream = DataLoader(AsStream(suite), 20)
    metrics = RegressionMetrics(old, loaders={"suite": DataLoader(suite, 64), "stream": stream})
    witness = Witness(suite)
    fit(tmp_path, metrics, witness, data=data)
    assert len(witness.logged) == 2
    for values, now in zip(witness.logged, witness.right, strict=True):
        expected = by_hand(right(old, suite), now)
        assert close(logged(values, "regression/suite"), expected)
        assert close(logged(values, "regression/stream"), expected)
        assert not logged(values)


class AsStream(IterableDataset):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        yield from self.data
