"""Training that goes on, by real trainers: on which data, in which way, and without a trace."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning_package import (
    NAME,
    Callback,
    CombinedLoader,
    CSVLogger,
    EarlyStopping,
    LightningDataModule,
    LightningModule,
    ModelCheckpoint,
    ModelPruning,
    Trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    get_worker_info,
)
from torchmetrics.classification import MulticlassAccuracy
from toy_repairs import blobs

from lightning_nrl._trainer import continue_training as continuing_module
from lightning_nrl._trainer import time_budget as budget_module
from lightning_nrl._trainer.continue_training import ContinuedTraining, ShuffledSampler
from lightning_nrl._trainer.lightning.private_parts import validating
from lightning_nrl._trainer.loaders import make_source
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import TrainingWarning

TRAIN, FAILED, MORE = 50, 21, ("rate", "renew", "weight")
pytestmark = pytest.mark.filterwarnings(f"ignore::UserWarning:{NAME}", "ignore::FutureWarning")


class Points(Dataset):
    """`(point, class, number)`; failed samples have numbers from 100 on."""

    def __init__(self, n: int, first: int = 0, shift: float = 0.0) -> None:
        self.points, self.labels = blobs(n, shift, seed=first)
        self.first = first

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        return self.points[i], self.labels[i], self.first + i


class Net(LightningModule):
    """Writes down what it is trained on; the notes are the class's, so that those of a copy are
    there too.
    """

    notes: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(4, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def note(self, *what: Any) -> None:
        self.notes.append(what)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note("batch", self.current_epoch, *batch[2].tolist())
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Continue(Callback):
    """Goes on with the training where a repair would."""

    def __init__(
        self, failed: Any = None, passed: Any = None, seconds: float = math.inf, **given: Any
    ) -> None:
        self.failed = failed if failed is not None else DataLoader(Points(FAILED, 100, 1.5), 64)
        self.passed, self.seconds, self.given = passed, seconds, given
        self.states: list[Any] = []
        self.found: list[Any] = []
        self.told: list[Any] = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Net.notes.clear()
        with validating(trainer):
            passed = self.passed if self.passed is not None else trainer.train_dataloader
            known = [
                make_source(passed, "train", trainer=trainer, model=pl_module, passed=True),
                make_source(self.failed, "repair", trainer=trainer, model=pl_module, failed=True),
            ]
            seeds, more = (
                self.given.get("seeds", (0,)),
                {k: v for k, v in self.given.items() if k in MORE},
            )
            how = {"left_out": (Continue,), "trained_on": self.given.get("trained_on")}
            training = ContinuedTraining(
                trainer, pl_module, known, self.given.get("epochs", 3), **how
            )
            before = picture(trainer, pl_module)
            with preserve_state(pl_module):
                # As in a repair: told of the targets while the model is in evaluation mode.
                training = training.for_targets(
                    torch.zeros(sum(len(one.index) for one in known), dtype=torch.bool)
                )
                for seed in seeds:
                    found = training(
                        seconds=self.seconds, seed=seed, clock=StageTimer(self), **more
                    )
                    self.states.append(found and found.state)
                    self.found.append(found)
            assert_same(before, picture(trainer, pl_module))

    def stage(self, name: str) -> Any:
        raise AssertionError("no stage is entered here")

    def search(self, *progress: int) -> None:
        self.told.append(progress)

    def announce(self, text: str) -> None:
        raise AssertionError("nothing is announced here")


def picture(trainer: Trainer, model: LightningModule) -> Any:
    """All that must be as it was, whatever is trained."""
    return [
        {name: value.clone() for name, value in model.state_dict().items()},
        [
            parameter.grad if parameter.grad is None else parameter.grad.clone()
            for parameter in model.parameters()
        ],
        [(module.training, sorted(vars(module))) for module in model.modules()],
        [optimizer.state_dict() for optimizer in trainer.optimizers],
        dict(trainer.callback_metrics),
        [
            trainer.state.stage.value,
            trainer.global_step,
            trainer.current_epoch,
            trainer.should_stop,
        ],
        [model.trainer is trainer, torch.is_grad_enabled(), torch.get_default_dtype()],
        [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark],
        [torch.get_rng_state(), np.random.get_state()[1], random.getstate()],
    ]


def assert_same(a: Any, b: Any) -> None:
    (one, spec), (other, other_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert spec == other_spec
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)


def train_loader(data: Any = None, **arguments: Any) -> DataLoader:
    return DataLoader(
        data if data is not None else Points(TRAIN),
        **{"batch_size": 16, "shuffle": True, **arguments},
    )


def fit(model: Any, callback: Continue, data: Any = None, **arguments: Any) -> Any:
    """Trains for an epoch, then goes on; the state after that."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
    }
    shown = {"enable_progress_bar": False, "enable_model_summary": False}
    torch.manual_seed(0)
    callbacks = [*arguments.pop("callbacks", ()), callback]
    trainer = Trainer(**{**defaults, **shown, **arguments}, callbacks=callbacks)
    data = data if data is not None else train_loader()
    trainer.fit(model, datamodule=data) if isinstance(data, LightningDataModule) else trainer.fit(
        model, data
    )
    return callback.states[0]


def moved(state: Any, model: LightningModule) -> set[str]:
    return {
        name for name, value in model.state_dict().items() if not torch.equal(state[name], value)
    }


def noted(kind: str) -> list[Any]:
    return [what[1:] for what in Net.notes if what[0] == kind]


def test_every_known_sample_is_trained_on_once_an_epoch_in_a_new_order() -> None:
    callback = Continue(epochs=2)
    model = Net()
    state = fit(model, callback)
    epochs = [
        [i for batch in noted("batch") if batch[0] == epoch for i in batch[1:]] for epoch in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(TRAIN), *range(100, 100 + FAILED)]
    assert epochs[0] != epochs[1]
    assert [len(batch) - 1 for batch in noted("batch")] == [16, 16, 16, 16, 7] * 2
    assert callback.told == [(done, 10, None, None) for done in range(1, 11)]
    assert state.keys() == model.state_dict().keys()
    assert moved(state, model) == set(state)
    assert int(state["body.1.num_batches_tracked"] - model.body[1].num_batches_tracked) == 10


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "half": {"precision": "bf16-mixed"},
    "double": {"precision": "64-true"},
    "clipped": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_the_same_weights_to_the_bit(way: str) -> None:
    callback = Continue(seeds=(3, 3, 4))
    fit(Net(), callback, **WAYS[way])
    first, again, other = callback.states
    assert_same(first, again)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    if way != "plain":
        assert not torch.equal(
            first["head.weight"].float(), fit(Net(), Continue(seeds=(3,)))["head.weight"]
        )


class Waiting(Net):
    """Waits for a validation loss, which there is none of here."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"},
        }

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("validation")
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_nothing_is_validated_and_a_schedule_that_waits_for_it_waits() -> None:
    class Both(LightningDataModule):
        train_dataloader = staticmethod(train_loader)
        val_dataloader = staticmethod(train_loader)

    assert fit(Waiting(), Continue(), Both()) is not None
    assert noted("validation") == []


class Doubled(Points):
    """A view of the training data that augments."""

    def __getitem__(self, i: int) -> Any:
        Net.notes.append(("seen", i))
        point, label, number = super().__getitem__(i)
        return 2 * point, label, number


@pytest.mark.parametrize("clean", [None, DataLoader(Points(TRAIN), 64)])
def test_training_data_are_augmented_by_their_data_set(clean: Any) -> None:
    """Also where a view of them without augmentation serves as passed data."""
    assert fit(Net(), Continue(passed=clean, epochs=2), train_loader(Doubled(TRAIN))) is not None
    seen = [i for (i,) in noted("seen")][-2 * TRAIN :]
    assert sorted(seen) == sorted([*range(TRAIN)] * 2)


def augment(self: Any, batch: Any, dataloader_idx: int) -> Any:
    if self.trainer.training:
        Net.notes.append(("augmented", type(self).__name__))
        return 2 * batch[0], *batch[1:]
    return batch


class AugmentingNet(Net):
    on_after_batch_transfer = augment


class AugmentingData(LightningDataModule):
    on_after_batch_transfer = augment

    def setup(self, stage: str) -> None:
        Net.notes.append(("set up",))

    def train_dataloader(self) -> DataLoader:
        return train_loader()


@pytest.mark.parametrize(("model", "data"), [(AugmentingNet, None), (Net, AugmentingData)])
def test_batches_are_augmented_by_the_hooks_of_model_or_data_module(model: Any, data: Any) -> None:
    assert fit(model(), Continue(epochs=1), data and data()) is not None
    assert noted("augmented") == [((data or model).__name__,)] * 5
    assert noted("set up") == []


class Talkative(Net):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"loss": loss}, on_epoch=True)
        self.logger.log_metrics({"by hand": 1.0}, step=self.global_step)
        self.note("log", self.trainer.log_dir)
        return loss

    def on_train_epoch_end(self) -> None:
        if not isinstance(self.logger, CSVLogger):  # the outer trainer's, which knows no such thing
            self.logger.experiment.config["a"].update(b=1)
            (Path(self.trainer.log_dir) / "notes.txt").write_text("here")

    def on_train_end(self) -> None:
        self.note("end")


def test_what_is_logged_on_the_way_goes_nowhere(tmp_path: Path, capsys: Any, recwarn: Any) -> None:
    logger = CSVLogger(tmp_path)
    state = fit(
        Talkative(), Continue(), logger=logger, log_every_n_steps=1, enable_progress_bar=False
    )
    assert state is not None
    (folder,) = {str(path) for (path,) in noted("log")}
    assert str(tmp_path) not in folder
    assert not Path(folder).exists()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 + 4 + 1  # a head, four steps logged in two ways, and an epoch
    assert "fit" not in capsys.readouterr().out
    assert noted("end") == [()]  # of the outer training alone


def test_what_is_frozen_stays_frozen() -> None:
    model = Net()
    model.body.requires_grad_(False).eval()
    state = fit(model, Continue())
    assert moved(state, model) == {"head.weight", "head.bias"}


class MadeAnew(Net):
    """Makes its layers in `setup` and `configure_model`, without asking whether they are there."""

    def setup(self, stage: str) -> None:
        self.body = nn.Linear(4, 12)
        self.note("steps", self.trainer.max_epochs)

    def configure_model(self) -> None:
        self.head = nn.Linear(12, 3)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def test_layers_that_are_made_in_setup_keep_their_weights() -> None:
    model = MadeAnew()
    state = fit(model, Continue(epochs=2))
    assert moved(state, model) == set()
    assert noted("steps") == [(2,)]


def test_where_the_owners_rate_is_zero_own_steps_go_through_the_owners_training_step() -> None:
    class Still(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.0)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    weights = {name for name, _ in Still().named_parameters()}
    model = Still()
    assert not moved(fit(model, Continue()), model) & weights
    model = Still()
    state = fit(model, Continue(rate=1e-3))
    assert moved(state, model) >= weights
    # Adam's steps are at most as long as its rate: some 40 of them, along a cosine.
    far = max(float((state[name] - value).abs().max()) for name, value in model.named_parameters())
    assert 1e-3 < far < 0.1


@pytest.mark.parametrize("seconds", [math.inf, 60.0])
def test_a_module_that_needs_its_own_optimizers_is_not_trained_by_another_one(
    seconds: float,
) -> None:
    class Grouped(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(
                [{"params": part.parameters()} for part in (self.body, self.head)], 0.1
            )

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            optimizer.param_groups[1]["lr"] *= 0.9

    assert fit(Grouped(), Continue(seconds=seconds)) is not None
    with pytest.warns(TrainingWarning, match="IndexError"):
        assert fit(Grouped(), Continue(seconds=seconds, rate=1e-3)) is None


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")


@pytest.mark.parametrize("make", [lambda: torch.compile(Net(), backend="eager"), Compiled])
def test_a_compiled_model_is_trained_as_a_copy_of_its_own(make: Any) -> None:
    torch._dynamo.reset()
    model = make()
    expected = fit(Net(), Continue())
    state = fit(model, Continue())
    values = zip(state.values(), expected.values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in values)


class Asking(Net):
    """Asks for callbacks of its own."""

    def configure_callbacks(self) -> Any:
        class Counting(Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                Net.notes.append(("counted",))

        return [Counting(), ModelCheckpoint("/nonexistent"), EarlyStopping("nothing")]


def test_callbacks_that_the_model_asks_for_take_part_unless_they_save_or_stop() -> None:
    callback = Continue(epochs=1)

    class Recursive(Asking):
        def configure_callbacks(self) -> Any:
            return [super().configure_callbacks()[0], callback]

    assert fit(Recursive(), callback) is not None
    assert noted("counted") == [()] * 5


def test_pruned_weights_are_warned_of() -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"])
    with pytest.warns(UserWarning, match="pruned weights would not stay 0"):
        assert fit(Net(), Continue(), callbacks=[pruning]) is None


@pytest.mark.parametrize(
    ("mode", "batches"), [("min_size", 2), ("max_size", 4), ("max_size_cycle", 4)]
)
@pytest.mark.parametrize("listed", [False, True])
def test_several_loaders_go_on_as_they_are_mixed(mode: str, batches: int, listed: bool) -> None:
    class Two(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            mixed.append([None if one is None else len(one[0]) for one in batch.values()])
            return super().training_step(
                next(one for one in batch.values() if one is not None), batch_idx
            )

    mixed: list[Any] = []
    loaders = {"a": train_loader(Points(64)), "b": train_loader(Points(16), batch_size=8)}
    given = loaders if listed and mode == "max_size_cycle" else CombinedLoader(loaders, mode)
    callback = Continue(passed=train_loader())
    assert fit(Two(), callback, given) is not None
    in_the_fit, again = mixed[:batches], mixed[batches:]
    assert again == 3 * in_the_fit


class Bank(Net):
    """Reads what its own data set has, and no union of data sets."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.train_dataloader.dataset.first == 0
        return super().training_step(batch, batch_idx)


class Single(Net):
    """Its batch norm cannot train on the one sample that it gets."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch if self.trainer.max_epochs == 1 else [part[:1] for part in batch]


@pytest.mark.parametrize("seconds", [math.inf, 60.0])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Bank,
            r"AttributeError: 'ConcatDataset' object has no attribute 'first' \(training_step, test_continue_tr.*:",
        ),
        (
            Single,
            r"ValueError: Expected more than 1 value per channel when training, got .* \(forward, ",
        ),
    ],
)
def test_whatever_the_owners_code_raises_is_a_warning_that_says_where(
    model: Any, message: str, seconds: float
) -> None:
    with pytest.warns(TrainingWarning, match=message):
        assert fit(model(), Continue(seconds=seconds)) is None


def test_batches_are_as_large_as_those_of_a_sampler_that_makes_them() -> None:
    loader = DataLoader(
        Points(TRAIN), batch_size=None, sampler=BatchSampler(RandomSampler(range(TRAIN)), 16, True)
    )
    assert (
        fit(Net(), Continue(passed=train_loader(batch_size=1), trained_on=loader, epochs=1))
        is not None
    )
    assert [len(batch) - 1 for batch in noted("batch")] == [16, 16, 16, 16, 7]


def test_a_data_set_that_cannot_be_read_is_a_warning() -> None:
    class Unreadable(Points):
        def __getitem__(self, i: int) -> Any:
            raise OSError("no such file")

    with pytest.warns(TrainingWarning, match=r"OSError: no such file"):
        assert fit(Net(), Continue(DataLoader(Unreadable(FAILED, 100)))) is None


def test_an_error_in_a_worker_is_named_as_it_was_raised() -> None:
    class Unreadable(Points):
        def __getitem__(self, i: int) -> Any:
            if get_worker_info() is not None:
                raise OSError("no such file")
            return super().__getitem__(i)

    with pytest.warns(
        TrainingWarning, match=r"repair: OSError: no such file \(in a DataLoader worker\)"
    ):
        assert (
            fit(Net(), Continue(DataLoader(Unreadable(FAILED, 100))), train_loader(num_workers=1))
            is None
        )


def test_weights_that_are_not_finite_are_none() -> None:
    class Diverging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (
                math.nan if self.trainer.max_epochs == 3 else 1
            )

    assert fit(Diverging(), Continue()) is None


def test_a_subset_is_kept_to_and_a_last_batch_of_one_is_left_out() -> None:
    loader = train_loader(
        shuffle=False, sampler=SubsetRandomSampler(range(0, TRAIN, 2)), batch_size=9
    )
    assert (
        fit(Net(), Continue(epochs=1), loader) is not None
    )  # 25 + 21 samples are 5 batches of 9 and a single one
    numbers = [i for batch in noted("batch") for i in batch[1:]]
    assert len(numbers) == 45 == len(set(numbers))
    assert {i for i in numbers if i < 100} <= set(range(0, TRAIN, 2))


@dataclass
class FakeTime:
    """A clock that goes on only when it is told to, so that a busy machine changes nothing."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(budget_module, "time", fake)
    monkeypatch.setattr(continuing_module, "time", fake)
    monkeypatch.setattr(Slow, "clock", fake)
    return fake


class Slow(Net):
    clock = FakeTime()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += 0.01
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("seconds", "least", "most"), [(1e-6, 0, 0), (0.1, 1, 1), (1.5, 3, 30), (30.0, 5, 5)]
)
def test_as_many_epochs_are_trained_as_there_is_time_for(
    seconds: float, least: int, most: int, clock: FakeTime
) -> None:
    """An epoch takes 50 ms; no more are trained than the model had."""
    callback = Continue(seconds=seconds, epochs=5 if seconds == 30 else 100)
    assert (fit(Slow(), callback) is None) == (most == 0)
    if most:
        (trained,) = callback.found
        assert least <= trained.epochs == 1 + max(epoch for epoch, *_ in noted("batch")) <= most
        assert trained.note.endswith(", cut by `max_time`") == (seconds < 30)
        assert clock.now - 0.04 <= min(seconds, 3)  # the fit before took four batches


def look(seen: list[Any], weight: Tensor | None, state: Any) -> Tensor | None:
    """Halfway: notes the weights, draws at random, and says how often samples are visited from then
    on.
    """
    seen.append(state)
    torch.rand(1), np.random.rand(), random.random()
    return weight


@pytest.mark.parametrize("frozen", [False, True])
def test_a_look_halfway_leaves_modes_statistics_and_random_numbers_as_they_were(
    frozen: bool,
) -> None:
    def net() -> Net:
        model = Net()
        model.body[1].train(not frozen)
        return model

    seen: list[Any] = []
    looked = fit(net(), Continue(epochs=4, renew=partial(look, seen, torch.ones(TRAIN + FAILED))))
    assert_same(looked, fit(net(), Continue(epochs=4)))
    assert_same(seen, [fit(net(), Continue(epochs=2))])


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_from_halfway_on_samples_are_visited_by_their_new_weights(epochs: int) -> None:
    """One epoch becomes two of half the visits."""
    seen: list[Any] = []
    callback = Continue(
        epochs=epochs, renew=partial(look, seen, (torch.arange(TRAIN + FAILED) < TRAIN).double())
    )
    fit(Net(), callback)
    assert (len(seen), callback.found[0].epochs, callback.found[0].planned) == (1, epochs, epochs)
    visits = [(i, batch[0]) for batch in noted("batch") for i in batch[1:]]
    assert len(visits) == epochs * (TRAIN + FAILED) - (epochs == 1)
    half = max(1, epochs // 2)
    first, second = (
        [i for i, epoch in visits if (epoch < half) == is_first] for is_first in (True, False)
    )
    assert max(first) >= 100 > TRAIN > max(second)
    assert max(map(second.count, second)) > 1
    assert fit(Net(), Continue(epochs=epochs, renew=partial(look, seen, None))) is None
    assert {epoch for epoch, *_ in noted("batch")} == {*range(half)}


def test_samples_are_drawn_in_proportion_to_their_weights_whatever_ranks_share_them() -> None:
    weight = torch.tensor([0.0, 0.5, 0.5, 1.0, 1.0, 3.0])
    drawn = ShuffledSampler(6, 0, weight=weight)
    visits = torch.tensor([[*drawn] for _ in range(500)])
    torch.testing.assert_close(
        visits.flatten().bincount(minlength=6) / 500, weight, atol=0.1, rtol=0
    )
    ranks = [ShuffledSampler(6, 0, rank, 2, weight=weight) for rank in (0, 1)]
    assert (
        torch.tensor([[[*rank] for rank in ranks] for _ in range(500)]).mT.flatten(1).equal(visits)
    )
    assert [
        len([*ShuffledSampler(7, 0, rank, ranks, parts=2)])
        for rank, ranks in ((0, 1), (0, 2), (1, 2))
    ] == [
        3,
        1,
        1,
    ]


def test_a_module_that_ends_an_epoch_early_is_not_said_to_be_cut_by_the_time() -> None:
    class Early(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    fit(Early(), callback := Continue(epochs=2))
    assert callback.found[0].note == "0.8 epochs"
