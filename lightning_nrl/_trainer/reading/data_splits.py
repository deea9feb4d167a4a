"""`DataOptions`, and the loaders of the known, unseen and calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.packages import (
    LightningModule,
    Trainer,
    class_for,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    Loader,
    Loaders,
    batch_limit,
    data_module_of,
    given_loaders,
    overfit_batches,
    validating,
)
from lightning_nrl._trainer.reading.kept_streams import STREAM_LIMIT, KeptStream
from lightning_nrl._trainer.reading.loaders import (
    SPLITS,
    LoaderSource,
    batch_size_of,
    check_data,
    check_loader,
    check_one_rank,
    is_stream,
    loaders_in,
    make_source,
    parse_adapter,
    sample_index,
    split_and_loader,
)
from lightning_nrl._trainer.reading.random_transforms import draws_at_random, with_validation_view
from lightning_nrl._trainer.trainer_state import least_samples_of_epoch, make_evaluator
from lightning_nrl._utils.preserve import preserve_state, random_state
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data import Adapter
from lightning_nrl.data.sample_identity import base_samples, is_among
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    check_choice,
    check_kind,
    check_whole,
)
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.tasks import Task


@dataclass(frozen=True)
class DataOptions:
    """Sources of the known data, the unpacking of their batches, and the weights to repair.

    All samples of the passed and the failed data are known data, and the gate counts all of them.

    Attributes:
        passed: source of the passed samples: `auto` (the train data), `train`, `val`, `test`,
            `repair`, a DataLoader, or several of these. If `val` has several data loaders, `val`
            means all of them, `val:1` only the second.
        failed: source of the failures: `auto` (the data module's `repair_dataloader()` if it has
            one, else all validation data), or a value as for `passed`.
        adapter: function, or its address `package.module:function`. It either splits a batch,
            `f(batch) -> (args, kwargs, target)`, or runs the module, `f(module, batch) -> (logits,
            target)`. None: batches are `(x, y, *extras)`, or mappings with keys such as `image` and
            `label`.
        output: position, key or field of the logits among several outputs of the model. None: the
            field named `logits` or alike, else the first output, unless the module's own loss
            contradicts.
        draws: number of times, at least 1, that each known sample is read if its data set draws
            random numbers, as augmentation does. The seed fixes these numbers; they differ for each
            read. Each read counts as a sample.
        render: function, or its address, that turns a sample into an image or text for the report.
            None: an image, a table or tokens, depending on the shape of the model's input.
        augment: function `f(batch) -> batch`, or its address, that augments the targets when
            training continues. It may draw at random and return more samples than it gets. Reports
            count the samples without this augmentation. None: only the data set's own augmentation.
        start_from: weights to repair: the weights at the end of training (`last`), or the best
            checkpoint's (`best`).
        stream_limit: largest size in bytes of a stream, such as an `IterableDataset`, whose samples
            are kept in memory.

    Raises:
        ConfigurationError: on construction, for an invalid split, data loader, function or choice.

    Example:
        >>> DataOptions(passed="train", failed=["val", "test"], draws=2).failed
        ('val', 'test')
    """

    passed: str | DataLoader[Any] | Sequence[str | DataLoader[Any]] = "auto"
    failed: str | DataLoader[Any] | Sequence[str | DataLoader[Any]] = "auto"
    adapter: str | Adapter | None = None
    output: int | str | None = None
    draws: int = 1
    render: str | Callable[[Any], Any] | None = None
    augment: str | Callable[[Any], Any] | None = None
    start_from: Literal["last", "best"] = "last"
    stream_limit: int = STREAM_LIMIT

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", _check_known("passed", self.passed))
        object.__setattr__(self, "failed", _check_known("failed", self.failed))
        object.__setattr__(self, "adapter", parse_adapter(self.adapter))
        for name, function in {"render": self.render, "augment": self.augment}.items():
            if function is not None:
                object.__setattr__(self, name, import_function(name, function))
        check_whole("draws", self.draws, 1)
        check_whole("stream_limit", self.stream_limit, 1)
        check_choice("start_from", self.start_from, ("last", "best"))


def _check_known(argument: str, value: object) -> object:
    parts = value if isinstance(value, (list, tuple)) and value else (value,)
    checked = tuple(check_data(argument, part, ("auto", *SPLITS)) for part in parts)
    return checked if len(checked) > 1 else checked[0]


DataChoice: TypeAlias = str | Loader | None
"""The name of a split, a data loader, or no data."""


class NamedLoader(NamedTuple):
    """A data loader and its name in reports."""

    loader: Loader
    name: str

    @property
    def split(self) -> str:
        return split_and_loader(self.name)[0]

    def identity(self, *, as_read: bool = False) -> Tensor:
        """Returns the identity of each sample that the loader can draw, see `base_samples`."""
        index = torch.arange(len(self.loader.dataset))  # type: ignore[arg-type]
        if isinstance(self.loader, DataLoader):
            index = sample_index(self.loader)
        return base_samples(self.loader.dataset, index, as_read=as_read)

    def has_data_of(self, known: NamedLoader) -> bool:
        """True if both names are equal, or both loaders read the same samples."""
        if self.name == known.name:
            return True
        return torch.equal(self.identity(as_read=True), known.identity(as_read=True))


@dataclass(frozen=True)
class DataRequest:
    """The user's choice of known, unseen and calibration data, before their loaders are found."""

    options: DataOptions
    unseen: DataChoice = None
    calibration: DataChoice = None

    def __post_init__(self) -> None:
        fits = isinstance(self.options, DataOptions)
        check_kind("data", self.options, fits, "DataOptions", "data=DataOptions(...)")
        for argument, choice in (("unseen", self.unseen), ("calibration", self.calibration)):
            object.__setattr__(self, argument, check_data(argument, choice, optional=True))

    def find(self, loaders: SplitLoaders) -> tuple[list[NamedLoader], ...]:
        """Returns the passed, failed, unseen and calibration data; the last two may be empty.

        Refuses unseen data if all samples are known, and calibration data that share a sample with
        other data.
        """
        passed = find_data("passed", self.options.passed, loaders, ("train",))
        failed = find_data("failed", self.options.failed, loaders, ("repair", "val", "train"))
        if self.options.failed == "auto" and failed[0].split == "train":
            rank_zero_warn(
                DataWarning(
                    "no `repair_dataloader()` or `val_dataloader()`: failures of the train data "
                    "are repaired.",
                    "add one, since failures on other data say more, or set "
                    "`data=DataOptions(failed='train')`.",
                )
            )
        used = [("known", loader) for loader in (*passed, *failed)]
        unseen = self._find_held_out("unseen", self.unseen, used, loaders)
        used += [("unseen", loader) for loader in unseen]
        calibration = self._find_held_out("calibration", self.calibration, used, loaders)
        return passed, failed, unseen, calibration

    def _find_held_out(
        self,
        argument: str,
        value: DataChoice,
        used: Sequence[tuple[str, NamedLoader]],
        loaders: SplitLoaders,
    ) -> list[NamedLoader]:
        """Finds unseen or calibration data; refuses data that share samples with `used` data.

        Calibration data must share no sample with other data, or the bounds computed from them
        would not hold. Shared samples of unseen data are left out of the counts later, so only data
        that share all samples are refused.
        """
        if value is None:
            return []
        held_out = _single_loader(find_data(argument, value, loaders, optional=True))
        samples = held_out.identity()
        for kind, loader in used:
            n_common = int(is_among(samples, loader.identity()).sum())
            if n_common and (argument == "calibration" or n_common == len(samples)):
                raise ConfigurationError(
                    f"`{argument}`: {n_common} of its {len(samples)} samples are in "
                    f"`{loader.name}` too, which is {kind} data.",
                    "name a split that is used for nothing else, or give other data.",
                )
        return [held_out]

    def sources(
        self, loaders: SplitLoaders, *, seed: int, limit: int | None, whole: bool = False
    ) -> tuple[list[LoaderSource], list[LoaderSource], list[LoaderSource]]:
        """Returns the sources of the known, the unseen and the calibration splits.

        `limit` and `whole` are as in `make_source`.
        """
        passed_loaders, failed_loaders, unseen, calibration = self.find(loaders)

        def make(named: NamedLoader, *, passed: bool = False, failed: bool = False) -> LoaderSource:
            n_batches = limit
            is_known = passed or failed
            if is_known and limit is None:
                n_batches = overfit_limit(loaders.trainer, named.loader)
            source = make_source(
                named.loader,
                named.name,
                trainer=loaders.trainer,
                model=loaders.model,
                passed=passed,
                failed=failed,
                adapter=cast(Adapter, self.options.adapter),
                seed=seed,
                limit=n_batches,
                whole=whole,
            )
            source = with_validation_view(source, partial(loaders.get, "val"))
            if is_known and self.options.draws > 1 and draws_at_random(source):
                return source.with_draws(self.options.draws)
            return source

        # A loader that gives both passed and failed samples becomes one source.
        known = []
        only_failed = failed_loaders
        for passed_loader in passed_loaders:
            same_data = [loader for loader in only_failed if loader.has_data_of(passed_loader)]
            only_failed = [loader for loader in only_failed if loader not in same_data]
            named = _best_named(passed_loader, same_data)
            known.append(make(named, passed=True, failed=bool(same_data)))
        known += [make(loader, failed=True) for loader in only_failed]
        return known, [make(loader) for loader in unseen], [make(loader) for loader in calibration]


def _best_named(passed: NamedLoader, same_data: Sequence[NamedLoader]) -> NamedLoader:
    """Returns the loader whose name says most: that of a split, or else that of failed data."""
    for loader in (passed, *same_data):
        if loader.split in SPLITS:
            return loader
    return same_data[0] if same_data else passed


@dataclass(frozen=True)
class SplitLoaders:
    """Cache of a trainer's data loaders; a data module may create its data again on each call."""

    trainer: Trainer
    model: LightningModule
    stream_limit: int = STREAM_LIMIT
    _loaders: dict[str, Loaders] = field(default_factory=dict)
    _kept: dict[int, Loader] = field(default_factory=dict)

    def get(self, split: str) -> Loaders:
        """Returns the loaders of a split, or None.

        `val:1` means only the loader of `val` with number or key 1.
        """
        split, key = split_and_loader(split)
        if split not in self._loaders:
            self._loaders[split] = find_loader(split, self.trainer, self.model)
        loaders = self._loaders[split]
        if not key or loaders is None:
            return loaders
        by_key = loaders_in(loaders)
        if key not in by_key:
            raise ConfigurationError(
                f"`{split}:{key}`: `{split}` data have no loader {key!r}.",
                f"take one of {list(by_key)}.",
            )
        return by_key[key]

    def named(self, split: str) -> list[NamedLoader]:
        """Returns the loaders of a split, none if it is missing; several are named `val:key`."""
        loaders = self.get(split)
        if loaders is None:
            return []
        by_key = loaders_in(loaders)
        if len(by_key) == 1:
            return [NamedLoader(loader, split) for loader in by_key.values()]
        return [NamedLoader(loader, f"{split}:{key}") for key, loader in by_key.items()]

    def by_index(self, loader: Loaders, name: str) -> NamedLoader:
        """Returns the loader, or one that reads the samples of its stream from memory."""
        stream = check_loader(loader, name, streams=True)
        if not is_stream(stream):
            return NamedLoader(stream, name)
        if id(stream) not in self._kept:
            check_one_rank(self.trainer, name)
            n_trained = 0
            if loader is self.trainer.train_dataloader:
                n_trained = least_samples_of_epoch(self.trainer, batch_size_of(stream))
            limit = batch_limit(self.trainer)
            samples = KeptStream(stream, name, self.stream_limit, limit, n_trained)
            self._kept[id(stream)] = samples.loader_like(stream)
        return NamedLoader(self._kept[id(stream)], name)

    def for_training(self) -> Loaders:
        """Returns the training loaders; streams that are known data are read from memory."""
        loaders = self.get("train")
        return tree_map(
            lambda loader: self._kept.get(id(loader), loader),
            getattr(loaders, "iterables", loaders),
        )

    def not_counted(self, sources: Sequence[LoaderSource]) -> str:
        """Returns a sentence on loaders of the fit with samples that no source has, if any."""
        counted = torch.cat([source.identity for source in sources])
        names = [source.split for source in sources]
        missing = []
        for named in (*self.named("train"), *self.named("val")):
            if named.name in names:
                continue
            with suppress(Exception):  # it cannot be read by index
                if is_among(named.identity(), counted).all():
                    continue
            missing.append(f"`{named.name}`")
        if not missing:
            return ""
        return f"Not counted, so it is unknown what breaks in them: {', '.join(missing)}."


def find_loader(split: str, trainer: Trainer, model: LightningModule) -> Loaders:
    """Returns the trainer's data loaders of a split, such as `train` or `repair`, or None."""
    if split in ("train", "val"):
        loaders = trainer.train_dataloader if split == "train" else trainer.val_dataloaders
        if loaders is None:
            loaders = given_loaders(trainer, split)
        if loaders is not None:
            return loaders
    data = data_module_of(trainer)
    holder: Any = model
    base = class_for(trainer, "pytorch.LightningModule")
    if data is not None:
        holder = data
        base = class_for(trainer, "pytorch.LightningDataModule")
    if split == "repair":
        repair_data = getattr(holder, "repair_dataloader", None)
        return None if repair_data is None else repair_data()
    name = f"{split}_dataloader"
    hook = getattr(holder, name)
    # The hook may be an attribute of the object, such as a `functools.partial`.
    is_inherited = getattr(type(holder), name) is getattr(base, name) and name not in vars(holder)
    if is_inherited or not callable(hook):
        return None
    try:
        return hook()
    except Exception:
        if data is None:
            raise
        # `setup` runs only if needed, since it may split the data again.
        data.setup("test" if split == "test" else "fit")
        return hook()


def overfit_limit(trainer: Trainer, loader: Loader) -> int | None:
    """Returns the number of batches to which `overfit_batches` limits a loader, or None."""
    share = overfit_batches(trainer)
    if isinstance(share, float) and share:
        return max(1, int(share * len(loader)))
    return int(share) or None


def describe_limits(trainer: Trainer, known: Sequence[LoaderSource]) -> str:
    """Returns sentences on how the trainer's batch limits affect the known data, if they do."""
    if batch_limit(trainer):
        return ""
    limits = {"train": trainer.limit_train_batches, "val": trainer.limit_val_batches}
    sentences = []
    for source in known:
        n = len(source.index)
        split, _ = split_and_loader(source.split)
        limit = limits.get(split, 1.0)
        full = 1.0 if isinstance(limit, float) else -(-n // source.batch_size)
        if overfit_batches(trainer):
            sentences.append(
                f"`overfit_batches`: known data are {n:,} samples of `{source.split}`."
            )
        elif limit < full:
            sentences.append(
                f"All {n:,} samples of `{source.split}` are known data, whatever "
                f"`limit_{split}_batches` says."
            )
    return " ".join(sentences)


def find_data(
    argument: str,
    value: Any,
    loaders: SplitLoaders,
    automatic: Sequence[str] = (),
    *,
    optional: bool = False,
) -> list[NamedLoader]:
    """Returns all data loaders that `value` names; `auto` means the first split in `automatic`.

    Refuses data that do not exist. With `optional`, the hint also suggests the value None.
    """
    if isinstance(value, tuple):
        named = []
        for i, part in enumerate(value):
            name = f"{argument}:{i}" if isinstance(part, DataLoader) else argument
            named += find_data(name, part, loaders, automatic)
        return named
    if isinstance(value, DataLoader):
        return [loaders.by_index(value, argument)]
    splits = automatic if value == "auto" else (value,)
    for split in splits:
        if named := loaders.named(split):
            return [loaders.by_index(loader, name) for loader, name in named]
    hooks = " or ".join(f"`{split}_dataloader()`" for split in splits)
    do_without = f", or do without: `{argument}=None`" if optional else ""
    raise ConfigurationError(
        f"`{argument}={value!r}`: there is no {hooks}.",
        "add it to the data module (on the command line: `--data`), or pass a DataLoader as "
        f"`{argument}=`{do_without}.",
    )


def _single_loader(named: Sequence[NamedLoader]) -> NamedLoader:
    by_key = {split_and_loader(name)[1]: loader for loader, name in named}
    return NamedLoader(check_loader(by_key, named[0].split), named[0].name)


def find_splits(splits: tuple[str, ...], loaders: SplitLoaders) -> tuple[str, ...]:
    """Returns the splits to record; `auto` means all training and validation data with an index."""
    if splits != ("auto",):
        for split in splits:
            sample_index(check_loader(loaders.get(split), split))
        return splits
    recorded = []
    for loader, name in (*loaders.named("train"), *loaders.named("val")):
        try:
            sample_index(check_loader(loader, name))
            recorded.append(name)
        except ConfigurationError as error:
            problem = f"`TrainingHistory` does not record {error.problem}"
            rank_zero_warn(DataWarning(problem, error.hint))
    if not recorded:
        raise ConfigurationError(
            "`splits='auto'`: no training or validation data can be recorded.",
            "name data that can be read by index: `splits='repair'`.",
        )
    return tuple(recorded)


def run_splits(
    splits: Sequence[str], trainer: Trainer, model: LightningModule, task: Task, adapter: Adapter
) -> SampleResults:
    """Evaluates the model on all samples of some splits; restores modes and random states."""
    limit = batch_limit(trainer)
    with random_state(), validating(trainer), torch.no_grad(), preserve_state(model):
        model.eval()
        loaders = SplitLoaders(trainer, model)
        make = partial(make_source, trainer=trainer, model=model, adapter=adapter, limit=limit)
        sources = [make(loaders.get(split), split) for split in splits]
        return make_evaluator(trainer, model, task).run(sources)


def find_calibration(
    choice: DataChoice, loaders: SplitLoaders, *, needed: bool
) -> NamedLoader | None:
    """Returns the calibration data, or None if they are missing and not `needed`."""
    is_missing = choice is None or (isinstance(choice, str) and not loaders.named(choice))
    if is_missing and not needed:
        return None
    do_without = "a number as `strength=` with `calibration=None`" if needed else "None"
    return find_one("calibration", choice, loaders, f", or {do_without}")


def find_one(
    argument: str, choice: DataChoice, loaders: SplitLoaders, do_without: str = ""
) -> NamedLoader:
    """Returns the only data loader that `choice` names; refuses several.

    An error's hint ends with `do_without`.
    """
    try:
        return _single_loader(find_data(argument, choice, loaders))
    except ConfigurationError as error:
        hint = f"give one DataLoader over map-style data as `{argument}=`{do_without}."
        raise ConfigurationError(error.problem, hint) from error
