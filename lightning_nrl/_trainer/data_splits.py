"""`DataOptions`, and the loaders of the known, unseen and calibration data that they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, class_for, rank_zero_warn
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
from lightning_nrl._utils.preserve import preserve, random_state
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.batch import Adapter
from lightning_nrl.data.sample_identity import base_samples, is_among
from lightning_nrl.errors import ConfigurationError, DataWarning, check_choice, check_kind, check_whole
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Task
from lightning_nrl.updates.interpolation import ShareChoice


@dataclass(frozen=True)
class DataOptions:
    """Sources of known data, the way their batches are read, and the trained weights to repair.

    All samples of the passed and the failed data are known data, and the gate counts them.

    Attributes:
        passed: where passed samples come from: `auto` (the train data), `train`, `val`, `test`, `repair`, a DataLoader,
            or several of them. Of several data loaders, `val` means all and `val:1` the second.
        failed: where failures come from: `auto` (the data module's `repair_dataloader()` if it has one, else all
            validation data), or as for `passed`.
        adapter: takes your batches apart, `f(batch) -> (args, kwargs, target)`, or runs the module on them as it is
            deployed, `f(module, batch) -> (logits, target)`; the function, or its address,
            `package.module:function`; None: `(x, y, *extras)` or a mapping with the usual keys.
        draws: how many fixed draws of each known sample are counted where its data set draws at random, as
            augmentation does; from 1. Each counts as a sample: one is broken if any of its draws breaks.
        render: makes an image or text of a sample as its data set gives it, for the report's reader: the function, or
            its address; None: the input is shown as an image, a table or tokens, whatever it looks like.
        augment: changes the targets that training goes on with: `f(batch) -> batch` of a batch of targets as the data
            loader gives it, or its address. It may give more samples than it gets, or draw at random. What is counted
            are the samples as they are. None: only your own augmentation.
        start_from: `last`: the weights at the end of training; `best`: those of the best checkpoint.

    Raises:
        ConfigurationError: on construction, for what is no split, no data loader that can be read by index, no
            function, or another word.
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


Found = tuple[DataLoader[Any], str]
"""A data loader and the name that reports use for it."""


@dataclass(frozen=True)
class DataRequest:
    """Which data are known, unseen and calibration data, as the user said it: a data loader, a split's name or None."""

    known: DataOptions
    unseen: str | DataLoader[Any] | None = None
    calibration: str | DataLoader[Any] | None = None

    def __post_init__(self) -> None:
        check_kind("data", self.known, isinstance(self.known, DataOptions), "DataOptions", "data=DataOptions(...)")
        for argument, given in (("unseen", self.unseen), ("calibration", self.calibration)):
            object.__setattr__(self, argument, check_data(argument, given, optional=True))

    def find(self, loaders: SplitLoaders) -> tuple[list[Found], list[Found], Found | None, Found | None]:
        """Passed, failed, unseen and calibration data; the last two may not be used for anything else."""
        passed = find_data("passed", self.known.passed, loaders, ("train",))
        failed = find_data("failed", self.known.failed, loaders, ("repair", "val", "train"))
        if self.known.failed == "auto" and split_and_loader(failed[0][1])[0] == "train":
            problem = "no `repair_dataloader()` or `val_dataloader()`: failures of the train data are repaired."
            hint = "add one: what a model gets wrong of other data says more; or `data=DataOptions(failed='train')`."
            rank_zero_warn(DataWarning(problem, hint))
        others: dict[str, Sequence[Found]] = {"known": (*passed, *failed)}
        unseen = self._find_held_out("unseen", self.unseen, others, loaders)
        others["unseen"] = () if unseen is None else (unseen,)
        return passed, failed, unseen, self._find_held_out("calibration", self.calibration, others, loaders)

    def _find_held_out(
        self,
        argument: str,
        value: str | DataLoader[Any] | None,
        others: Mapping[str, Sequence[Found]],
        loaders: SplitLoaders,
    ) -> Found | None:
        """Data that share no sample with others, by kind.

        Calibration data that do are refused: they would void the bound. Unseen data are counted without such samples,
        unless all of them are known.
        """
        if value is None:
            return None
        found = _only(find_data(argument, value, loaders, optional=True))
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
        how |= {"trainer": loaders.trainer, "model": loaders.model, "adapter": cast(Adapter, self.known.adapter)}
        passed, failed, *held_out = self.find(loaders)

        def make(loader: DataLoader[Any], split: str, **marks: Any) -> LoaderSource:
            limit = overfit_limit(loaders.trainer, loader) if marks and how["limit"] is None else how["limit"]
            source = make_source(loader, split, **marks, **{**how, "limit": limit})
            source = with_validation_view(source, partial(loaders.get, "val"))
            several = marks and self.known.draws > 1 and draws_at_random(source)
            return source.with_draws(self.known.draws) if several else source

        known = []
        for loader, split in passed:
            own = _identity(loader, as_read=True)
            twins = [x for x in failed if x[1] == split or torch.equal(_identity(x[0], as_read=True), own)]
            failed = [one for one in failed if one not in twins]
            named = [x for x in ((loader, split), *twins) if split_and_loader(x[1])[0] in SPLITS]
            known.append(make(*[*named, *twins, (loader, split)][0], passed=True, failed=bool(twins)))
        known += [make(*one, failed=True) for one in failed]
        unseen, calibration = ([] if one is None else [make(*one)] for one in held_out)
        return known, unseen, calibration


@dataclass(frozen=True)
class SplitLoaders:
    """A trainer's data loaders, each asked for once: a data module may make its data anew every time."""

    trainer: Trainer
    model: LightningModule
    _loaders: dict[str, Any] = field(default_factory=dict)

    def get(self, split: str) -> Any:
        """The data loader of a split, or None; of several, `val:1` is the second, or the one with the key `1`."""
        split, which = split_and_loader(split)
        if split not in self._loaders:
            self._loaders[split] = find_loader(split, self.trainer, self.model)
        found = self._loaders[split]
        if not which or found is None:
            return found
        named = loaders_in(found)
        if which not in named:
            raise ConfigurationError(
                f"`{split}:{which}`: `{split}` data have no loader {which!r}.", f"take one of {list(named)}."
            )
        return named[which]

    def named(self, split: str) -> list[Found]:
        """The loaders of a split: `val`, or of several `val:0`, `val:1` or `val:key`; not checked."""
        several = loaders_in(self.get(split))
        return [(one, split if len(several) == 1 else f"{split}:{which}") for which, one in several.items()]

    def not_counted(self, sources: Sequence[LoaderSource]) -> str:
        """A sentence for a report on the loaders of the fit that hold samples of none of these sources, or empty."""
        counted, names = torch.cat([source.identity for source in sources]), [source.split for source in sources]
        missing = []
        for loader, name in [one for split in ("train", "val") for one in self.named(split)]:
            try:
                covered = name in names or bool(is_among(_identity(check_loader(loader, name)), counted).all())
            except Exception:  # it cannot be read by index
                covered = False
            if loader is not None and not covered:
                missing.append(f"`{name}`")
        return f"Not counted, so nothing is known of what breaks there: {', '.join(missing)}." if missing else ""


def find_loader(split: str, trainer: Trainer, model: LightningModule) -> Any:
    """The trainer's data loader of a split: `train`, `val`, `repair` or `test`; None where there is none."""
    if split in ("train", "val"):
        ready = trainer.train_dataloader if split == "train" else trainer.val_dataloaders
        given = ready if ready is not None else given_loaders(trainer, split)
        if given is not None:
            return given
    data = data_module_of(trainer)
    holder: Any = model if data is None else data
    base = class_for(trainer, "pytorch.LightningModule" if data is None else "pytorch.LightningDataModule")
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
        # Only now: a data module may split its data anew in every `setup`.
        data.setup("test")
        return hook()


def overfit_limit(trainer: Trainer, loader: DataLoader[Any]) -> int | None:
    """Returns the number of batches that `overfit_batches` leaves of a loader; None: all."""
    share = overfit_batches(trainer)
    return max(1, int(share * len(loader))) if isinstance(share, float) and share else int(share) or None


def describe_limits(trainer: Trainer, known: Sequence[LoaderSource]) -> str:
    """Sentences for a report on what the trainer's limits of batches mean for known data."""
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
    argument: str, value: Any, loaders: SplitLoaders, automatic: Sequence[str] = (), *, optional: bool = False
) -> list[Found]:
    """The data loaders that are meant, and their names: all of a split that has several.

    `auto` is the first of the `automatic` splits that is there.
    """
    if isinstance(value, tuple):
        named = [(one, f"{argument}:{i}" if isinstance(one, DataLoader) else argument) for i, one in enumerate(value)]
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
        f"add it to the data module, or pass a DataLoader as `{argument}=`{without}.",
    )


def _only(found: Sequence[Found]) -> Found:
    """The one data loader that was found; refuses several."""
    split = split_and_loader(found[0][1])[0]
    loader = check_loader({split_and_loader(name)[1]: one for one, name in found}, split)
    return loader, found[0][1]


def _identity(loader: DataLoader[Any], *, as_read: bool = False) -> Tensor:
    """The samples of a loader, in order, as pairs of data set and place (`base_samples`)."""
    return base_samples(loader.dataset, sample_index(loader), as_read=as_read)


def find_splits(splits: tuple[str, ...], loaders: SplitLoaders) -> tuple[str, ...]:
    """Returns the splits to be recorded; `auto`: training and validation data that can be."""
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
                    rank_zero_warn(DataWarning(f"`TrainingHistory` does not record {problem}", hint))
    if not found:
        hint = "name data that can be read by index: `splits='repair'`."
        raise ConfigurationError("`splits='auto'`: no training or validation data can be recorded.", hint)
    return tuple(found)


def run_splits(
    splits: Sequence[str], trainer: Trainer, model: LightningModule, task: Task, adapter: Adapter
) -> SampleResults:
    """Evaluates the model on all samples of some splits; modes and random states stay as found."""
    limit = batch_limit(trainer)
    with random_state(), validating(trainer), torch.no_grad(), preserve(model):
        model.eval()
        loaders = SplitLoaders(trainer, model)
        how: dict[str, Any] = {"trainer": trainer, "model": model, "adapter": adapter, "limit": limit}
        sources = [make_source(loaders.get(split), split, **how) for split in splits]
        return make_evaluator(trainer, model, task).run(sources)


def find_calibration(given: str | DataLoader[Any] | None, loaders: SplitLoaders, *, needed: bool) -> Found | None:
    """The calibration data; None if there are none and none are needed."""
    missing = given is None or (isinstance(given, str) and loaders.get(given) in (None, []))
    if missing and not needed:
        return None
    do_without = "a number as `share=` with `calibration=None`" if needed else "None"
    return find_one("calibration", given, loaders, f", or {do_without}")


def find_one(argument: str, given: Any, loaders: SplitLoaders, do_without: str = "") -> Found:
    """The one data loader that is meant, and its name."""
    try:
        return _only(find_data(argument, given, loaders))
    except ConfigurationError as error:
        found = str(error).partition("\nHINT:")[0]
        hint = f"give one DataLoader over a data set with an index as `{argument}=`{do_without}."
        raise ConfigurationError(found, hint) from error


def choice_numbers(choice: ShareChoice) -> dict[str, float]:
    """Numbers for loggers: accuracy and negative flip rate on calibration data, before and after."""
    before, after = choice.curve[0], choice.chosen
    return {
        "share": choice.share,
        "accuracy_before": before.accuracy,
        "accuracy": after.accuracy,
        "nfr_before": before.negative_flip_rate,
        "nfr": after.negative_flip_rate,
    }
