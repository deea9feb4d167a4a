"""Which of the trainer's data are known, and which stay unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nrl._lightning.packages import LightningModule, Trainer, class_for, rank_zero_warn
from lightning_nrl._lightning.private_parts import batch_limit, data_module_of, given_loaders, overfit_batches
from lightning_nrl._trainer.data_options import DataOptions
from lightning_nrl._trainer.loaders import (
    SPLITS,
    LoaderSource,
    check_data,
    check_loader,
    make_source,
    sample_index,
    split_and_loader,
)
from lightning_nrl._trainer.stability import draws_at_random
from lightning_nrl._trainer.validation_view import with_validation_view
from lightning_nrl.data.sample_identity import base_samples, is_among
from lightning_nrl.errors import ConfigurationError, DataWarning, check_kind

Found = tuple[DataLoader[Any], str]
"""A data loader and the name that reports use for it."""


@runtime_checkable
class _HasRepairData(Protocol):
    def repair_dataloader(self) -> Any: ...


class FoundData(NamedTuple):
    """The data of a repair; None where there are none."""

    passed: Found
    failed: Found
    unseen: Found | None
    calibration: Found | None


@dataclass(frozen=True)
class DataRequest:
    """What the user said about data: which are known, and a data loader, the name of a split, or None for the rest."""

    known: DataOptions
    unseen: str | DataLoader[Any] | None = None
    calibration: str | DataLoader[Any] | None = None

    def __post_init__(self) -> None:
        check_kind("data", self.known, isinstance(self.known, DataOptions), "DataOptions", "data=DataOptions(...)")
        for argument, given in (("unseen", self.unseen), ("calibration", self.calibration)):
            object.__setattr__(self, argument, check_data(argument, given, optional=True))

    def find(self, loaders: SplitLoaders) -> FoundData:
        """The data loaders and names of all data; unseen and calibration data may not be used for anything else."""
        passed = find_data("passed", self.known.passed, loaders, automatic=("train",))
        failed = find_data("failed", self.known.failed, loaders, automatic=("repair", "val", "train"))
        if self.known.failed == "auto" and failed[1] == "train":
            problem = "no `repair_dataloader()` or `val_dataloader()`: failures of the train data are repaired."
            hint = "add one, since what a model gets wrong of other data says more; or name it, `failed='train'`."
            rank_zero_warn(DataWarning(problem, hint))
        others: dict[str, Sequence[Found]] = {"known": (passed, failed)}
        unseen = self._find_held_out("unseen", self.unseen, others, loaders)
        others["unseen"] = () if unseen is None else (unseen,)
        return FoundData(passed, failed, unseen, self._find_held_out("calibration", self.calibration, others, loaders))

    def _find_held_out(
        self,
        argument: str,
        value: str | DataLoader[Any] | None,
        others: Mapping[str, Sequence[Found]],
        loaders: SplitLoaders,
    ) -> Found | None:
        """Data of which no sample should be in others, by kind.

        Calibration data that have one are refused: they would void the bound. Of unseen data this is said later, where
        they are counted, unless all of them are known.
        """
        if value is None:
            return None
        found = find_data(argument, value, loaders, optional=True)
        samples = _identity(found[0])
        for kind, loader, split in ((kind, *found) for kind, several in others.items() for found in several):
            if found[1] == split:
                raise ConfigurationError(
                    f"`{argument}={value!r}` is {kind} data too.", "name a split that is used for nothing else."
                )
            common = int(is_among(samples, _identity(loader)).sum())
            if common and (argument == "calibration" or common == len(samples)):
                some = f"{common} of its {len(samples)} samples"
                raise ConfigurationError(
                    f"`{argument}`: {some} are in `{split}` too, which is {kind} data.",
                    "give data that are used for nothing else.",
                )
        return found

    def sources(
        self, loaders: SplitLoaders, **how: Any
    ) -> tuple[list[LoaderSource], list[LoaderSource], list[LoaderSource]]:
        """The known, the unseen and the calibration splits, ready to be read; `how` is for `make_source`."""
        how |= {"trainer": loaders.trainer, "model": loaders.model, "adapter": self.known.unpack}
        found = self.find(loaders)

        def make(loader: DataLoader[Any], split: str, **marks: Any) -> LoaderSource:
            limit = overfit_limit(loaders.trainer, loader) if marks and how["limit"] is None else how["limit"]
            source = make_source(loader, split, **marks, **{**how, "limit": limit})
            source = with_validation_view(source, partial(loaders.get, "val"))
            several = marks and self.known.draws > 1 and draws_at_random(source)
            return source.with_draws(self.known.draws) if several else source

        passed, failed = found.passed, found.failed
        if passed[1] == failed[1] or _same_samples(passed[0], failed[0]):
            known = [make(*(passed if split_and_loader(passed[1])[0] in SPLITS else failed), passed=True, failed=True)]
        else:
            known = [make(*passed, passed=True), make(*failed, failed=True)]
        unseen, calibration = ([] if one is None else [make(*one)] for one in (found.unseen, found.calibration))
        return known, unseen, calibration


@dataclass(frozen=True)
class SplitLoaders:
    """A trainer's data loaders in a fit, each asked for once: a data module may make its data anew every time."""

    trainer: Trainer
    model: LightningModule
    _loaders: dict[str, Any] = field(default_factory=dict)

    def get(self, split: str) -> Any:
        """The data loader of a split; None where there is none, see `find_loader`.

        Of several, `val:1` is the second, or the one with the key `1`.
        """
        split, which = split_and_loader(split)
        if split not in self._loaders:
            self._loaders[split] = find_loader(split, self.trainer, self.model)
        found = self._loaders[split]
        if not which or found is None:
            return found
        several = found if isinstance(found, (list, tuple, Mapping)) else [found]
        named = several if isinstance(several, Mapping) else {str(i): loader for i, loader in enumerate(several)}
        if which not in named:
            raise ConfigurationError(
                f"`{split}:{which}`: `{split}` data have no loader {which!r}.", f"take one of {list(named)}."
            )
        return named[which]


def find_loader(split: str, trainer: Trainer, model: LightningModule) -> Any:
    """The trainer's data loader of a split: `train`, `val`, `repair` or `test`; None where there is none."""
    if split in ("train", "val"):
        ready = trainer.train_dataloader if split == "train" else trainer.val_dataloaders
        given = ready if ready is not None else given_loaders(trainer, split)
        if given is not None:
            return given
    data = data_module_of(trainer)
    holder = model if data is None else data
    base = class_for(trainer, "pytorch.LightningModule" if data is None else "pytorch.LightningDataModule")
    if split == "repair":
        return holder.repair_dataloader() if isinstance(holder, _HasRepairData) else None
    name = f"{split}_dataloader"
    hook = getattr(holder, name)
    if not callable(hook) or getattr(type(holder), name) is getattr(base, name):
        return None
    try:
        return hook()
    except Exception:
        if split != "test" or data is None:
            raise
        # Only now: a data module may split its data anew in every `setup`.
        data.setup("test")
        return hook()


def overfit_limit(trainer: Trainer, loader: DataLoader[Any]) -> int | None:
    """How many batches of a loader `overfit_batches` leaves; None: all."""
    share = overfit_batches(trainer)
    return max(1, int(share * len(loader))) if isinstance(share, float) and share else int(share) or None


def describe_limits(trainer: Trainer, known: Sequence[LoaderSource]) -> str:
    """Sentences for a report: what the trainer's limits of batches mean for known data."""
    if batch_limit(trainer):
        return ""
    sentences = []
    for source in known:
        n, split = len(source.index), split_and_loader(source.split)[0]
        if overfit_batches(trainer):
            sentences.append(f"`overfit_batches`: known data are {n:,} samples of `{source.split}`.")
            continue
        limits = {"train": trainer.limit_train_batches, "val": trainer.limit_val_batches}
        limit, batches = limits.get(split, 1.0), -(-n // source.batch_size)
        if limit is not None and limit < (1.0 if isinstance(limit, float) else batches):
            sentences.append(
                f"All {n:,} samples of `{source.split}` are known data, whatever `limit_{split}_batches` says."
            )
    return " ".join(sentences)


def find_data(
    argument: str,
    value: str | DataLoader[Any],
    loaders: SplitLoaders,
    *,
    automatic: Sequence[str] = (),
    optional: bool = False,
) -> Found:
    """The data loader that is meant, and its name; `auto` is the first of the `automatic` splits that is there."""
    if isinstance(value, DataLoader):
        return value, argument
    splits = automatic if value == "auto" else (value,)
    for split in splits:
        loader = loaders.get(split)
        if loader is not None and loader != []:
            return check_loader(loader, split), split
    without = f", or do without: `{argument}=None`" if optional else ""
    raise ConfigurationError(
        f"`{argument}={value!r}`: there is no {' or '.join(f'`{split}_dataloader()`' for split in splits)}.",
        f"add it to the data module, or pass a DataLoader as `{argument}=`{without}.",
    )


def _same_samples(a: DataLoader[Any], b: DataLoader[Any]) -> bool:
    return torch.equal(_identity(a), _identity(b))


def _identity(loader: DataLoader[Any]) -> Tensor:
    """The samples of a loader, in order, as pairs of data set and place (`base_samples`)."""
    return base_samples(loader.dataset, sample_index(loader))
