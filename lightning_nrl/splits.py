"""Which of the trainer's data are known, and which stay unseen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from lightning_nrl.batches import Adapter
from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.loaders import SPLITS, LoaderSource, check_loader, find_loader, make_source

__all__ = ["DataRequest"]


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
            if isinstance(value, DataLoader):
                check_loader(value, argument)

    def find_known(self, trainer: pl.Trainer, model: pl.LightningModule) -> list[tuple[str, Any]]:
        """Name and data loader of the passed and of the failed data.

        Raises:
            ConfigurationError: there is no such data, or it cannot be read by index.
        """
        return [
            self._find("passed", ("train",), trainer, model),
            self._find("failed", ("repair", "val"), trainer, model),
        ]

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
            ConfigurationError: as in `find_known`, or the unseen data are known too.
        """
        make = partial(make_source, trainer=trainer, model=model, adapter=adapter, seed=seed, limit=limit)
        (passed, passed_loader), (failed, failed_loader) = self.find_known(trainer, model)
        if passed == failed:
            known = [make(passed_loader, passed, passed=True, failed=True)]
        else:
            known = [make(passed_loader, passed, passed=True), make(failed_loader, failed, failed=True)]
        if self.unseen is None:
            return known, []
        unseen, unseen_loader = self._find("unseen", (), trainer, model)
        if unseen in (passed, failed):
            raise ConfigurationError(
                explain(
                    f"`unseen={self.unseen!r}` is known data too: the repair looks at it.",
                    "name a split that is neither `passed` nor `failed`.",
                )
            )
        return known, [make(unseen_loader, unseen)]

    def _find(
        self, argument: str, automatic: tuple[str, ...], trainer: pl.Trainer, model: pl.LightningModule
    ) -> tuple[str, Any]:
        value = getattr(self, argument)
        if isinstance(value, DataLoader):
            return argument, value
        splits = automatic if value == "auto" else (value,)
        for split in splits:
            loader = find_loader(split, trainer, model)
            if loader is not None and loader != []:
                return split, check_loader(loader, split)
        raise ConfigurationError(
            explain(
                f"`{argument}={value!r}`: there is no {' or '.join(f'`{split}_dataloader()`' for split in splits)}.",
                f"add it to the data module, or pass a DataLoader as `{argument}=`.",
            )
        )
