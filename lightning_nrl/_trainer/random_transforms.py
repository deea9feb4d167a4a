"""Finds data sets that draw random numbers, and replaces their transforms by those of the
validation data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_nrl._trainer.lightning.packages import rank_zero_info, rank_zero_warn
from lightning_nrl._trainer.loaders import LoaderSource, SeededDataset, loaders_in
from lightning_nrl._utils.preserve import random_state, seed_cpu
from lightning_nrl.data.batch import is_sliceable, tensors_in
from lightning_nrl.errors import DataWarning

MAX_SAMPLES_CHECKED = 32
"""Number of samples of a split that are read twice. If 10 % of the split change, 95 % of such
checks notice it.
"""


def check_stability(
    samples: SeededDataset, positions: Sequence[int], collate: Callable[[Any], Any]
) -> int:
    """Counts samples that differ between two reads. Sets `samples.draws` if the data set draws
    random numbers.
    """

    def read(i: int) -> list[Any]:
        found = []
        for around in (1, 2):
            seed_cpu(around)
            found.append(collate([samples[i]]))
        return found

    unstable = 0
    with random_state():
        for i in positions:
            stays = is_same(*read(i))
            if not stays and not samples.draws:
                # A data set may use the seed without a draw, which `SeededDataset` does not notice.
                samples.draws = True
                stays = is_same(*read(i))
            unstable += not stays
    return unstable


def check_order(source: LoaderSource, positions: Sequence[int]) -> int:
    """Counts samples of a batch whose tensors differ when the batch is read and collated in reverse
    order.
    """
    # They differ if the collate function reorders samples or draws random numbers.
    n = len(positions)

    def rows(order: Sequence[int]) -> list[Tensor]:
        seed_cpu(source.seed)
        raw = source.transfer(source.loader.collate_fn(source.samples.__getitems__(order)))
        args, kwargs, target = source.adapter(raw)
        known = (args, kwargs, target) if is_sliceable((args, kwargs), n) else target
        return [
            x for x in tensors_in(known) if x.ndim and len(x) == n and x.layout is torch.strided
        ]

    changed = torch.zeros(n, dtype=torch.bool)
    with random_state():
        for x, y in zip(rows(positions), (y.flip(0) for y in rows(positions[::-1])), strict=True):
            same = (
                x.shape == y.shape
                and ((x == y) | ((x != x) & (y != y)))[:, None].flatten(1).all(1).cpu()
            )
            changed |= ~torch.as_tensor(same)
    return int(changed.sum())


def _checked_positions(source: LoaderSource) -> list[int]:
    order = torch.randperm(len(source.index), generator=torch.Generator().manual_seed(source.seed))
    return source.index[order[:MAX_SAMPLES_CHECKED].sort().values].tolist()


def draws_at_random(source: LoaderSource) -> bool:
    check_stability(source.samples, _checked_positions(source), source.loader.collate_fn)
    return source.samples.draws


def report_stability(sources: Sequence[LoaderSource]) -> str:
    """Describes, for the report, splits that draw random numbers. Warns of splits whose samples are
    not repeatable.
    """
    sentences = []
    for source in sources:
        positions = _checked_positions(source)
        batch = positions[: source.batch_size]
        changed = ""
        if unstable := check_stability(source.samples, positions, source.loader.collate_fn):
            changed = f"{unstable} of {len(positions)} samples that were read twice changed"
            problem = f"{changed}, though they were read with the same random numbers"
            hint = (
                "Draw in the data set, not in the collate function, and from the global generator of torch, numpy or "
                "Python; or pass a DataLoader that draws nothing."
            )
        elif moved := check_order(source, batch):
            problem = changed = (
                f"{moved} of {len(batch)} samples of a batch in reverse order changed or swapped places"
            )
            hint = "Their ids in reports are wrong. Let the collate function keep the order, and draw nothing in it."
        if changed:
            hint = f"no guarantee holds for them. {hint}"
            rank_zero_warn(DataWarning(f"`{source.split}` data: {problem}.", hint))
            sentences.append(f"No guarantee for `{source.split}`: {changed}.")
            continue
        if source.has_validation_view:
            sentence = f"`{source.split}` was read with the `transform` of the validation data."
        elif source.samples.draws:
            fixed = (
                "one fixed draw"
                if source.draws == 1
                else f"{source.draws} fixed draws, as {source.draws} samples"
            )
            sentence = f"`{source.split}` draws at random: each sample was counted in {fixed}."
        else:
            continue
        rank_zero_info(sentence)
        sentences.append(sentence)
    return " ".join(sentences)


def is_same(a: Any, b: Any) -> bool:
    """True if two samples or batches hold equal tensors, arrays, numbers and texts; ignores
    anything else.
    """
    if (
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == torch.bfloat16
    ):  # numpy has no such dtype
        a, b = a.float(), b.float()
    if isinstance(a, (Tensor, np.ndarray)):
        return bool(
            np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind in "fc")
        )
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return not isinstance(a, (int, float, str)) or a == b or a != a


TRANSFORMS = ("transform", "transforms")
"""Attributes that hold the transforms of torchvision's data sets."""

Transforms = Mapping[type, Mapping[str, Any]]
"""Transforms of the validation data by class of data set."""


def with_validation_view(source: LoaderSource, validation: Callable[[], Any]) -> LoaderSource:
    """Returns a source with the `transform` of the validation data if its own transform draws
    random
    numbers.

    The source stays unchanged if the validation transform does not fit. A transform fits if it is
    of a data set of the same class and draws no random numbers, and if it changes neither the
    targets of the checked samples nor the dtypes and numbers of dimensions of their inputs.
    """
    dataset = source.loader.dataset
    if any(map(_own_transforms, innermost_datasets(dataset))):
        dataset = _with_transforms(dataset, _transforms_of(validation()))
    if dataset is source.loader.dataset or not draws_at_random(source):
        return source
    positions, collate = _checked_positions(source), source.loader.collate_fn
    view = SeededDataset(dataset, source.seed)
    try:
        stable = not check_stability(view, positions, collate) and not view.draws
        fits = stable and all(
            _is_same_sample(source, collate([source.samples[i]]), collate([view[i]]))
            for i in positions
        )
    except (
        Exception
    ):  # raised by the user's data set with a transform that was made for another one
        fits = False
    return replace(source, samples=view) if fits else source


def _is_same_sample(source: LoaderSource, own: Any, other: Any) -> bool:
    (*inputs, target), (*other_inputs, other_target) = source.adapter(own), source.adapter(other)
    kinds, other_kinds = (
        [(x.dtype, x.ndim) for x in tensors_in(part)] for part in (inputs, other_inputs)
    )
    return kinds == other_kinds and is_same(target, other_target)


def _transforms_of(loaders: Any) -> Transforms:
    found: dict[type, Mapping[str, Any]] = {}
    ambiguous = set()
    for dataset in innermost_datasets(loaders):
        own = _own_transforms(dataset)
        known = found.setdefault(type(dataset), own)
        if known.keys() != own.keys() or any(known[name] is not own[name] for name in own):
            ambiguous.add(type(dataset))
    return {kind: own for kind, own in found.items() if own and kind not in ambiguous}


def innermost_datasets(data: Any) -> Iterator[Dataset[Any]]:
    """Yields the data sets inside of loaders, `Subset` and `ConcatDataset`."""
    if isinstance(data, (Mapping, list, tuple)) or hasattr(data, "iterables"):
        for one in loaders_in(data).values():
            yield from innermost_datasets(one)
    elif isinstance(data, (DataLoader, Subset)):
        yield from innermost_datasets(data.dataset)
    elif isinstance(data, ConcatDataset):
        yield from innermost_datasets(data.datasets)
    elif isinstance(data, Dataset):
        yield data


def _own_transforms(dataset: Dataset[Any]) -> dict[str, Any]:
    return {name: vars(dataset)[name] for name in TRANSFORMS if name in vars(dataset)}


def _with_transforms(dataset: Dataset[Any], transforms: Transforms) -> Dataset[Any]:
    if isinstance(dataset, Subset):
        inner = _with_transforms(dataset.dataset, transforms)
        return dataset if inner is dataset.dataset else _copy_with(dataset, {"dataset": inner})
    if isinstance(dataset, ConcatDataset):
        parts: Sequence[Dataset[Any]] = [
            _with_transforms(part, transforms) for part in dataset.datasets
        ]
        unchanged = all(new is old for new, old in zip(parts, dataset.datasets, strict=True))
        return dataset if unchanged else _copy_with(dataset, {"datasets": parts})
    own, new = _own_transforms(dataset), transforms.get(type(dataset), {})
    if own.keys() != new.keys() or all(own[name] is new[name] for name in own):
        return dataset
    return _copy_with(dataset, new)


def _copy_with(dataset: Dataset[Any], attributes: Mapping[str, Any]) -> Dataset[Any]:
    view = copy.copy(dataset)
    vars(view).update(attributes)
    return view
