"""Whether a sample comes out the same when it is read again, and what to say of data where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._lightning.packages import rank_zero_info, rank_zero_warn
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.seeded_dataset import SeededDataset
from lightning_nrl._utils.preserve import random_state, seed_cpu
from lightning_nrl.errors import DataWarning

MAX_SAMPLES_CHECKED = 32
"""Samples of a split that are read twice: those that change are noticed with 95 % if they are a tenth."""


@dataclass(frozen=True)
class Stability:
    """What reading some samples twice gave.

    Attributes:
        checked: how many samples were read twice.
        unstable: how many of them changed although they were read with the same random numbers.
    """

    checked: int
    unstable: int


def check_stability(samples: SeededDataset, positions: Sequence[int], collate: Callable[[Any], Any]) -> Stability:
    """Reads samples twice with the same random numbers of their own, but other ones around; notes if any are drawn.

    The global random states are as found afterwards. What a collate function draws at random counts as change.
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
                # Some ask for the seed and draw nothing.
                samples.draws = True
                stays = is_same(*read(i))
            unstable += not stays
    return Stability(len(positions), unstable)


def checked_positions(source: LoaderSource) -> list[int]:
    """Data-set positions of some samples, spread at random over a source."""
    order = torch.randperm(len(source.index), generator=torch.Generator().manual_seed(source.seed))
    return source.index[order[:MAX_SAMPLES_CHECKED].sort().values].tolist()


def draws_at_random(source: LoaderSource) -> bool:
    """Whether reading a source depends on random numbers, as far as some of its samples show."""
    check_stability(source.samples, checked_positions(source), source.loader.collate_fn)
    return source.samples.draws


def report_stability(sources: Sequence[LoaderSource]) -> str:
    """Sentences for a report: which splits draw at random and how they are read, and which come with no guarantee.

    Warns:
        DataWarning: samples of a split change although they are read with the same random numbers.
    """
    sentences = []
    for source in sources:
        found = check_stability(source.samples, checked_positions(source), source.loader.collate_fn)
        if found.unstable:
            changed = f"{found.unstable} of {found.checked} samples that were read twice changed"
            rank_zero_warn(
                DataWarning(
                    f"`{source.split}` data: {changed}, though they were read with the same random numbers.",
                    "nothing can be guaranteed of them. Draw from torch's, numpy's or Python's global generator in the "
                    "data set, not from one of its own or in the collate function, or pass a DataLoader that does not.",
                )
            )
            sentences.append(f"No guarantee for `{source.split}`: {changed}.")
            continue
        if source.has_validation_view:
            sentence = f"`{source.split}` was read with the `transform` of the validation data."
        elif source.samples.draws:
            fixed = "one fixed draw" if source.draws == 1 else f"{source.draws} fixed draws, as so many samples"
            sentence = f"`{source.split}` draws at random: each sample was counted in {fixed}."
        else:
            continue
        rank_zero_info(sentence)
        sentences.append(sentence)
    return " ".join(sentences)


def is_same(a: Any, b: Any) -> bool:
    """Whether two samples or batches are the same; what is neither tensor, array, number, text nor made of them is."""
    if isinstance(a, (Tensor, np.ndarray)):
        return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind in "fc"))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return not isinstance(a, (int, float, str)) or a == b or a != a
