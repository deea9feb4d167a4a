"""Slices, labels and confusions that the samples broken by a new model have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl.evaluation.stats import binomial_cdf, p_of_overlap
from lightning_nrl.release.model_pair import ModelPair

MAX_TRAITS = 5
LEVEL = 0.05  # largest p-value, corrected for the number of traits


class _Trait(NamedTuple):
    text: str
    p: float


def common_traits(pair: ModelPair) -> tuple[str, ...]:
    """Describes slices, labels and confusions that are more frequent in broken samples than chance.

    The share of a slice or a label is compared with that among all samples that were right
    (Fisher's exact test). The predictions for broken samples of a label are compared with a random
    other class (exact binomial test). p-values are corrected for the number of comparisons of
    either kind (Bonferroni).

    Returns:
        At most `MAX_TRAITS` texts, the least probable first.
    """
    shares: list[_Trait] = []
    confusions: list[_Trait] = []
    n_confusions = 0
    for split in pair.splits:
        right = pair.rows(split) & pair.before.passed
        shares += _shares(pair, split, right)
        broken = right & pair.flips.broken
        label = pair.after.label[broken].tolist()
        prediction = pair.after.prediction[broken].tolist()
        n_classes = len({*pair.after.label[right].tolist(), *prediction})
        if label and n_classes > 2 and min((*label, *prediction)) >= 0:
            confusions += _confusions(split, label, prediction, n_classes)
            n_confusions += len(set(label)) * (n_classes - 1)
    corrected = [trait._replace(p=2 * len(shares) * trait.p) for trait in shares]
    corrected += [trait._replace(p=2 * n_confusions * trait.p) for trait in confusions]
    corrected.sort(key=lambda trait: trait.p)
    return tuple(
        f"{trait.text} (p = {trait.p:.1g})" for trait in corrected[:MAX_TRAITS] if trait.p <= LEVEL
    )


def _shares(pair: ModelPair, split: str, right: Tensor) -> Iterator[_Trait]:
    """Compares each slice and label among broken samples with that among all right ones."""
    masks = {f"slice {name!r}": mask & right for name, mask in pair.slices_of(split).items()}
    for label in pair.after.label[right].unique().tolist():
        of_label = right & (pair.after.label == label)
        is_slice = any(torch.equal(of_label, mask) for mask in masks.values())
        if label >= 0 and not is_slice:  # -1: the task has no classes
            masks[f"label {label}"] = of_label
    broken = right & pair.flips.broken
    n_right, n_broken = int(right.sum()), int(broken.sum())
    for name, mask in masks.items():
        n_marked, n_both = int(mask.sum()), int((mask & broken).sum())
        text = f"{split}: {name}: {n_both:,} of {n_broken:,} broken samples"
        text += f", {n_marked:,} of {n_right:,} that were right"
        yield _Trait(text, p_of_overlap(n_both, n_broken, n_marked, n_right))


def _confusions(
    split: str, label: Sequence[int], prediction: Sequence[int], n_classes: int
) -> Iterator[_Trait]:
    """Compares the predictions for broken samples of each label with a random other class."""
    n_of_label = Counter(label)
    share_of_others = 1 - 1 / (n_classes - 1)
    for (true, predicted), n in Counter(zip(label, prediction, strict=True)).items():
        n_broken = n_of_label[true]
        counts = f"{n:,} of its {n_broken:,} broken samples"
        text = f"{split}: {true} taken for {predicted}: {counts}"
        yield _Trait(text, binomial_cdf(n_broken - n, n_broken, share_of_others))
