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
    is_noisy,
    mlp,
    quiet_trainer,
    right,
    same,
)
from distributed_fit import Frozen
from lightning_package import (
    Callback,
    CombinedLoader,
    CSVLogger,
    EarlyStopping,
    LightningModule,
    ModelCheckpoint,
    TensorBoardLogger,
    Trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, OldModel, RegressionMetrics, Target
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

    def __init__(self, data: TensorDataset) -> None:
        self.data = data
        self.logged: list[dict[str, float]] = []
        self.right: list[Tensor] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.right.append(right(pl_module, self.data))
            self.logged.append(
                {name: float(value) for name, value in trainer.callback_metrics.items()}
            )
        else:
            assert not logged(trainer.callback_metrics)


def fit(
    folder: Path, metrics: RegressionMetrics, *more: Callback, data: Any = None, **arguments: Any
) -> Trainer:
    model = arguments.pop("model") if "model" in arguments else Classifier(lr=0.02)
    trainer = quiet_trainer(
        folder, metrics, *more, **{"enable_checkpointing": False, "max_epochs": 2, **arguments}
    )
    trainer.fit(model, datamodule=data or Noisy())
    return trainer


@pytest.mark.parametrize("form", ["path", "module", "predictions"])
def test_every_validation_counts_as_two_plain_passes_do(
    form: str, old: Classifier, trained_path: Path, tmp_path: Path
) -> None:
    data = Noisy()
    was = right(old, data.counted)
    said = {
        at: (int(data.counted.tensors[1][at]) if ok else 10, None)
        for at, ok in enumerate(was.tolist())
    }
    reference = {"path": trained_path, "module": old, "predictions": Predictions({"val": said})}[
        form
    ]
    witness = Witness(data.counted)
    fit(
        tmp_path,
        RegressionMetrics(reference),
        witness,
        data=data,
        val_check_interval=6,
        max_epochs=1,
    )
    assert len(witness.logged) == 2
    for found, now in zip(witness.logged, witness.right, strict=True):
        assert close(logged(found), by_hand(was, now))
        assert found["regression/broken"] > 0
        assert {name for name in found if name.startswith("regression")} == {
            f"regression/{key}" for key in KEYS
        }


def small_or_large(batch: Any) -> list[str]:
    return ["<5" if label < 5 else ">=5" for label in batch[1].tolist()]


@pytest.mark.parametrize(
    "slices", ["digit_models:digit", Target.label(3), is_noisy, small_or_large]
)
def test_slices_are_counted_apart(slices: Any, old: Classifier, tmp_path: Path) -> None:
    data = Noisy()
    witness = Witness(data.counted)
    fit(
        tmp_path,
        RegressionMetrics(old, slices=slices, prefix="old"),
        witness,
        data=data,
        max_epochs=1,
    )
    was, now = right(old, data.counted), witness.right[0]
    _, label, noisy = data.counted.tensors
    if slices is small_or_large:
        groups = {"5": label < 5, "5_2": label >= 5}
    elif isinstance(slices, str):
        groups = {str(k): label == k for k in range(10)}
    else:
        groups = {"is_noisy": noisy} if slices is is_noisy else {"label_3": label == 3}
    for name, rows in groups.items():
        assert close(logged(witness.logged[0], f"old/{name}"), by_hand(was[rows], now[rows]))
    assert close(logged(witness.logged[0], "old"), by_hand(was, now))
    assert len([name for name in witness.logged[0] if name.endswith("/nfr")]) == len(groups) + 1


class Counting(Classifier):
    """Counts its forward passes, and those of its network."""

    def __init__(self, style: str = "self") -> None:
        super().__init__()
        self.style, self.passes = style, 0
        self.network.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.passes += 1

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.style == "part":
            self.network(batch[0])
        elif self.style == "inside":
            self.network[1:](self.network[0](batch[0]))
            self.passes += 1
        elif self.style == "halves":
            for half in batch[0].split(40):
                self(half)
        elif self.style == "twice":
            self(batch[0].flip(2))
            self(batch[0])
        else:
            self(batch[0])


@pytest.mark.parametrize(
    ("style", "passes"), [("self", 1), ("part", 1), ("twice", 2), ("inside", 2), ("halves", 3)]
)
def test_no_pass_is_made_but_the_step_s_own(
    style: str, passes: int, old: Classifier, tmp_path: Path
) -> None:
    data, model = Noisy(), Counting(style)
    counts = []

    class Passes(Callback):
        def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            model.passes = 0

        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            counts.append(model.passes)

    witness = Witness(data.counted)
    arguments: dict[str, Any] = {"data": data, "model": model, "max_epochs": 1}
    if style in ("inside", "halves"):
        with pytest.warns(
            UserWarning, match=r"each batch costs one more pass\.\nHINT: call `self\(x\)`"
        ):
            fit(tmp_path, RegressionMetrics(old), Passes(), witness, **arguments)
    else:
        fit(tmp_path, RegressionMetrics(old), Passes(), witness, **arguments)
    # The callback does not look at the sanity check's two batches; the last batch has 11 samples,
    # which are one call.
    assert counts == {"inside": [2, 8], "halves": [4, 10]}.get(style, [2 * passes, 4 * passes])
    assert close(logged(witness.logged[0]), by_hand(right(old, data.counted), witness.right[0]))


def test_checkpoints_and_early_stopping_follow_it(old: Classifier, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="regression/nfr", filename="{epoch}", mode="min")
    stop = EarlyStopping("regression/btc", patience=1, mode="max", min_delta=1.0)
    data = Noisy()
    witness = Witness(data.counted)
    metrics = RegressionMetrics(old)
    trainer = fit(
        tmp_path, witness, best, stop, metrics, data=data, enable_checkpointing=True, max_epochs=9
    )  # type: ignore[arg-type]
    assert trainer.current_epoch == 2
    rates = [found["regression/nfr"] for found in witness.logged]
    assert float(best.best_model_score) == pytest.approx(min(rates))  # type: ignore[arg-type]
    again = Classifier.load_from_checkpoint(best.best_model_path)
    was, now = right(old, data.counted), right(again, data.counted)
    assert by_hand(was, now)["nfr"] == pytest.approx(min(rates))


def test_a_resumed_fit_and_validation_alone_count_the_same(
    trained_path: Path, old: Classifier, tmp_path: Path
) -> None:
    data, witness = Noisy(), Witness(Noisy().counted)
    fit(
        tmp_path,
        RegressionMetrics(old),
        witness,
        data=data,
        enable_checkpointing=True,
        max_epochs=2,
    )
    (saved,) = tmp_path.rglob("epoch=1*.ckpt")
    metrics = RegressionMetrics(trained_path)
    resumed = quiet_trainer(tmp_path, metrics, again := Witness(data.counted), max_epochs=3)
    resumed.fit(model := Classifier(), datamodule=data, ckpt_path=saved)
    assert close(
        logged(again.logged[0]), by_hand(right(old, data.counted), right(model, data.counted))
    )
    alone = quiet_trainer(tmp_path, RegressionMetrics(trained_path))
    (found,) = alone.validate(Classifier(), datamodule=data, ckpt_path=saved, verbose=False)
    assert close(logged(found), logged(witness.logged[-1]))


def test_only_what_is_validated_counts_and_everything_is_left_as_found(
    old: Classifier, tmp_path: Path
) -> None:
    data = Noisy()
    few = TensorDataset(*(x[:128] for x in data.repair.tensors))
    trained = []
    for callback in (RegressionMetrics(old), Callback()):
        torch.manual_seed(1)
        witness, model = Witness(few), Classifier("cnn", lr=0.02)
        fit(tmp_path, callback, witness, data=data, model=model, limit_val_batches=2)  # type: ignore[arg-type]
        trained.append(model.state_dict())
        assert not model._forward_hooks
        if isinstance(callback, RegressionMetrics):
            assert close(logged(witness.logged[-1]), by_hand(right(old, few), witness.right[-1]))
    assert same(trained[0], trained[1])
    fit(tmp_path, RegressionMetrics(old), fast_dev_run=True)
    fit(tmp_path, RegressionMetrics(old), limit_val_batches=0)
    trainer = fit(tmp_path, RegressionMetrics(old), check_val_every_n_epoch=2)
    assert len(logged(trainer.callback_metrics)) == len(KEYS)


class Several(Noisy):
    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), DataLoader(self.val, 50)]


class Renewed(Noisy):
    """Validates other data from the second epoch on."""

    asked = 0

    def val_dataloader(self) -> Any:
        self.asked += 1
        return DataLoader(self.repair if self.asked == 1 else self.test, 64)


def test_one_of_several_loaders_counts_and_renewed_data_count_anew(
    old: Classifier, tmp_path: Path
) -> None:
    data: Any = Several()
    for at, counted in enumerate((data.counted, data.val)):
        witness, model = Witness(counted), Counting()
        fit(
            tmp_path,
            RegressionMetrics(old, dataloader=at),
            witness,
            data=data,
            model=model,
            max_epochs=1,
        )
        assert close(logged(witness.logged[0]), by_hand(right(old, counted), witness.right[0]))
    data, renews = Renewed(), {"reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0}
    fit(tmp_path, RegressionMetrics(old), witness := Witness(data.test), data=data, **renews)
    assert data.asked == 2
    assert close(logged(witness.logged[1]), by_hand(right(old, data.test), witness.right[1]))


@pytest.mark.parametrize("how", ["whole", "in place", "part"])
def test_compiled_modules_need_no_more_passes(
    how: str, old: Classifier, tmp_path: Path, recwarn: Any
) -> None:
    data, model = Noisy(), Classifier()
    if how == "whole":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.network = torch.compile(model.network, backend="eager")
    witness = Witness(data.counted)
    fit(
        tmp_path,
        RegressionMetrics(OldModel(old)),
        witness,
        data=data,
        model=model,
        limit_train_batches=2,
    )
    assert close(logged(witness.logged[1]), by_hand(right(old, data.counted), witness.right[1]))
    assert not [w for w in recwarn if "one more pass" in str(w.message)]


def test_mixed_precision_and_loggers(old: Classifier, tmp_path: Path) -> None:
    # Nothing was right: the relative rate is undefined.
    perfect = Predictions({"val": dict.fromkeys(range(203), (-1, None))})
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer = fit(tmp_path, RegressionMetrics(perfect), precision="bf16-mixed", logger=loggers)
    found = logged(trainer.logged_metrics)
    assert math.isnan(found["relative_nfr"])
    assert (found["nfr"], found["btc"], found["reference_accuracy"]) == (0, 1, 0)
    assert found["pfr"] == found["accuracy"]
    assert "regression/relative_nfr" in Path(loggers[0].log_dir, "metrics.csv").read_text()


class Empty(Noisy):
    def val_dataloader(self) -> Any:
        return []


class Mixed(Noisy):
    def val_dataloader(self) -> Any:
        return CombinedLoader([super().val_dataloader(), super().val_dataloader()], "min_size")


def ids(batch: Any) -> Any:
    return (batch[0].flatten(1) @ torch.arange(64.0) * 1e4).long()


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
        (Empty(), {}, "`val` data: 0 data loaders at once"),
        (Noisy(), {"dataloader": 1}, r"`dataloader=1`: there are 1 .*\nHINT: count them from 0"),
        (Mixed(), {}, "`dataloader`: a CombinedLoader in the mode 'min_size' mixes 2"),
        (
            Noisy(batch_size=None),
            {},
            r"`val` data: .*\nHINT: give the validation data as a DataLoader",
        ),
        (
            Noisy(),
            {"slices": lambda batch: batch[0]},
            r"`slices` returned Tensor .*64 samples\.\nHINT: return one name",
        ),
        (
            Noisy(),
            {"slices": lambda batch: batch["kind"]},
            r"`slices` raised TypeError.*\nHINT: a function gets the",
        ),
        (
            Noisy(),
            {"slices": Target.confusion(3, 5)},
            r"`slices` raised TargetError.*asks for classes",
        ),
        (Noisy(), {"slices": ids}, r"`slices` gave 2\d\d slices"),
        (Noisy(), {"reference": nn.Linear(3, 2).state_dict()}, "`reference` lacks"),
        (
            Noisy(),
            {"reference": Predictions({"val": {0: (1, None)}})},
            "202 of 203 samples of `val` have no prediction",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    data: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    metrics = RegressionMetrics(**{"reference": OldModel(mlp()), **arguments})
    # Without the sanity check, in which some of these data would fail on their own.
    with pytest.raises(ConfigurationError, match=re.compile(message, re.DOTALL)):
        fit(tmp_path, metrics, data=data, model=Untrainable(), num_sanity_val_steps=0)


def test_labels_that_moved_are_noticed(old: Classifier, tmp_path: Path) -> None:
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
        means: dict[str, Any] = {
            "max_epochs": 1,
            "limit_train_batches": 1,
            "enable_checkpointing": False,
        }
        trainer = quiet_trainer(folder, metrics, strategy=strategy, devices=devices, **means)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="`validation_step` does not call")
            trainer.fit(model, datamodule=Noisy(n))
        found[str(n)] = {
            name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name
        }
    return found


def test_two_processes_count_as_one(trained_path: Path) -> None:
    alone = distributed_fits(trained_path.parent, "auto", 1)
    for together in in_two_processes(distributed_fits, trained_path.parent, "ddp", 2):
        assert alone.keys() == together.keys()
        for n, found in alone.items():
            assert together[n] == pytest.approx(found, nan_ok=True), n
    assert alone["200"]["regression/broken"] > 0
