"""What is counted is proven by the module's own steps, or asked for, in all six uses."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import quick_repair, quiet_trainer
from lightning_package import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_nrl import (
    DataOptions,
    ParticleSwarm,
    RegressionMetrics,
    ReleaseGate,
    compare,
    diagnose,
    repair,
)
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.tasks import Sequence as SequenceTask

N_CLASSES = 5


class Module(LightningModule):
    """`loss` of the output, the labels and the module makes both steps."""

    def __init__(self, n_outputs: int = N_CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, n_outputs))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y)

    def predicted(self, x: Tensor) -> Tensor:
        """The classes that the deployed module predicts."""
        return self(x).argmax(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Embedding(Module):
    """Has its head in the steps, as a metric learning loss has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(N_CLASSES, N_CLASSES, bias=False)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(output), y)

    def predicted(self, x: Tensor) -> Tensor:
        return self.head(self(x)).argmax(1)


class Distances(Module):
    """Returns distances to prototypes, of which the smallest is the prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(N_CLASSES, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return -self.prototypes(self.net(x).relu())

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(-output, y)

    def predicted(self, x: Tensor) -> Tensor:
        return self(x).argmin(1)


class Labels(Module):
    """Returns the probabilities of three labels."""

    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sigmoid()

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return nn.BCELoss()(output, y)

    def predicted(self, x: Tensor) -> Tensor:
        return self(x) > 0.5


class Probability(Labels):
    """Returns the probability of one class."""

    def __init__(self) -> None:
        Module.__init__(self, 1)


class Thresholds(Labels):
    """Returns the probabilities of exceeding two thresholds between three classes."""

    def __init__(self) -> None:
        Module.__init__(self, 2)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output, (y[:, None] > torch.arange(2)).float())

    def predicted(self, x: Tensor) -> Tensor:
        return (self(x) > 0.5).sum(1)


def embedded(module: Any, batch: list[Tensor]) -> Any:
    return module.head(module(batch[0])), batch[1]


def unheaded(module: Any, batch: list[Tensor]) -> Any:
    return module(batch[0]), batch[1]


def nearest(module: Any, batch: list[Tensor]) -> Any:
    return -module(batch[0]), batch[1]


def loader(kind: type[Module] = Module, n: int = 200, *, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    noise = 0.3 * torch.randn(n, 6, generator=generator)
    y = (x + noise)[:, :N_CLASSES].argmax(1)
    if issubclass(kind, Labels):
        y = ((x + noise)[:, :3] > 0).float()
    if issubclass(kind, Probability):
        y = y[:, :1]
    if issubclass(kind, Thresholds):
        y = y[:, :2].sum(1).long()
    return DataLoader(TensorDataset(x, y), batch_size=64)


@cache
def trained(kind: type[Module]) -> Any:
    model = kind()
    trainer = quiet_trainer(None, max_epochs=8, enable_checkpointing=False)
    trainer.fit(model, loader(kind), loader(kind, seed=1))
    return model


def n_right(model: Any, kind: type[Module], *seeds: int) -> int:
    n = 0
    for seed in seeds:
        x, y = loader(kind, seed=seed).dataset.tensors
        with torch.no_grad():
            right = model.predicted(x) == y
        n += int(right.flatten(1).all(1).sum() if right.ndim > 1 else right.sum())
    return n


Use = Callable[..., int]
"""Uses the package with a trained model, and returns the right samples that it counts."""
SWARM = ParticleSwarm(particles=4, iterations=2)


def fit(path: Path, callback: Any, kind: type[Module], model: Any) -> Any:
    """A training that changes nothing."""
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)
    trainer = quiet_trainer(path, callback, max_epochs=1, enable_checkpointing=False)
    trainer.fit(model, loader(kind), loader(kind, seed=1))
    return trainer


def called(
    function: Any, path: Path, kind: type[Module], model: Any, options: dict[str, Any], **more: Any
) -> Any:
    """What `repair`, `diagnose` or `compare` returns for the loaders of both seeds."""
    loaders = loader(kind), loader(kind, seed=1)
    more |= {"task": options.pop("task", None), "data": DataOptions(**options)}
    return function(quiet_trainer(path), model, *loaders, **more)


def passed_in(report: Any) -> int:
    return sum(split.counts.passed for split in report.splits)


def by_callback(path: Path, kind: type[Module], model: Any, **options: Any) -> int:
    task = options.pop("task", None)
    callback = quick_repair(task=task, data=DataOptions(**options), method=SWARM)
    fit(path, callback, kind, model)
    return passed_in(callback.report)


def by_repair(path: Path, kind: type[Module], model: Any, **options: Any) -> int:
    return passed_in(called(repair, path, kind, model, options, method=SWARM, verbose=False))


def by_gate(path: Path, kind: type[Module], model: Any, **options: Any) -> int:
    gate = ReleaseGate(deepcopy(model), verbose=False, require="any", **options)
    quiet_trainer(path, gate).validate(model, loader(kind, seed=1), verbose=False)
    (row,) = gate.report.rows
    return row.counts.passed


def by_metrics(path: Path, kind: type[Module], model: Any, **options: Any) -> int:
    trainer = fit(path, RegressionMetrics(model, **options), kind, model)
    return round(200 * float(trainer.callback_metrics["regression/reference_accuracy"]))


def by_diagnose(path: Path, kind: type[Module], model: Any, **options: Any) -> int:
    return called(diagnose, path, kind, model, options).known["passed"]


def by_compare(path: Path, kind: type[Module], model: Any, **options: Any) -> int:
    comparison = called(compare, path, kind, model, options, unseen=None, methods=[SWARM])
    return comparison.entries[0].curve[0].known.passed


COUNTED = {"gate": (1,), "metrics": (1,)}
"""Seeds of the loaders that a use counts; the others count both."""
USES = {
    "callback": by_callback,
    "repair": by_repair,
    "gate": by_gate,
    "metrics": by_metrics,
    "diagnose": by_diagnose,
    "compare": by_compare,
}


def check_counts(path: Path, use: str, kind: type[Module], **options: Any) -> None:
    model = trained(kind)
    expected = n_right(model, kind, *COUNTED.get(use, (0, 1)))
    assert USES[use](path, kind, deepcopy(model), **options) == expected


@pytest.mark.filterwarnings("error::lightning_nrl.errors.DataWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [Labels, Probability, Thresholds])
def test_probabilities_that_a_loss_takes_are_probabilities(tmp_path, use, kind):
    task = {Labels: "multilabel", Thresholds: "ordinal"}.get(kind)
    check_counts(tmp_path, use, kind, task=task)


def hidden(output: Tensor, y: Tensor) -> Tensor:
    """A loss of which nothing is seen: cross entropy by `exp` and `log`."""
    shares = output.exp() / output.exp().sum(1, keepdim=True)
    return -shares.gather(1, y[:, None]).log().mean()


class Hidden(Module):
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return hidden(output, y)


class Negative(Hidden):
    """Returns what must be small, of which its steps show nothing."""

    def forward(self, x: Tensor) -> Any:
        return -self.net(x)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return hidden(-output, y)

    def predicted(self, x: Tensor) -> Tensor:
        return self(x).argmin(1)


REFUSED = {
    # An embedding as wide as the classes.
    Embedding: (
        r"your `cross_entropy` .*compares \[64, 5\], which is no output[\s\S]*HINT.*adapter",
        {"adapter": embedded},
    ),
    # Outputs of which the smallest counts.
    Distances: (
        r"ranks the classes the other way round[\s\S]*HINT[\s\S]*logits = -module\(x\)",
        {"adapter": nearest},
    ),
    Hidden: (
        r"\d+ of the first 64 samples of `val` are right.*\nHINT: .*`output='logits'`",
        {"output": "logits"},
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_proven_is_refused_until_it_is_said(tmp_path, use, kind):
    problem, options = REFUSED[kind]
    with pytest.raises(ConfigurationError, match=problem):
        USES[use](tmp_path, kind, deepcopy(trained(kind)))
    check_counts(tmp_path, use, kind, **options)


class Metric(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(N_CLASSES)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_macro", self.accuracy)


class Decided(Hidden):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_wrong", (self(batch[0]).argmax(1) != batch[1]).sum().float())


class Logged(Hidden):
    """Logs an accuracy that only numpy has seen."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        predicted = self(batch[0]).numpy().argmax(1)
        self.log("val_acc", float((predicted == batch[1].numpy()).mean()))


class Predicted(Hidden):
    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).max(1).indices


class Scaled(Module):
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output / 0.07 + 3, y)


class Focal(Module):
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        share = output.softmax(1).gather(1, y[:, None])
        return -((1 - share) ** 2 * share.log()).mean()


class Mixed(Hidden):
    """Shows its output in training alone, on mixed inputs."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        order = torch.randperm(len(x))
        output = self.net(0.7 * x + 0.3 * x[order])
        return 0.7 * F.cross_entropy(output, y) + 0.3 * F.cross_entropy(output, y[order])


class Auxiliary(Module):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, N_CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.other(x), y) + F.cross_entropy(self(x), y)


class Margin(Module):
    """Returns cosines; only its training lowers that of the true class."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x) - 0.5 * F.one_hot(y, N_CLASSES), y)


class Probabilities(Module):
    def forward(self, x: Tensor) -> Any:
        return self.net(x).softmax(1)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(output.log(), y)


SOUND = [
    Metric, Decided, Logged, Predicted, Scaled, Focal, Mixed, Auxiliary, Margin, Probabilities
]  # fmt: skip


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_module_is_not_asked(tmp_path, kind):
    check_counts(tmp_path, "gate", kind)
    check_counts(tmp_path, "callback", kind)


class Logging(Negative):
    """Shows its decisions to numpy alone, after an output that is used by chance."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0]).argmax(1)
        predicted = self(batch[0]).numpy().argmin(1)
        self.log("val_acc", float((predicted == batch[1].numpy()).mean()))


@pytest.mark.parametrize("use", ["callback", "gate", "metrics"])
def test_another_accuracy_than_that_of_the_loop_is_refused(tmp_path, use):
    with pytest.raises(ConfigurationError, match=r"`val_acc`.*logged 0\.\d+.* 0\.\d+ |far fewer"):
        USES[use](tmp_path, Logging, deepcopy(trained(Logging)))


class Spiking(Module):
    """Keeps a state that its steps reset."""

    def __init__(self) -> None:
        super().__init__()
        self.state = 0.0

    def reset(self) -> None:
        self.state = 0.0

    def forward(self, x: Tensor) -> Any:
        self.state = 0.5 * self.state + self.net(x).detach().mean(0)
        return self.net(x) + 2 * self.state

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.reset()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.reset()
        super().validation_step(batch, batch_idx)


def after_reset(module: Any, batch: list[Tensor]) -> Any:
    module.reset()
    return module(batch[0]), batch[1]


def test_a_state_from_batch_to_batch_is_said(tmp_path):
    model = trained(Spiking)
    with pytest.warns(DataWarning, match=r"keeps a state[\s\S]*HINT[\s\S]*module\.reset\(\)"):
        by_gate(tmp_path, Spiking, deepcopy(model))
    right = [
        int((after_reset(model, batch)[0].argmax(1) == batch[1]).sum()) for batch in loader(seed=1)
    ]
    assert by_gate(tmp_path, Spiking, deepcopy(model), adapter=after_reset) == sum(right)


class Decoded(Hidden):
    """Decodes its emissions, `n x T x C`, by a transition that it has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, N_CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.net(x[:, :, None])

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return hidden(output.flatten(0, 1), y[:, None].expand(-1, 6).flatten())


def tokens(batch: list[Tensor]) -> Any:
    return (batch[0],), {}, batch[1][:, None].expand(-1, 6)


class Cached(Module):
    """Keeps in evaluation mode what it has computed from its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = None

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.cache = None
            return self.net(x)
        if self.cache is None:
            self.cache = deepcopy(self.net)
        return self.cache(x).detach()


class Transitions(Module):
    """Has weights that its loss and its decoder use, but not the emissions, which are proven."""

    def __init__(self) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.eye(N_CLASSES))

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return super().loss(output, y) + hidden(output @ self.transitions, y)


@pytest.mark.parametrize(
    ("kind", "names"), [(Cached, "net.0.weight, net.0.bias"), (Transitions, "transitions")]
)
def test_trained_weights_that_the_counts_do_not_use_are_said(tmp_path, kind, names):
    with pytest.warns(DataWarning, match=rf"`training_step` trains {names}[\s\S]*HINT: nothing is"):
        by_gate(tmp_path, kind, deepcopy(trained(kind)))


class Channels(Hidden):
    """Returns `n x C x T` with as many tokens as classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv1d(1, N_CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.net(x[:, None, :N_CLASSES])

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y[:, None].expand(-1, N_CLASSES))


def few_tokens(batch: list[Tensor]) -> Any:
    return (batch[0],), {}, batch[1][:, None].expand(-1, N_CLASSES)


def test_classes_are_in_the_dimension_of_the_loss(tmp_path):
    options = {"task": "sequence", "adapter": few_tokens}
    with pytest.raises(ConfigurationError, match=r"HINT: write `task=Sequence\(class_dim=1\)`"):
        by_gate(tmp_path, Channels, Channels(), **options)
    by_gate(tmp_path, Channels, Channels(), **{**options, "task": SequenceTask(class_dim=1)})


class Windows(Focal):
    """Predicts by the mean of two windows, which are normalised apart."""

    def forward(self, x: Tensor) -> Any:
        return self.net((x - x.mean(0)) / x.std(0))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = torch.cat([self(x) for x in batch[0].split(8)])
        self.log("val_loss", self.loss(logits, batch[1]))


def test_an_adapter_that_the_loss_contradicts_is_said(tmp_path):
    with pytest.warns(
        DataWarning, match=r"`cross_entropy` [\s\S]*HINT: make sure that the adapter"
    ):
        by_gate(tmp_path, Embedding, trained(Embedding), adapter=unheaded)


class Spread(Module):
    """Returns a distribution."""

    def forward(self, x: Tensor) -> Any:
        return torch.distributions.Categorical(logits=self.net(x))

    def loss(self, output: Any, y: Tensor) -> Tensor:
        return -output.log_prob(y).mean()


class Strided(Module):
    """Returns emissions of a shorter time axis than its labels."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.net(x)[:, None], "lengths": torch.ones(len(x))}

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"logits": 2 * self(batch[0])["logits"]}


class Tokens(Module):
    def forward(self, x: Tensor) -> Any:
        return self.net(x)[:, None].expand(-1, 6, -1)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output[:, 0], y)


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        (Spread, {}, r"returns a distribution, Categorical[\s\S]*HINT: .*`module\(x\)\.mean`"),
        (Strided, {"task": "sequence", "adapter": tokens}, r"\[64, 1, 5\] for labels \[64, 6\]"),
        (Tokens, {}, r"\[64, 6, 5\][\s\S]*HINT: .*`task='sequence'`"),
        # A decoder is not sent back to its logits.
        (
            Decoded,
            {"task": "sequence", "adapter": tokens},
            r"By the largest logit, [\s\S]*HINT: .*decoder.*F\.one_hot",
        ),
        (
            Windows,
            {},
            r"your `softmax` \(in `validation_step`\) takes \[64, 5\], which is no output",
        ),
    ],
)
def test_an_output_that_is_not_what_counts_says_what_to_write(tmp_path, kind, options, problem):
    with pytest.raises(ConfigurationError, match=problem):
        by_gate(tmp_path, kind, kind(), **options)
