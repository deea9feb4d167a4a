"""Which threshold of a `MarginSwitch` keeps regressions within a limit, counted on calibration data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_nrl._utils.deserialize import Record
from lightning_nrl._utils.serialize import null_is
from lightning_nrl.errors import ConfigurationError, check_whole
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.gate import Gate
from lightning_nrl.report._formatting import percent
from lightning_nrl.report.page import Page, Shown, curve_page
from lightning_nrl.serving.margin_switch import Classes, ClassMapping, check_logits, margin_over, predicts
from lightning_nrl.tasks import Multiclass
from lightning_nrl.tasks.multiclass import check_whole_labels

__all__ = ["ThresholdChoice", "ThresholdPoint", "choose_threshold", "gate_of", "judged"]


@dataclass(frozen=True)
class ThresholdPoint:
    """What becomes of the samples, from the old model to a switch with one threshold, in logits.

    `-inf` is the new model alone, which answers a `share` of the samples in [0, 1].
    """

    threshold: float = field(metadata=null_is(-math.inf))
    counts: FlipCounts
    share: float


@dataclass(frozen=True)
class ThresholdChoice(Record, Shown):
    """A threshold, and what others would do. `rich.print(choice)` shows it as a table.

    Attributes:
        chosen: the smallest threshold within the limit.
        curve: for each number of broken samples that can be had, the smallest threshold that gives it, ascending, with
            the chosen one; about evenly thinned if these are many. The first is the new model alone, the last breaks
            none.
        limit: the limit, as `Gate.parse` reads it.
    """

    chosen: ThresholdPoint
    curve: tuple[ThresholdPoint, ...]
    limit: str

    @property
    def threshold(self) -> float:
        """What `MarginSwitch` is to be given."""
        return self.chosen.threshold

    def to_table(self) -> Page:
        """The curve as a page, for rich's `print`."""
        points = []
        for point in self.curve:
            c = point.counts
            cells = (*(f"{n:,}" for n in (c.repaired, c.broken, c.kept, c.failing)), percent(point.share))
            points.append((f"margin above {point.threshold:.4g}", cells, point == self.chosen))
        text = f"The smallest threshold within {self.limit!r}: {self.threshold:.6g}."
        return curve_page("Threshold", text, ("repaired", "broken", "kept", "failing", "by the new model"), points)


@torch.no_grad()
def choose_threshold(
    old: Tensor,
    new: Tensor,
    labels: Tensor,
    limit: Gate | str | float,
    *,
    classes: Classes | None = None,
    points: int = 50,
) -> ThresholdChoice:
    """Finds the smallest threshold at which a switch breaks no more samples than allowed.

    The smallest is the best: with a rising threshold, what is broken and what is repaired can both only become fewer.
    Counts are exact, and those of a `MarginSwitch` that gives the same logits. Use data on which neither model was
    trained or repaired: on others the new model is surer, and the threshold too low.

    Args:
        old: the old model's logits `n x C_old`, or its predicted classes, `n` integers.
        new: the new model's logits `n x C`.
        labels: the true classes, `n` integers, as the new model numbers them.
        limit: a gate or its text, such as `instance`, `accuracy`, `tolerance:3`, `tolerance:0.1%` (of the samples that
            the old model got right); a whole number of samples; or a fraction of them in [0, 1].
        classes: for each class of the old model its index in the new model's output; None if both have the same.
        points: how many points the curve has at most, from 3.

    Raises:
        ConfigurationError: shapes do not fit together, there is no sample, or the limit or `classes` cannot be read.

    Example:
        The new model repairs the first two samples and breaks the last two, one of them with more conviction.

        >>> labels = torch.tensor([1, 1, 0, 0])
        >>> old = torch.tensor([0, 0, 0, 0])
        >>> new = torch.tensor([[0.0, 4.0], [0.0, 2.0], [0.0, 3.0], [0.0, 1.0]])
        >>> choice = choose_threshold(old, new, labels, limit=1)
        >>> [(point.threshold, point.counts.repaired, point.counts.broken) for point in choice.curve]
        [(-inf, 2, 2), (1.0, 2, 1), (3.0, 1, 0)]
        >>> choice.threshold
        1.0
    """
    gate = gate_of(limit)
    check_whole("points", points, 3)
    was_right, predicted, labels = judged(old, new, labels, ClassMapping(classes))
    new = new.cpu()
    now_right, margin = predicts(new, labels), margin_over(new, predicted)
    # Whatever the threshold, the new model answers where it agrees, and does not where its margin is NaN.
    agrees = predicts(new, predicted)
    asked = ~agrees & ~margin.isnan()
    masks = (was_right & ~now_right & asked, ~was_right & now_right & asked, asked)
    broken, repaired, disagreeing = (margin[mask] for mask in masks)
    # Broken samples become fewer at their margins and nowhere else; in between a higher threshold only loses repairs.
    thresholds = torch.cat([margin.new_tensor([-math.inf]), broken.unique()])
    passed, n, same = int(was_right.sum()), len(margin), int(agrees.sum())
    columns = zip(
        thresholds.tolist(), *(_above(margins, thresholds) for margins in (broken, repaired, disagreeing)), strict=True
    )
    curve = [
        ThresholdPoint(
            at, FlipCounts(kept=passed - b, broken=b, repaired=r, failing=n - passed - r), (same + above) / n
        )
        for at, b, r, above in columns
    ]
    chosen = next(i for i, point in enumerate(curve) if gate.lets_through(point.counts))
    kept = sorted({*_evenly(len(curve), points - 1), chosen})
    return ThresholdChoice(curve[chosen], tuple(curve[i] for i in kept), str(gate))


def gate_of(limit: Gate | str | float) -> Gate:
    """A limit as a gate: a number is a tolerance."""
    return limit if isinstance(limit, Gate) else Gate.parse(limit) if isinstance(limit, str) else Gate.tolerance(limit)


def _above(margins: Tensor, thresholds: Tensor) -> list[int]:
    """How many of the margins lie above each threshold."""
    return (len(margins) - torch.searchsorted(margins.sort().values, thresholds, right=True)).tolist()


def judged(old: Tensor, new: Tensor, labels: Tensor, rule: ClassMapping) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples the old model gets right, its predicted classes as the new one numbers them, and the labels.

    All are `n` and on the CPU. Of the old model also predicted classes will do, `n` integers.

    Raises:
        ConfigurationError: they do not fit together.
    """
    classes = Multiclass().label(labels).cpu()
    check_whole_labels(labels)
    labels = classes
    for argument, given in (("old", old), ("new", new)):
        if not isinstance(given, Tensor) or given.shape[:1] != labels.shape or not len(labels):
            found = f"is {list(given.shape)}" if isinstance(given, Tensor) else f"is a {type(given).__name__}"
            raise ConfigurationError(
                f"`{argument}` {found}, `labels` has {len(labels)} samples.",
                "give tensors of the same samples, at least one.",
            )
    old, new = old.cpu(), new.cpu()
    if old.ndim == 1 and not old.is_floating_point():
        check_logits("new", new)
        predicted = _mapped(old.long(), rule.classes)
        if not 0 <= int(predicted.min()) <= int(predicted.max()) < new.shape[1]:
            raise ConfigurationError(
                f"`old` predicts classes {int(predicted.min())}...{int(predicted.max())}, `new` has logits of "
                f"{new.shape[1]}.",
                "give classes counted from 0, and `classes` where the new model numbers them differently.",
            )
        return predicted == labels, predicted, labels
    rule.check(old, new)
    old = rule.mapped(old, new.shape[1])
    return predicts(old, labels), old.argmax(1), labels


def _mapped(predictions: Tensor, classes: Tensor | None) -> Tensor:
    if classes is None:
        return predictions
    if not 0 <= int(predictions.min()) <= int(predictions.max()) < len(classes):
        raise ConfigurationError(
            f"`classes` has {len(classes)}, `old` holds {int(predictions.min())}...{int(predictions.max())}.",
            "give an index in the new output for every class of the old model, counted from 0.",
        )
    return classes[predictions]


def _evenly(n: int, most: int) -> list[int]:
    """At most so many of `n` indices, the first and the last among them, at about equal distances."""
    if n <= most:
        return list(range(n))
    return torch.linspace(0, n - 1, most).round().long().tolist()
