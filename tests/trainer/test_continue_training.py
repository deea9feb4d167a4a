"""Training that goes on, by real trainers: on which data, in which way, and without a trace."""

from __future__ import annotations

import math
import random
import time
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
    LightningDataModule,
    LightningModule,
    Trainer,
    quiet_trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    Dataset,
    SubsetRandomSampler,
    get_worker_info,
)
from torchmetrics.classification import MulticlassAccuracy
from toy_repairs import blobs

from lightning_nrl._trainer.lightning.private_parts import validating
from lightning_nrl._trainer.reading.loaders import make_source
from lightning_nrl._trainer.training.continue_training import ContinuedTraining, ShuffledSampler
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import TrainingWarning

TRAIN, FAILED = 50, 21
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
        self,
        failed: Any = None,
        passed: Any = None,
        seconds: float = math.inf,
        epochs: int = 3,
        seeds: tuple[int, ...] = (0,),
        **options: Any,
    ) -> None:
        self.failed = failed or DataLoader(Points(FAILED, 100, 1.5), 64)
        self.passed, self.seconds, self.epochs, self.seeds = passed, seconds, epochs, seeds
        self.options = options
        self.results = []
        self.progress = []

    @property
    def states(self) -> list[Any]:
        return [result and result.state for result in self.results]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Net.notes.clear()
        with validating(trainer):
            passed = self.passed or trainer.train_dataloader
            make = partial(make_source, trainer=trainer, model=pl_module)
            known = [make(passed, "train", passed=True), make(self.failed, "repair", failed=True)]
            training = ContinuedTraining(
                trainer,
                pl_module,
                known,
                self.epochs,
                (Continue,),
                trainer.train_dataloader,
                augment=None,
            )
            before = picture(trainer, pl_module)
            with preserve_state(pl_module):
                # As in a repair: told of the targets while the model is in evaluation mode.
                n = sum(len(source.index) for source in known)
                training = training.for_targets(torch.zeros(n, dtype=torch.bool))
                for seed in self.seeds:
                    timer = StageTimer(self)
                    result = training(seconds=self.seconds, seed=seed, clock=timer, **self.options)
                    self.results.append(result)
            assert_same(before, picture(trainer, pl_module))

    def search(self, *progress: int) -> None:
        self.progress.append(progress)


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
    (a_leaves, a_spec), (b_leaves, b_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert a_spec == b_spec
    for x, y in zip(a_leaves, b_leaves, strict=True):
        np.testing.assert_array_equal(x, y)


def train_loader(data: Any = None, **arguments: Any) -> DataLoader:
    return DataLoader(data or Points(TRAIN), **{"batch_size": 16, "shuffle": True, **arguments})


def fit(model: Any, callback: Continue, data: Any = None, **arguments: Any) -> Any:
    """Trains for an epoch, then goes on; the state after that."""
    torch.manual_seed(0)
    trainer = quiet_trainer(max_epochs=1, devices=1, callbacks=[callback], **arguments)
    trainer.fit(model, train_loader() if data is None else data)
    return callback.states[0]


def moved(state: Any, model: LightningModule) -> set[str]:
    return {
        name for name, value in model.state_dict().items() if not torch.equal(state[name], value)
    }


def noted(kind: str) -> list[Any]:
    return [note[1:] for note in Net.notes if note[0] == kind]


def test_every_known_sample_is_trained_on_once_an_epoch_in_a_new_order():
    callback = Continue(epochs=2)
    model = Net()
    state = fit(model, callback)
    assert [len(batch) - 1 for batch in noted("batch")] == [16, 16, 16, 16, 7] * 2
    numbers = [i for batch in noted("batch") for i in batch[1:]]
    first, second = numbers[: TRAIN + FAILED], numbers[TRAIN + FAILED :]
    assert sorted(first) == sorted(second) == [*range(TRAIN), *range(100, 100 + FAILED)]
    assert first != second
    assert callback.progress == [(done, 10, None, None) for done in range(1, 11)]
    assert state.keys() == model.state_dict().keys()
    assert moved(state, model) == set(state)
    assert int(state["body.1.num_batches_tracked"] - model.body[1].num_batches_tracked) == 10


WAYS = [
    {},
    {"precision": "bf16-mixed"},
    {"precision": "64-true"},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    {"accumulate_grad_batches": 2},
]


def test_the_same_seed_gives_the_same_weights_to_the_bit():
    heads = set()
    for way in WAYS:
        callback = Continue(seeds=(3, 3, 4))
        fit(Net(), callback, **way)
        first, again, by_another_seed = callback.states
        assert_same(first, again)
        assert not torch.equal(first["head.weight"], by_another_seed["head.weight"])
        heads.add(str(first["head.weight"].double().tolist()))
    assert len(heads) == len(WAYS)


class Doubled(Points):
    """A view of the training data that augments."""

    def __getitem__(self, i: int) -> Any:
        Net.notes.append(("seen", i))
        point, label, number = super().__getitem__(i)
        return 2 * point, label, number


@pytest.mark.parametrize("clean", [None, DataLoader(Points(TRAIN), 64)])
def test_training_data_are_augmented_by_their_data_set(clean):
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
def test_batches_are_augmented_by_the_hooks_of_model_or_data_module(model, data):
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


def test_what_is_logged_on_the_way_goes_nowhere(tmp_path, capsys, recwarn):
    logger = CSVLogger(tmp_path)
    assert fit(Talkative(), Continue(), logger=logger, log_every_n_steps=1) is not None
    (folder,) = {str(path) for (path,) in noted("log")}
    assert str(tmp_path) not in folder
    assert not Path(folder).exists()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 + 4 + 1  # a head, four steps logged in two ways, and an epoch
    assert "fit" not in capsys.readouterr().out
    assert noted("end") == [()]  # of the outer training alone


def test_what_is_frozen_stays_frozen():
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


def test_layers_that_are_made_in_setup_keep_their_weights():
    model = MadeAnew()
    state = fit(model, Continue(epochs=2))
    assert moved(state, model) == set()
    assert noted("steps") == [(2,)]


def test_where_the_owners_rate_is_zero_own_steps_go_through_the_owners_training_step():
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


def test_a_module_that_needs_its_own_optimizers_is_not_trained_by_another_one():
    class Grouped(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(
                [{"params": part.parameters()} for part in (self.body, self.head)], 0.1
            )

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            optimizer.param_groups[1]["lr"] *= 0.9

    assert fit(Grouped(), Continue()) is not None
    with pytest.warns(TrainingWarning, match="IndexError"):
        assert fit(Grouped(), Continue(rate=1e-3)) is None


def test_a_compiled_model_is_trained_as_a_copy_of_its_own():
    torch._dynamo.reset()
    expected = fit(Net(), Continue())
    state = fit(torch.compile(Net(), backend="eager"), Continue())
    values = zip(state.values(), expected.values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in values)


class Counting(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        Net.notes.append(("counted",))


def test_callbacks_that_the_model_asks_for_take_part():
    class Asking(Net):
        def configure_callbacks(self) -> Any:
            return [Counting(), callback]

    callback = Continue(epochs=1)
    assert fit(Asking(), callback) is not None
    assert noted("counted") == [()] * 5


@pytest.mark.parametrize(("mode", "batches"), [("min_size", 2), ("max_size", 4), (None, 4)])
def test_several_loaders_go_on_as_they_are_mixed(mode, batches):
    class Two(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            parts = [part for part in batch.values() if part is not None]
            mixed.append([len(part[0]) for part in parts])
            return super().training_step(parts[0], batch_idx)

    mixed = []
    loaders = {"a": train_loader(Points(64)), "b": train_loader(Points(16), batch_size=8)}
    data = loaders if mode is None else CombinedLoader(loaders, mode)
    assert fit(Two(), Continue(passed=train_loader()), data) is not None
    assert mixed[batches:] == 3 * mixed[:batches]


class Bank(Net):
    """Reads what its own data set has, and no union of data sets."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.train_dataloader.dataset.first == 0
        return super().training_step(batch, batch_idx)


class Single(Net):
    """Its batch norm cannot train on the one sample that it gets."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch if self.trainer.max_epochs == 1 else [part[:1] for part in batch]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Bank,
            r"AttributeError: 'ConcatDataset' object has no attribute 'first' "
            r"\(training_step, test_continue_tr.*:",
        ),
        (
            Single,
            r"ValueError: Expected more than 1 value per channel when training, got .* \(forward, ",
        ),
    ],
)
def test_whatever_the_owners_code_raises_is_a_warning_that_says_where(model, message):
    with pytest.warns(TrainingWarning, match=message):
        assert fit(model(), Continue(seconds=60.0)) is None


def test_an_error_in_a_worker_is_named_as_it_was_raised():
    class Unreadable(Points):
        def __getitem__(self, i: int) -> Any:
            if get_worker_info() is not None:
                raise OSError("no such file")
            return super().__getitem__(i)

    callback = Continue(DataLoader(Unreadable(FAILED, 100)))
    with pytest.warns(TrainingWarning, match=r"OSError: no such file \(in a DataLoader worker\)"):
        assert fit(Net(), callback, train_loader(num_workers=1)) is None


def test_weights_that_are_not_finite_are_none():
    class Diverging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (
                math.nan if self.trainer.max_epochs == 3 else 1
            )

    assert fit(Diverging(), Continue()) is None


def test_a_subset_is_kept_to_and_a_last_batch_of_one_is_left_out():
    sampler = SubsetRandomSampler(range(0, TRAIN, 2))
    fit(Net(), Continue(epochs=1), train_loader(shuffle=False, sampler=sampler, batch_size=9))
    # 25 + 21 samples are 5 batches of 9 and a single one.
    numbers = [i for batch in noted("batch") for i in batch[1:]]
    assert len(numbers) == 45 == len(set(numbers))
    assert {i for i in numbers if i < 100} <= set(range(0, TRAIN, 2))


class Slow(Net):
    seconds = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        Slow.seconds += 0.01
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("seconds", "least", "most"), [(1e-6, 0, 0), (0.1, 1, 2), (1.5, 3, 30), (30.0, 5, 5)]
)
def test_as_many_epochs_are_trained_as_there_is_time_for(seconds, least, most, monkeypatch):
    """An epoch takes 50 ms; no more are trained than the model had."""
    Slow.seconds = 0.0
    # A clock that only steps move, so that a busy machine changes nothing.
    monkeypatch.setattr(time, "perf_counter", lambda: Slow.seconds)
    callback = Continue(seconds=seconds, epochs=5 if seconds == 30 else 100)
    assert (fit(Slow(), callback) is None) == (most == 0)
    if most:
        (trained,) = callback.results
        assert least <= trained.epochs <= most
        assert math.ceil(trained.epochs) == 1 + max(epoch for epoch, *_ in noted("batch"))
        assert trained.note.endswith(", cut by `max_time`") == (seconds < 30)
        assert Slow.seconds - 0.04 <= min(seconds, 3)  # the fit before took four batches


def test_training_starts_at_given_weights_on_samples_by_their_weights():
    model = Net()
    start = {"head.bias": torch.full((3,), 7.0)}
    weight = (torch.arange(TRAIN + FAILED) < TRAIN).double()
    callback = Continue(epochs=2, start=start, weight=weight)
    state = fit(model, callback)
    torch.testing.assert_close(state["head.bias"], start["head.bias"], rtol=0, atol=1.0)
    (trained,) = callback.results
    assert (trained.epochs, trained.planned) == (2, 2)
    numbers = [i for batch in noted("batch") for i in batch[1:]]
    assert len(numbers) == 2 * (TRAIN + FAILED)
    assert max(numbers) < TRAIN
    assert max(map(numbers.count, numbers)) > 2


def test_samples_are_drawn_in_proportion_to_their_weights_whatever_ranks_share_them():
    weight = torch.tensor([0.0, 0.5, 0.5, 1.0, 1.0, 3.0])
    drawn = ShuffledSampler(6, 0, weight=weight)
    visits = torch.tensor([[*drawn] for _ in range(500)])
    torch.testing.assert_close(
        visits.flatten().bincount(minlength=6) / 500, weight, atol=0.1, rtol=0
    )
    ranks = [ShuffledSampler(6, 0, rank, 2, weight=weight) for rank in (0, 1)]
    shares = torch.tensor([[[*rank] for rank in ranks] for _ in range(500)])
    assert shares.mT.flatten(1).equal(visits)
    assert len([*ShuffledSampler(7, 0, 1, 2)]) == 3
