"""Which of the trainer's data are known, and which stay unseen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_nrl.batches import Adapter
from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.loaders import SPLITS, LoaderSource, check_loader, find_loader, make_source, sample_index

__all__ = ["DataRequest"]

Found = tuple[DataLoader[Any], str]
"""A data loader and the name that reports use for it."""


@dataclass(frozen=True)
class DataRequest:
    """What the user said about data.

    Attributes:
        passed: `auto`, the name of a split, or a data loader.
        failed: likewise.
        unseen: the name of a split, a data loader, or None.
    """

    passed: str | DataLoader[Any]
    failed: str | DataLoader[Any]
    unseen: str | DataLoader[Any] | None

    def __post_init__(self) -> None:
        for argument in ("passed", "failed", "unseen"):
            value = getattr(self, argument)
            names = SPLITS if argument == "unseen" else ("auto", *SPLITS)
            if isinstance(value, str) and value not in names:
                raise ConfigurationError(
                    explain(f"`{argument}={value!r}` is no split.", f"write one of {list(names)} or pass a DataLoader.")
                )
            if not isinstance(value, str) and value is not None:
                object.__setattr__(self, argument, check_loader(value, argument))

    def find(self, trainer: pl.Trainer, model: pl.LightningModule) -> tuple[Found, Found, Found | None]:
        """The data loaders and names of the passed, the failed and the unseen data.

        Raises:
            ConfigurationError: there is no such data, it cannot be read by index, or the unseen data are known too.
        """
        passed = self._find("passed", ("train",), trainer, model)
        failed = self._find("failed", ("repair", "val"), trainer, model)
        if self.unseen is None:
            return passed, failed, None
        unseen = self._find("unseen", (), trainer, model)
        if unseen[1] in (passed[1], failed[1]):
            raise ConfigurationError(
                explain(
                    f"`unseen={self.unseen!r}` is known data too: the repair looks at it.",
                    "name a split that is neither `passed` nor `failed`.",
                )
            )
        for loader, split in (passed, failed):
            samples = sample_index(unseen[0])
            same = loader.dataset is unseen[0].dataset
            common = int(torch.isin(samples, sample_index(loader)).sum()) if same else 0
            if common:
                raise ConfigurationError(
                    explain(
                        f"`unseen`: {common} of its {len(samples)} samples are in `{split}` too, which is known data.",
                        "give data that are neither `passed` nor `failed`.",
                    )
                )
        return passed, failed, unseen

    def sources(
        self, trainer: pl.Trainer, model: pl.LightningModule, *, adapter: Adapter, seed: int, limit: int | None
    ) -> tuple[list[LoaderSource], list[LoaderSource]]:
        """The known and the unseen splits, ready to be read.

        Args:
            trainer: in the middle of a fit.
            model: its module.
            adapter: takes a batch apart.
            seed: for random transforms of the data sets.
            limit: read only this many batches of each.

        Raises:
            ConfigurationError: as in `find`.
        """
        make = partial(make_source, trainer=trainer, model=model, adapter=adapter, seed=seed, limit=limit)
        passed, failed, unseen = self.find(trainer, model)
        if passed[1] == failed[1] or _same_samples(passed[0], failed[0]):
            known = [make(*(passed if passed[1] in SPLITS else failed), passed=True, failed=True)]
        else:
            known = [make(*passed, passed=True), make(*failed, failed=True)]
        return known, [] if unseen is None else [make(*unseen)]

    def _find(self, argument: str, automatic: tuple[str, ...], trainer: pl.Trainer, model: pl.LightningModule) -> Found:
        value = getattr(self, argument)
        if isinstance(value, DataLoader):
            return value, argument
        splits = automatic if value == "auto" else (value,)
        for split in splits:
            loader = find_loader(split, trainer, model)
            if loader is not None and loader != []:
                return check_loader(loader, split), split
        raise ConfigurationError(
            explain(
                f"`{argument}={value!r}`: there is no {' or '.join(f'`{split}_dataloader()`' for split in splits)}.",
                f"add it to the data module, or pass a DataLoader as `{argument}=`.",
            )
        )


def _same_samples(a: DataLoader[Any], b: DataLoader[Any]) -> bool:
    return a.dataset is b.dataset and torch.equal(sample_index(a), sample_index(b))
