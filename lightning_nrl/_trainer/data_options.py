"""What a repair takes from a trainer: its known data, how batches are read, and which weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch.utils.data import DataLoader

from lightning_nrl._trainer.loaders import SPLITS, check_data, parse_adapter
from lightning_nrl._utils.imports import import_function
from lightning_nrl.data.batch import Adapter
from lightning_nrl.errors import check_choice, check_whole


@dataclass(frozen=True)
class DataOptions:
    """Where known data come from, how their batches are read, and which of the trained weights are repaired.

    All samples of the passed and the failed data are known data, and the gate counts them.

    Attributes:
        passed: where passed samples come from: `auto` (the train data), `train`, `val`, `test`, `repair` or a
            DataLoader.
        failed: where failures come from: `auto` (the data module's `repair_dataloader()` if it has one, else the
            validation data), `train`, `val`, `test`, `repair` or a DataLoader.
        adapter: takes your batches apart, `f(batch) -> (args, kwargs, target)`, or runs the module on them as it is
            deployed, `f(module, batch) -> (logits, target)`; the function, or its address,
            `package.module:function`; None: `(x, y, *extras)` or a mapping with the usual keys.
        draws: how many fixed draws of each known sample are counted where its data set draws at random, as
            augmentation does; from 1. Each counts as a sample: one is broken if any of its draws breaks.
        render: makes an image or text of a sample as its data set gives it, for the report's reader: the function, or
            its address; None: the input is shown as an image, curves, a table or tokens, whatever it looks like.
        augment: changes the targets that training goes on with: `f(batch) -> batch` of a batch of targets as the data
            loader gives it, or its address. It may give more samples than it gets, or draw at random. What is counted
            are the samples as they are. None: only your own augmentation.
        start_from: `last`: the weights at the end of training; `best`: those of the best checkpoint.

    Raises:
        ConfigurationError: on construction, for what is no split, no data loader that can be read by index, no
            function, or another word.
    """

    passed: str | DataLoader[Any] = "auto"
    failed: str | DataLoader[Any] = "auto"
    adapter: str | Adapter | None = None
    draws: int = 1
    render: str | Callable[[Any], Any] | None = None
    augment: str | Callable[[Any], Any] | None = None
    start_from: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        for name in ("passed", "failed"):
            object.__setattr__(self, name, check_data(name, getattr(self, name), ("auto", *SPLITS)))
        adapter = parse_adapter(self.adapter)
        object.__setattr__(self, "adapter", adapter)
        if self.render is not None:
            object.__setattr__(self, "render", import_function("render", self.render))
        if self.augment is not None:
            object.__setattr__(self, "augment", import_function("augment", self.augment))
        check_whole("draws", self.draws, 1)
        check_choice("start_from", self.start_from, ("last", "best"))

    @property
    def renderer(self) -> Callable[[Any], Any] | None:
        """Makes an image or text of a sample."""
        return cast(Callable[[Any], Any] | None, self.render)

    @property
    def augmentation(self) -> Callable[[Any], Any] | None:
        """Changes a batch of targets."""
        return cast(Callable[[Any], Any] | None, self.augment)

    @property
    def unpack(self) -> Adapter:
        """Takes a batch apart."""
        return cast(Adapter, self.adapter)
