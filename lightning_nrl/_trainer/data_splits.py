"""`DataOptions`, and the loaders of the known, unseen and calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.packages import (
    LightningModule,
    Trainer,
    class_for,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    batch_limit,
    data_module_of,
    given_loaders,
    overfit_batches,
    validating,
)
from lightning_nrl._trainer.loaders import (
    SPLITS,
    LoaderSource,
    check_data,
    check_loader,
    loaders_in,
    make_source,
    parse_adapter,
    sample_index,
    split_and_loader,
)
from lightning_nrl._trainer.random_transforms import draws_at_random, with_validation_view
from lightning_nrl._trainer.trainer_state import make_evaluator
from lightning_nrl._utils.preserve import preserve_state, random_state
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.batch import Adapter
from lightning_nrl.data.sample_identity import base_samples, is_among
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    check_choice,
    check_kind,
    check_whole,
)
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Task


@dataclass(frozen=True)
class DataOptions:
    """Sources of the known data, the function that unpacks their batches, and the weights to
    repair.

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

    Raises:
        ConfigurationError: on construction, for an invalid split, data loader, function or choice.

    Example:
        >>> DataOptions(passed="train", failed=["val", "test"], draws=2).failed
        ('val', 'test')
    """

    passed: str | DataLoader[Any] | Sequence[str | DataLoader[Any]] = "auto"
    failed: str | DataLoader[Any] | Sequence[str | DataLoader[Any]] = "auto"
    adapter: str | Adapter | None = None
    draws: int = 1
    render: str | Callable[[Any], Any] | None = None
    augment: str | Callable[[Any], Any] | None = None
    start_from: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        for name in ("passed", "failed"):
            given = getattr(self, name)
            several = given if isinstance(given, (list, tuple)) and given else (given,)
            checked = tuple(check_data(name, one, ("auto", *SPLITS)) for one in several)
            object.__setattr__(self, name, checked if len(checked) > 1 else checked[0])
        object.__setattr__(self, "adapter", parse_adapter(self.adapter))
        for name in ("render", "augment"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, import_function(name, getattr(self, name)))
        check_whole("draws", self.draws, 1)
        check_choice("start_from", self.start_from, ("last", "best"))


NamedLoader = tuple[DataLoader[Any], str]
"""A data loader and its name in reports."""


@dataclass(frozen=True)
class DataRequest:
    """The user's choice of known, unseen and calibration data, for which the loaders are still to
    be found.
    """

    known: DataOptions
    unseen: str | DataLoader[Any] | None = None
    calibration: str | DataLoader[Any] | None = None

    def __post_init__(self) -> None:
        check_kind(
            "data",
            self.known,
            isinstance(self.known, DataOptions),
            "DataOptions",
            "data=DataOptions(...)",
        )
        for argument, given in (("unseen", self.unseen), ("calibration", self.calibration)):
            object.__setattr__(self, argument, check_data(argument, given, optional=True))

    def find(
        self, loaders: SplitLoaders
    ) -> tuple[list[NamedLoader], list[NamedLoader], NamedLoader | None, NamedLoader | None]:
        """Returns the passed, failed, unseen and calibration data. The last two are None if they
        are
        not requested.

        Refuses unseen data if all samples are known, and calibration data that share a sample with
        other data.
        """
        passed = find_data("passed", self.known.passed, loaders, ("train",))
        failed = find_data("failed", self.known.failed, loaders, ("repair", "val", "train"))
        if self.known.failed == "auto" and split_and_loader(failed[0][1])[0] == "train":
            problem = "no `repair_dataloader()` or `val_dataloader()`: failures of the train data are repaired."
            hint = "add one, since failures on other data say more, or set `data=DataOptions(failed='train')`."
            rank_zero_warn(DataWarning(problem, hint))
        others: dict[str, Sequence[NamedLoader]] = {"known": (*passed, *failed)}
        unseen = self._find_held_out("unseen", self.unseen, others, loaders)
        others["unseen"] = () if unseen is None else (unseen,)
        return (
            passed,
            failed,
            unseen,
            self._find_held_out("calibration", self.calibration, others, loaders),
        )

    def _find_held_out(
        self,
        argument: str,
        value: str | DataLoader[Any] | None,
        others: Mapping[str, Sequence[NamedLoader]],
        loaders: SplitLoaders,
    ) -> NamedLoader | None:
        # Calibration data must share no sample with other data, or the bounds computed from them
        # would not hold. Shared samples of unseen data are left out of the counts later.
        if value is None:
            return None
        found = _single_loader(find_data(argument, value, loaders, optional=True))
        samples = _sample_identity(found[0])
        for kind, loader, split in (
            (kind, *found) for kind, several in others.items() for found in several
        ):
            if found[1] == split:
                raise ConfigurationError(
                    f"`{argument}={value!r}` is {kind} data too.",
                    "name a split that is used for nothing else.",
                )
            common = int(is_among(samples, _sample_identity(loader)).sum())
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
        """Returns the sources of the known, the unseen and the calibration splits; `how` goes to
        `make_source`.
        """
        how |= {
            "trainer": loaders.trainer,
            "model": loaders.model,
            "adapter": cast(Adapter, self.known.adapter),
        }
        passed, failed, *held_out = self.find(loaders)

        def make(loader: DataLoader[Any], split: str, **marks: Any) -> LoaderSource:
            limit = (
                overfit_limit(loaders.trainer, loader)
                if marks and how["limit"] is None
                else how["limit"]
            )
            source = make_source(loader, split, **marks, **{**how, "limit": limit})
            source = with_validation_view(source, partial(loaders.get, "val"))
            several = marks and self.known.draws > 1 and draws_at_random(source)
            return source.with_draws(self.known.draws) if several else source

        known = []
        for loader, split in passed:
            own = _sample_identity(loader, as_read=True)
            twins = [
                x
                for x in failed
                if x[1] == split or torch.equal(_sample_identity(x[0], as_read=True), own)
            ]
            failed = [one for one in failed if one not in twins]
            named = [x for x in ((loader, split), *twins) if split_and_loader(x[1])[0] in SPLITS]
            known.append(
                make(*[*named, *twins, (loader, split)][0], passed=True, failed=bool(twins))
            )
        known += [make(*one, failed=True) for one in failed]
        unseen, calibration = ([] if one is None else [make(*one)] for one in held_out)
        return known, unseen, calibration


@dataclass(frozen=True)
class SplitLoaders:
    """Cache of a trainer's data loaders, since a data module may create its data again on each
    call.
    """

    trainer: Trainer
    model: LightningModule
    _loaders: dict[str, Any] = field(default_factory=dict)

    def get(self, split: str) -> Any:
        """Returns the loaders of a split, or None. `val:1` means only the loader of `val` with
        number or key 1.
        """
        split, which = split_and_loader(split)
        if split not in self._loaders:
            self._loaders[split] = find_loader(split, self.trainer, self.model)
        found = self._loaders[split]
        if not which or found is None:
            return found
        named = loaders_in(found)
        if which not in named:
            raise ConfigurationError(
                f"`{split}:{which}`: `{split}` data have no loader {which!r}.",
                f"take one of {list(named)}.",
            )
        return named[which]

    def named(self, split: str) -> list[NamedLoader]:
        """Returns pairs of a loader (None if missing) and its name. Several loaders are named
        `val:0` or `val:key`.
        """
        several = loaders_in(self.get(split))
        return [
            (one, split if len(several) == 1 else f"{split}:{which}")
            for which, one in several.items()
        ]

    def not_counted(self, sources: Sequence[LoaderSource]) -> str:
        """Returns a sentence on loaders of the fit with samples that are in none of the sources, or
        an empty text.
        """
        counted, names = (
            torch.cat([source.identity for source in sources]),
            [source.split for source in sources],
        )
        missing = []
        for loader, name in [one for split in ("train", "val") for one in self.named(split)]:
            try:
                covered = name in names or bool(
                    is_among(_sample_identity(check_loader(loader, name)), counted).all()
                )
            except Exception:  # it cannot be read by index
                covered = False
            if loader is not None and not covered:
                missing.append(f"`{name}`")
        return (
            f"Not counted, so it is unknown what breaks in them: {', '.join(missing)}."
            if missing
            else ""
        )


def find_loader(split: str, trainer: Trainer, model: LightningModule) -> Any:
    """Returns the trainer's data loaders of a split (`train`, `val`, `repair` or `test`), or None."""
    if split in ("train", "val"):
        ready = trainer.train_dataloader if split == "train" else trainer.val_dataloaders
        given = ready if ready is not None else given_loaders(trainer, split)
        if given is not None:
            return given
    data = data_module_of(trainer)
    holder: Any = model if data is None else data
    base = class_for(
        trainer, "pytorch.LightningModule" if data is None else "pytorch.LightningDataModule"
    )
    if split == "repair":
        repair_data = getattr(holder, "repair_dataloader", None)
        return None if repair_data is None else repair_data()
    name = f"{split}_dataloader"
    hook = getattr(holder, name)
    if not callable(hook) or getattr(type(holder), name) is getattr(base, name):
        return None
    try:
        return hook()
    except Exception:
        if split != "test" or data is None:
            raise
        # `setup` runs only if needed, since it may split the data again.
        data.setup("test")
        return hook()


def overfit_limit(trainer: Trainer, loader: DataLoader[Any]) -> int | None:
    """Returns the number of batches to which `overfit_batches` limits a loader, or None without a
    limit.
    """
    share = overfit_batches(trainer)
    return (
        max(1, int(share * len(loader)))
        if isinstance(share, float) and share
        else int(share) or None
    )


def describe_limits(trainer: Trainer, known: Sequence[LoaderSource]) -> str:
    """Returns sentences on how the trainer's batch limits affect the known data, or an empty text."""
    if batch_limit(trainer):
        return ""
    sentences = []
    for source in known:
        n, split = len(source.index), split_and_loader(source.split)[0]
        if overfit_batches(trainer):
            sentences.append(
                f"`overfit_batches`: known data are {n:,} samples of `{source.split}`."
            )
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
    value: Any,
    loaders: SplitLoaders,
    automatic: Sequence[str] = (),
    *,
    optional: bool = False,
) -> list[NamedLoader]:
    """Returns all data loaders that `value` names. `auto` means the first split in `automatic` that
    exists.

    Refuses data that do not exist. With `optional`, the hint also suggests the value None.
    """
    if isinstance(value, tuple):
        named = [
            (one, f"{argument}:{i}" if isinstance(one, DataLoader) else argument)
            for i, one in enumerate(value)
        ]
        return [found for one, name in named for found in find_data(name, one, loaders, automatic)]
    if isinstance(value, DataLoader):
        return [(value, argument)]
    splits = automatic if value == "auto" else (value,)
    for split in splits:
        if loaders.get(split) not in (None, []):
            return [(check_loader(loader, name), name) for loader, name in loaders.named(split)]
    without = f", or do without: `{argument}=None`" if optional else ""
    raise ConfigurationError(
        f"`{argument}={value!r}`: there is no {' or '.join(f'`{split}_dataloader()`' for split in splits)}.",
        f"add it to the data module (on the command line: `--data`), or pass a DataLoader as `{argument}=`{without}.",
    )


def _single_loader(found: Sequence[NamedLoader]) -> NamedLoader:
    split = split_and_loader(found[0][1])[0]
    loader = check_loader({split_and_loader(name)[1]: one for one, name in found}, split)
    return loader, found[0][1]


def _sample_identity(loader: DataLoader[Any], *, as_read: bool = False) -> Tensor:
    return base_samples(loader.dataset, sample_index(loader), as_read=as_read)


def find_splits(splits: tuple[str, ...], loaders: SplitLoaders) -> tuple[str, ...]:
    """Returns the splits to record. `auto` means all training and validation data that can be read
    by index.
    """
    if splits != ("auto",):
        for split in splits:
            sample_index(check_loader(loaders.get(split), split))
        return splits
    found: list[str] = []
    for name in ("train", "val"):
        for given, split in loaders.named(name):
            if given is not None:
                try:
                    sample_index(check_loader(given, split))
                    found.append(split)
                except ConfigurationError as error:
                    problem, _, hint = str(error).partition("\nHINT: ")
                    rank_zero_warn(
                        DataWarning(f"`TrainingHistory` does not record {problem}", hint)
                    )
    if not found:
        hint = "name data that can be read by index: `splits='repair'`."
        raise ConfigurationError(
            "`splits='auto'`: no training or validation data can be recorded.", hint
        )
    return tuple(found)


def run_splits(
    splits: Sequence[str], trainer: Trainer, model: LightningModule, task: Task, adapter: Adapter
) -> SampleResults:
    """Evaluates the model on all samples of some splits; restores modes and random states."""
    limit = batch_limit(trainer)
    with random_state(), validating(trainer), torch.no_grad(), preserve_state(model):
        model.eval()
        loaders = SplitLoaders(trainer, model)
        how: dict[str, Any] = {
            "trainer": trainer,
            "model": model,
            "adapter": adapter,
            "limit": limit,
        }
        sources = [make_source(loaders.get(split), split, **how) for split in splits]
        return make_evaluator(trainer, model, task).run(sources)


def find_calibration(
    given: str | DataLoader[Any] | None, loaders: SplitLoaders, *, needed: bool
) -> NamedLoader | None:
    """Returns the calibration data. If they are missing, returns None, or raises an error if they
    are `needed`.
    """
    missing = given is None or (isinstance(given, str) and loaders.get(given) in (None, []))
    if missing and not needed:
        return None
    do_without = "a number as `strength=` with `calibration=None`" if needed else "None"
    return find_one("calibration", given, loaders, f", or {do_without}")


def find_one(argument: str, given: Any, loaders: SplitLoaders, do_without: str = "") -> NamedLoader:
    """Returns the only data loader that `given` names; refuses several. An error's hint ends with
    `do_without`.
    """
    try:
        return _single_loader(find_data(argument, given, loaders))
    except ConfigurationError as error:
        found = str(error).partition("\nHINT:")[0]
        hint = f"give one DataLoader over map-style data as `{argument}=`{do_without}."
        raise ConfigurationError(found, hint) from error
