"""The old and the new model in the same answer: the weighted mean of their probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nrl._utils.deserialize import Record
from lightning_nrl._utils.precision import at_least_float32
from lightning_nrl.errors import check_real
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.gate import Gate
from lightning_nrl.report._formatting import percent
from lightning_nrl.report.page import Page, Shown, curve_page
from lightning_nrl.serving.margin_switch import Classes, ClassMapping, TwoModels, predicts
from lightning_nrl.serving.threshold import gate_of, judged

__all__ = ["WeightChoice", "WeightPoint", "WeightedEnsemble", "choose_weight"]

N_WEIGHTS = 21
"""Weights that are tried, evenly from 0 to 1."""


class WeightedEnsemble(TwoModels):
    """Two models as one: the logarithm of `(1 - weight) softmax(new) + weight softmax(old)`.

    Where both models are unsure they hold each other back, so an ensemble of the old and the new model breaks fewer
    samples than the new one alone, often without losing accuracy. `weight=0` answers as the new model does, `weight=1`
    as the old one. What else `MarginSwitch` says of running, training and exporting two models holds here too.

    Args:
        old: the model in use; its forward returns logits `n x C_old`.
        new: its update, called with the same arguments; logits `n x C`.
        weight: of the old model, in [0, 1]; `choose_weight` finds one. Later a buffer, float32.
        classes: as for `MarginSwitch`. The old model gives classes that it does not know the probability 0.

    Raises:
        ConfigurationError: the weight is not in [0, 1]; or see `MarginSwitch`.

    Example:
        >>> old, new = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> _ = old.load_state_dict({"weight": torch.eye(2)})
        >>> _ = new.load_state_dict({"weight": torch.tensor([[0.0, 1.0], [1.0, 0.0]])})
        >>> ensemble = WeightedEnsemble(old, new, weight=0.25)
        >>> with torch.no_grad():
        ...     ensemble(torch.tensor([[3.0, 0.0]])).exp()
        tensor([[0.2737, 0.7263]])
    """

    weight: Tensor

    def __init__(self, old: nn.Module, new: nn.Module, weight: float, classes: Classes | None = None) -> None:
        super().__init__(classes)
        hint = "give a number from 0 to 1, or what `choose_weight(...).weight` says."
        check_real("weight", weight, "share of the old model", hint, least=0, most=1)
        self.register_buffer("weight", torch.tensor(float(weight), dtype=torch.float32))
        self.hold(old, new)

    def choose(self, old: Tensor, new: Tensor) -> Tensor:
        """The logarithm of the mean probabilities, `n x C` in float32 or better, from the logits of both."""
        return _blended(*self.side_by_side(old, new), self.weight)

    def extra_repr(self) -> str:
        """The weight, for `print`."""
        return f"weight={float(self.weight):g}"


@dataclass(frozen=True)
class WeightPoint:
    """What becomes of the samples, from the old model to an ensemble with one weight of the old model, in [0, 1]."""

    weight: float
    counts: FlipCounts


@dataclass(frozen=True)
class WeightChoice(Record, Shown):
    """A weight, and what others would do. `rich.print(choice)` shows it as a table.

    Attributes:
        chosen: the most accurate weight within the limit.
        curve: all that were tried, from 0, the new model alone, to 1, the old one.
        limit: as `Gate.parse` reads it; empty without one.
    """

    chosen: WeightPoint
    curve: tuple[WeightPoint, ...]
    limit: str

    @property
    def weight(self) -> float:
        """What `WeightedEnsemble` is to be given."""
        return self.chosen.weight

    def to_table(self) -> Page:
        """The curve as a page, for rich's `print`."""
        points = []
        for point in self.curve:
            c = point.counts
            cells = percent(c.accuracy_after), f"{c.repaired:,}", f"{c.broken:,}"
            points.append((f"weight {point.weight:.2f}", cells, point == self.chosen))
        text = f"The most accurate{f' within {self.limit!r}' if self.limit else ''}: {self.weight:.2f}."
        return curve_page("Weight", text, ("accuracy", "repaired", "broken"), points)


@torch.no_grad()
def choose_weight(
    old: Tensor, new: Tensor, labels: Tensor, limit: Gate | str | float | None = None, *, classes: Classes | None = None
) -> WeightChoice:
    """Finds the weight of the old model with which an ensemble is most accurate; of equals the largest one.

    The largest breaks the fewest samples. Use data on which neither model was trained or repaired.

    Args:
        old: the old model's logits `n x C_old`.
        new: the new model's logits `n x C`.
        labels: the true classes, `n` integers, as the new model numbers them.
        limit: how many samples may break, as for `choose_threshold`; None: as many as come of it.
        classes: as for `choose_threshold`.

    Raises:
        ConfigurationError: shapes do not fit together, there is no sample, or the limit or `classes` cannot be read.

    Example:
        The new model repairs the first sample and breaks the second; together they get both right.

        >>> old = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
        >>> new = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> choice = choose_weight(old, new, torch.tensor([0, 0]))
        >>> choice.weight, choice.chosen.counts.repaired, choice.chosen.counts.broken
        (0.65, 1, 0)
    """
    gate = None if limit is None else gate_of(limit)
    rule = ClassMapping(classes)
    was_right, _, labels = judged(old, new, labels, rule)
    old, new = rule.side_by_side(old.cpu(), new.cpu())
    curve = []
    for weight in torch.linspace(0, 1, N_WEIGHTS):
        # At the ends one model answers, also where the other returns NaN.
        served = new if weight == 0 else old if weight == 1 else _blended(old, new, weight)
        right = predicts(served, labels)
        curve.append(WeightPoint(round(float(weight), 4), FlipCounts.of(was_right, right)))
    within = [point for point in curve if gate is None or gate.lets_through(point.counts)]
    chosen = max(within, key=lambda point: (point.counts.right, point.weight))
    return WeightChoice(chosen, tuple(curve), "" if gate is None else str(gate))


def _blended(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(new.device)
    first, second = (at_least_float32(logits).log_softmax(1) for logits in (new, old))
    return torch.logaddexp(first + torch.log1p(-weight), second + weight.log())
