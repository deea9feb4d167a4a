"""Which of the trainer's data are known, and which stay unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nrl._trainer.loaders import SPLITS, LoaderSource, SplitLoaders, check_loader, make_source, sample_index
from lightning_nrl.data.batch import Adapter
from lightning_nrl.data.sample_identity import base_samples, is_among
from lightning_nrl.errors import ConfigurationError, explain

__all__ = ["DataRequest", "Found", "FoundData", "check_data", "find_data"]

Found = tuple[DataLoader[Any], str]
"""A data loader and the name that reports use for it."""


class FoundData(NamedTuple):
    """The data of a repair; None where there are none."""

    passed: Found
    failed: Found
    unseen: Found | None
    calibration: Found | None


@dataclass(frozen=True)
class DataRequest:
    """What the user said about data.

    Attributes:
        passed: `auto`, the name of a split, or a data loader.
        failed: likewise.
        unseen: the name of a split, a data loader, or None.
        calibration: likewise.
    """

    passed: str | DataLoader[Any]
    failed: str | DataLoader[Any]
    unseen: str | DataLoader[Any] | None = None
    calibration: str | DataLoader[Any] | None = None

    def __post_init__(self) -> None:
        for argument in ("passed", "failed", "unseen", "calibration"):
            held_out = argument in ("unseen", "calibration")
            names = SPLITS if held_out else ("auto", *SPLITS)
            object.__setattr__(self, argument, check_data(argument, getattr(self, argument), names, optional=held_out))

    def find(self, loaders: SplitLoaders) -> FoundData:
        """The data loaders and names of all data.

        Raises:
            ConfigurationError: there is no such data, it cannot be read by index, or the unseen or calibration data
                are used for something else too.
        """
        passed = self._find("passed", ("train",), loaders)
        failed = self._find("failed", ("repair", "val"), loaders)
        others: dict[str, Sequence[Found]] = {"known": (passed, failed)}
        unseen = self._find_held_out("unseen", others, loaders)
        others["unseen"] = () if unseen is None else (unseen,)
        return FoundData(passed, failed, unseen, self._find_held_out("calibration", others, loaders))

    def _find_held_out(
        self, argument: str, others: Mapping[str, Sequence[Found]], loaders: SplitLoaders
    ) -> Found | None:
        """Data of which no sample should be in others, by kind.

        Calibration data that have one are refused: they would void the bound. Of unseen data this is said later, where
        they are counted, unless all of them are known.
        """
        value = getattr(self, argument)
        if value is None:
            return None
        found = self._find(argument, (), loaders)
        samples = _identity(found[0])
        for kind, loader, split in ((kind, *found) for kind, several in others.items() for found in several):
            if found[1] == split:
                raise ConfigurationError(
                    explain(
                        f"`{argument}={value!r}` is {kind} data too.",
                        "name a split that is used for nothing else.",
                    )
                )
            common = int(is_among(samples, _identity(loader)).sum())
            if common and (argument == "calibration" or common == len(samples)):
                some = f"{common} of its {len(samples)} samples"
                raise ConfigurationError(
                    explain(
                        f"`{argument}`: {some} are in `{split}` too, which is {kind} data.",
                        "give data that are used for nothing else.",
                    )
                )
        return found

    def sources(
        self, loaders: SplitLoaders, *, adapter: Adapter, seed: int, limit: int | None, whole: bool = False
    ) -> tuple[list[LoaderSource], list[LoaderSource], list[LoaderSource]]:
        """The known, the unseen and the calibration splits, ready to be read.

        Args:
            loaders: of a trainer in the middle of a fit.
            adapter: takes a batch apart.
            seed: for random transforms of the data sets.
            limit: read only this many batches of each.
            whole: whether each rank reads all of them.

        Raises:
            ConfigurationError: as in `find`.
        """
        trainer, model = loaders.trainer, loaders.model
        make = partial(make_source, trainer=trainer, model=model, adapter=adapter, seed=seed, limit=limit, whole=whole)
        found = self.find(loaders)
        passed, failed = found.passed, found.failed
        if passed[1] == failed[1] or _same_samples(passed[0], failed[0]):
            known = [make(*(passed if passed[1] in SPLITS else failed), passed=True, failed=True)]
        else:
            known = [make(*passed, passed=True), make(*failed, failed=True)]
        unseen, calibration = ([] if one is None else [make(*one)] for one in (found.unseen, found.calibration))
        return known, unseen, calibration

    def _find(self, argument: str, automatic: tuple[str, ...], loaders: SplitLoaders) -> Found:
        optional = argument in ("unseen", "calibration")
        return find_data(argument, getattr(self, argument), loaders, automatic=automatic, optional=optional)


def check_data(
    argument: str, value: str | DataLoader[Any] | None, names: Sequence[str] = SPLITS, *, optional: bool = False
) -> str | DataLoader[Any] | None:
    """What the user said about data: the name of a split, the one data loader inside of what was given, or None.

    Args:
        argument: its name.
        value: what was given.
        names: what a split may be called.
        optional: whether None will do.

    Raises:
        ConfigurationError: it is none of these, or the data loader cannot be read by index.
    """
    if (isinstance(value, str) and value not in names) or (value is None and not optional):
        raise ConfigurationError(
            explain(f"`{argument}={value!r}` is no split.", f"write one of {list(names)} or pass a DataLoader.")
        )
    return value if isinstance(value, str) or value is None else check_loader(value, argument)


def find_data(
    argument: str,
    value: str | DataLoader[Any],
    loaders: SplitLoaders,
    *,
    automatic: Sequence[str] = (),
    optional: bool = False,
) -> Found:
    """The data loader that is meant, and its name.

    Args:
        argument: its name.
        value: a data loader, the name of a split, or `auto`.
        loaders: of a trainer in the middle of a fit.
        automatic: the splits that `auto` stands for; the first that is there.
        optional: whether None would do instead.

    Raises:
        ConfigurationError: it is not there, or cannot be read by index.
    """
    if isinstance(value, DataLoader):
        return value, argument
    splits = automatic if value == "auto" else (value,)
    for split in splits:
        loader = loaders.get(split)
        if loader is not None and loader != []:
            return check_loader(loader, split), split
    without = f", or do without: `{argument}=None`" if optional else ""
    raise ConfigurationError(
        explain(
            f"`{argument}={value!r}`: there is no {' or '.join(f'`{split}_dataloader()`' for split in splits)}.",
            f"add it to the data module, or pass a DataLoader as `{argument}=`{without}.",
        )
    )


def _same_samples(a: DataLoader[Any], b: DataLoader[Any]) -> bool:
    return torch.equal(_identity(a), _identity(b))


def _identity(loader: DataLoader[Any]) -> Tensor:
    """The samples of a loader, in order, as pairs of data set and place (`base_samples`)."""
    return base_samples(loader.dataset, sample_index(loader))
