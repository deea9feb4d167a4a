"""Slices, labels and confusions that the samples broken by a new model have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from lightning_nrl.records.stats import binomial_cdf, p_of_overlap
from lightning_nrl.updates.model_pair import ModelPair

MAX_TRAITS = 5
LEVEL = 0.05  # largest p-value, corrected for the number of traits


class _Trait(NamedTuple):
    text: str
    p: float


def common_traits(pair: ModelPair) -> tuple[str, ...]:
    """Describes slices, labels and confusions that are more frequent in broken samples than chance.

    A slice or a label is compared with all samples that were right (Fisher's exact test), a
    confusion with broken samples of random labels that are taken for random other classes (exact
    binomial test). p-values are corrected for the number of comparisons (Bonferroni).

    Returns:
        At most `MAX_TRAITS` texts, the least probable first.
    """
    traits: list[_Trait] = []
    n_comparisons = 0
    for split in pair.splits:
        right = pair.rows(split) & pair.before.passed
        shares = list(_shares(pair, split, right))
        traits += shares
        n_comparisons += len(shares)
        classes = {*pair.after.label[right].tolist(), *pair.after.prediction[right].tolist()}
        if min(classes, default=-1) >= 0:  # else the task has no classes
            traits += _confusions(pair, split, right, len(classes))
            n_comparisons += len(classes) * (len(classes) - 1)
    traits.sort(key=lambda trait: trait.p)
    texts = []
    for trait in traits[:MAX_TRAITS]:
        p = min(1.0, trait.p * n_comparisons)
        if p <= LEVEL:
            texts.append(f"{trait.text} (p = {p:.1g})")
    return tuple(texts)


def _shares(pair: ModelPair, split: str, right: Tensor) -> Iterator[_Trait]:
    """Compares each slice and label among broken samples with that among all right ones."""
    masks = {f"slice {name!r}": mask for name, mask in pair.slices_of(split).items()}
    for label in pair.after.label[right].unique().tolist():
        if label >= 0:  # the task has classes
            masks[f"label {label}"] = pair.after.label == label
    broken = right & pair.flips.broken
    n_right, n_broken = int(right.sum()), int(broken.sum())
    for name, mask in masks.items():
        n_marked, n_both = int((mask & right).sum()), int((mask & broken).sum())
        text = f"{split}: {name}: {n_both:,} of {n_broken:,} broken samples"
        text += f", {n_marked:,} of {n_right:,} that were right"
        yield _Trait(text, p_of_overlap(n_both, n_broken, n_marked, n_right))


def _confusions(pair: ModelPair, split: str, right: Tensor, n_classes: int) -> Iterator[_Trait]:
    """Compares each confusion among broken samples with random classes."""
    labels = Counter(pair.after.label[right].tolist())
    broken = right & pair.flips.broken
    label, prediction = pair.after.label[broken].tolist(), pair.after.prediction[broken].tolist()
    for (true, predicted), n in Counter(zip(label, prediction, strict=True)).items():
        share_of_others = 1 - labels[true] / labels.total() / (n_classes - 1)
        if share_of_others:
            text = f"{split}: {true} taken for {predicted}: {n:,} of {len(label):,} broken samples"
            yield _Trait(text, binomial_cdf(len(label) - n, len(label), share_of_others))
