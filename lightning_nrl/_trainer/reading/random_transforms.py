"""Finds data sets that draw random numbers, and gives them the validation data's transforms."""

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
from lightning_nrl._trainer.reading.kept_streams import KeptStream
from lightning_nrl._trainer.reading.loaders import (
    AnyDataset,
    LoaderSource,
    Sample,
    SeededDataset,
    loaders_in,
)
from lightning_nrl._utils.formatting import plural
from lightning_nrl._utils.preserve import random_state, seed_cpu
from lightning_nrl.data.batch import is_sliceable, tensors_in
from lightning_nrl.errors import DataWarning

# Number of samples of a split that are read twice. If 10 % of the split change, 95 % of such checks
# notice it.
MAX_SAMPLES_CHECKED = 32


Collate = Callable[[list[Sample]], object]


def check_stability(samples: SeededDataset, positions: Sequence[int], collate: Collate) -> int:
    """Counts samples that differ between two reads.

    Sets `samples.draws` if the data set draws random numbers.
    """
    n_unstable = 0
    with random_state():
        for i in positions:
            is_stable = _is_repeatable(samples, i, collate)
            if not is_stable and not samples.draws:
                # A data set may use the seed without a draw, which `SeededDataset` does not notice.
                samples.draws = True
                is_stable = _is_repeatable(samples, i, collate)
            if not is_stable:
                n_unstable += 1
    return n_unstable


def _is_repeatable(samples: SeededDataset, i: int, collate: Collate) -> bool:
    reads = []
    for seed in (1, 2):
        seed_cpu(seed)
        reads.append(collate([samples[i]]))
    return is_same(*reads)


@random_state()
def count_changed(stream: KeptStream, collate: Collate) -> int:
    """Counts samples that differ when a stream is read again, with other random numbers.

    So do samples that only an earlier read had.
    """
    n_read = n_same = 0
    for n_read, sample in enumerate(stream.read(seed=1), 1):
        if n_read > len(stream):  # it may be endless now
            break
        n_same += is_same(collate([stream[n_read - 1]]), collate([sample]))
    return max(n_read, stream.longest) - n_same


def check_order(source: LoaderSource, positions: Sequence[int]) -> int:
    """Counts samples of a batch that change when it is read and collated in reverse order.

    They change if the collate function reorders samples or draws random numbers.
    """
    n = len(positions)

    def rows(order: Sequence[int]) -> list[Tensor]:
        seed_cpu(source.seed)
        raw = source.transfer(source.loader.collate_fn(source.samples.__getitems__(order)))
        args, kwargs, target = source.adapter(raw)
        by_sample = (args, kwargs, target) if is_sliceable((args, kwargs), n) else target
        tensors = [x for x in tensors_in(by_sample) if x.layout is torch.strided]
        return [x for x in tensors if x.ndim and len(x) == n]

    changed = torch.zeros(n, dtype=torch.bool)
    with random_state():
        for x, y in zip(rows(positions), rows(positions[::-1]), strict=True):
            changed |= ~_same_rows(x, y.flip(0))
    return int(changed.sum())


def _same_rows(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape:
        return torch.zeros(len(x), dtype=torch.bool)
    is_same_number: Tensor = _same_numbers(x, y)
    return is_same_number[:, None].flatten(1).all(1).cpu()


def _same_numbers(x: Any, y: Any) -> Any:
    """Marks equal numbers of two tensors or arrays; NaN equals NaN."""
    return (x == y) | ((x != x) & (y != y))


def _checked_positions(source: LoaderSource) -> list[int]:
    order = torch.randperm(len(source.index), generator=torch.Generator().manual_seed(source.seed))
    return source.index[order[:MAX_SAMPLES_CHECKED].sort().values].tolist()


def draws_at_random(source: LoaderSource) -> bool:
    check_stability(source.samples, _checked_positions(source), source.loader.collate_fn)
    return source.samples.draws


def report_stability(sources: Sequence[LoaderSource]) -> str:
    """Describes splits that draw random numbers. Warns of samples that are not repeatable."""
    sentences = []
    for source in sources:
        instability = _find_instability(source)
        if instability is not None:
            changed, hint = instability
            hint = f"no guarantee holds for them. {hint}"
            rank_zero_warn(DataWarning(f"`{source.split}` data: {changed}.", hint))
            sentences.append(f"No guarantee for `{source.split}`: {changed}.")
            continue
        sentence = _describe_draws(source)
        if sentence:
            rank_zero_info(sentence)
            sentences.append(sentence)
    return " ".join(sentences)


def _find_instability(source: LoaderSource) -> tuple[str, str] | None:
    """Says which samples change, with a hint; None if all samples are repeatable."""
    samples, collate = source.loader.dataset, source.loader.collate_fn
    if isinstance(samples, KeptStream) and (n_changed := count_changed(samples, collate)):
        changed = f"{plural(n_changed, 'sample')} changed or swapped places between two reads"
        hint = (
            "Another read may give samples that were not counted, and their ids in reports are "
            f"wrong. Give a stream that neither shuffles nor augments: {CLEAN_LOADER}."
        )
        return changed, hint
    positions = _checked_positions(source)
    n_changed = check_stability(source.samples, positions, source.loader.collate_fn)
    if n_changed:
        changed = (
            f"{n_changed} of {len(positions)} samples that were read twice changed, though they "
            "were read with the same random numbers"
        )
        hint = (
            "Draw in the data set, not in the collate function, and from the global generator of "
            f"torch, numpy or Python; or give a loader that draws nothing: {CLEAN_LOADER}."
        )
        return changed, hint
    batch = positions[: source.batch_size]
    n_changed = check_order(source, batch)
    if not n_changed:
        return None
    changed = (
        f"{n_changed} of {len(batch)} samples of a batch in reverse order changed or swapped places"
    )
    hint = (
        "Their ids in reports are wrong. Let the collate function keep the order, and draw nothing "
        f"in it; or, with MixUp in it, give a loader without: {CLEAN_LOADER}."
    )
    return changed, hint


def _describe_draws(source: LoaderSource) -> str:
    samples = source.loader.dataset
    if isinstance(samples, KeptStream):
        return (
            f"`{source.split}` is a stream: its {len(samples):,} samples were read once, in order, "
            f"and kept in memory ({samples.n_bytes / 1e6:,.3g} MB)."
        )
    if source.samples.dataset is not samples:
        return f"`{source.split}` was read with the `transform` of the validation data."
    if not source.samples.draws:
        return ""
    draws = "one fixed draw"
    if source.draws > 1:
        draws = f"{source.draws} fixed draws, as {source.draws} samples"
    return f"`{source.split}` draws at random: each sample was counted in {draws}."


CLEAN_LOADER = "`data=DataOptions(passed=DataLoader(dataset, batch_size=64))`"


def is_same(a: Any, b: Any) -> bool:
    """True if two samples or batches hold equal tensors, arrays, numbers and texts.

    Ignores anything else.
    """
    if isinstance(a, (Tensor, np.ndarray)):
        return a.shape == b.shape and bool(_same_numbers(a, b).all())
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return not isinstance(a, (int, float, str)) or a == b or a != a


TRANSFORMS = ("transform", "transforms")
"""Attributes that hold the transforms of torchvision's data sets."""

Transforms = Mapping[type, Mapping[str, object]]
"""Transforms of the validation data by class of data set."""


def with_validation_view(source: LoaderSource, validation: Callable[[], object]) -> LoaderSource:
    """Reads the source with the `transform` of the validation data if its own draws at random.

    The source stays unchanged if the validation transform does not fit. A transform fits if it is
    of a data set of the same class and draws no random numbers, and if it changes neither the
    targets of the checked samples nor the dtypes and numbers of dimensions of their inputs.
    """
    dataset = source.loader.dataset
    if any(map(_transforms_in, innermost_datasets(dataset))):
        dataset = _with_transforms(dataset, _transforms_of(validation()))
    if dataset is source.loader.dataset or not draws_at_random(source):
        return source
    view = SeededDataset(dataset, source.seed)
    try:
        fits = _fits(source, view)
    except Exception:  # of the user's data set, with a transform that was made for another one
        fits = False
    return replace(source, samples=view) if fits else source


def _fits(source: LoaderSource, view: SeededDataset) -> bool:
    positions, collate = _checked_positions(source), source.loader.collate_fn
    if check_stability(view, positions, collate) or view.draws:
        return False
    for i in positions:
        *inputs, target = source.adapter(collate([source.samples[i]]))
        *new_inputs, new_target = source.adapter(collate([view[i]]))
        if _kinds(inputs) != _kinds(new_inputs) or not is_same(target, new_target):
            return False
    return True


def _kinds(inputs: object) -> list[tuple[torch.dtype, int]]:
    return [(x.dtype, x.ndim) for x in tensors_in(inputs)]


def _transforms_of(loaders: object) -> Transforms:
    transforms: dict[type, Mapping[str, object]] = {}
    ambiguous = set()
    for dataset in innermost_datasets(loaders):
        new = _transforms_in(dataset)
        known = transforms.setdefault(type(dataset), new)
        if not _are_identical(known, new):
            ambiguous.add(type(dataset))
    return {kind: known for kind, known in transforms.items() if known and kind not in ambiguous}


def _are_identical(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def innermost_datasets(data: object) -> Iterator[AnyDataset]:
    """Yields the data sets inside of loaders, `Subset` and `ConcatDataset`."""
    if isinstance(data, (Mapping, list, tuple)) or hasattr(data, "iterables"):
        for loader in loaders_in(data).values():
            yield from innermost_datasets(loader)
    elif isinstance(data, (DataLoader, Subset)):
        yield from innermost_datasets(data.dataset)
    elif isinstance(data, ConcatDataset):
        yield from innermost_datasets(data.datasets)
    elif isinstance(data, Dataset):
        yield data


def _transforms_in(dataset: AnyDataset) -> dict[str, object]:
    return {name: vars(dataset)[name] for name in TRANSFORMS if name in vars(dataset)}


def _with_transforms(dataset: AnyDataset, transforms: Transforms) -> AnyDataset:
    if isinstance(dataset, Subset):
        part = _with_transforms(dataset.dataset, transforms)
        return dataset if part is dataset.dataset else _copy_with(dataset, {"dataset": part})
    if isinstance(dataset, ConcatDataset):
        parts = [_with_transforms(part, transforms) for part in dataset.datasets]
        is_unchanged = all(new is old for new, old in zip(parts, dataset.datasets, strict=True))
        return dataset if is_unchanged else _copy_with(dataset, {"datasets": parts})
    old, new = _transforms_in(dataset), transforms.get(type(dataset), {})
    if old.keys() != new.keys() or _are_identical(old, new):
        return dataset
    return _copy_with(dataset, new)


def _copy_with(dataset: AnyDataset, attributes: Mapping[str, object]) -> AnyDataset:
    view = copy.copy(dataset)
    vars(view).update(attributes)
    return view
