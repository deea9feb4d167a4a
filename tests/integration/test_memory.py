"""The memory that a repair takes: copies of a large network's weights, and bytes by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from digit_models import quiet_trainer
from lightning_package import pl
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import RegressionFreeRepair

WIDTH = 700  # a matrix of more than `parked` copies into memory


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors among arguments of an operator, which may be lists of tensors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of tensors of at least `least` bytes that live at once, files left out."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.most = 0
        self.living = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        new = [x for x in tensors_in((args, output)) if self.is_new(x)]
        if new:
            self.living = {at: x for at, x in self.living.items() if not x[0].expired()}
            self.most = max(self.most, sum(size for _, size in self.living.values()))
        return output

    def is_new(self, x: Tensor) -> bool:
        storage = x.untyped_storage()
        if storage.nbytes() < self.least or storage.is_shared():  # mapped from a file
            return False
        at = storage._cdata
        if at in self.living and not self.living[at][0].expired():
            return False
        self.living[at] = StorageWeakRef(storage), storage.nbytes()
        return True


class Wide(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(20, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Narrow(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def test_the_default_holds_few_copies_of_the_weights(tmp_path):
    pl.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(360, 20, generator=generator)
    y = (x @ torch.randn(20, 6, generator=generator)).argmax(1)
    train, val = TensorDataset(x[:260], y[:260]), TensorDataset(x[260:], y[260:])
    model = Wide()
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    callback = RegressionFreeRepair(dirpath=tmp_path, verbose=False)
    trainer = quiet_trainer(tmp_path, callback, max_epochs=3)
    with LivingTensors(least=200_000) as tensors:
        trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(val, 64))
    assert callback.report.status == "repaired"
    assert {"training", "push"} <= {rung.name for rung in callback.report.rungs if rung.kept}
    # Besides the trained ones.
    assert tensors.most / size - 1 < 6


def test_a_training_and_a_polish_hold_few_bytes_by_sample(tmp_path):
    pl.seed_everything(0, verbose=False)
    n, n_train = 12_000, 9_000
    generator = torch.Generator().manual_seed(0)
    centre = 3 * torch.randn(4, 4, generator=generator)
    y = torch.randint(4, (n,), generator=generator)
    x = centre[y] + 0.7 * torch.randn(n, 4, generator=generator)
    # Some samples of a class lie elsewhere, which training lacks.
    is_moved = (y == 0) & (torch.rand(n, generator=generator) < 0.1)
    is_moved[:n_train] = False
    x[is_moved] += 4
    train, val = TensorDataset(x[:n_train], y[:n_train]), TensorDataset(x[n_train:], y[n_train:])
    callback = RegressionFreeRepair(method="finetune-polish", dirpath=tmp_path, verbose=False)
    trainer = quiet_trainer(tmp_path, callback, max_epochs=2)
    with LivingTensors(least=n // 2) as tensors:
        trainer.fit(Narrow(), DataLoader(train, 128, shuffle=True), DataLoader(val, 128))
    assert callback.report.status == "repaired"
    # The samples take 24 bytes, the logits of the polish 16, the last layer's record of a pass 48.
    # The programme reads 8 inputs and a constant in single and double precision. Of more than
    # 65,536 samples it holds no more at once.
    assert tensors.most / n - (24 + 16 + 3 * 48 + 9 * (4 + 8)) < 160
