"""Weights between a new model and the one that it replaces: fewer regressions for one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.state import State, between, holding, snapshot, write
from lightning_nrl.data.adapters import unpack
from lightning_nrl.data.batch import Adapter, Source
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.report._formatting import percent
from lightning_nrl.report.page import Heading, Page, Row, Shown, Table, Text
from lightning_nrl.updates.batch_norm import batch_norms, estimate_statistics

DEFAULT_SHARES = tuple(step / 20 for step in range(11))
"""Shares of the old weights that are tried."""
ACCURACY_TOLERANCE = 0.005
"""The accuracy that fewer regressions may cost: half a point."""

Data = Source | Iterable[Any]
"""A source, or batches as a data loader gives them, which can be read again and again."""


@dataclass(frozen=True)
class SharePoint:
    """What becomes of the samples, from the old model to weights with one share of the old ones, in [0, 1]."""

    share: float
    counts: FlipCounts

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.counts.right / self.counts.n

    @property
    def negative_flip_rate(self) -> float:
        """Broken samples among all, in [0, 1]."""
        return self.counts.broken / self.counts.n


@dataclass(frozen=True)
class ShareChoice(Shown):
    """A share of the old weights, and what others would do. `rich.print(choice)` shows it as a table.

    Attributes:
        chosen: the largest share whose accuracy is within the tolerance of the best of the curve, and that breaks no
            more than share 0.
        curve: all that were tried, from 0, the new model as it is.
        tolerance: of the accuracy, in [0, 1]; None: the largest share was wanted, whatever it costs.
        state: the weights and buffers of the chosen share; empty for share 0, which changes nothing.
    """

    chosen: SharePoint
    curve: tuple[SharePoint, ...]
    tolerance: float | None
    state: State = field(default_factory=dict, repr=False, compare=False)

    @property
    def share(self) -> float:
        """Of the old weights."""
        return self.chosen.share

    def write(self, model: nn.Module) -> bool:
        """Copies the chosen weights into a model of the same architecture, or none; says whether it was changed.

        Raises:
            ConfigurationError: a tensor is not in the model, or has another shape.
        """
        write(model, self.state)
        return bool(self.state)

    def to_table(self) -> Page:
        """The curve as a page, for rich's `print`."""
        rows = []
        for point in self.curve:
            c, taken = point.counts, point == self.chosen
            cells = percent(point.accuracy), f"{c.repaired:,}", f"{c.broken:,}", percent(point.negative_flip_rate)
            rows.append(Row(f"share {point.share:.2f}" + ", taken" * taken, cells, "gain" if taken else ""))
        rule = "As given"
        if self.tolerance is not None:
            near = f"within {100 * self.tolerance:g} points of the best accuracy"
            rule = f"The largest that breaks no more than share 0, {near}"
        columns = tuple((name, "") for name in ("accuracy", "repaired", "broken", "negative flip rate"))
        text = Text(f"{rule}: {self.share:.2f}.")
        return Page((Heading("Share of the old weights", 1), text, Table(columns, tuple(rows))))


@torch.no_grad()
def interpolate(
    old: nn.Module | State | str | Path,
    new: nn.Module | Evaluator,
    share: float,
    training: Data | None = None,
    **estimating: Any,
) -> dict[str, Tensor]:
    """The weights `(1 - share) new + share old`, for `load_state_dict`, with batch norm statistics that fit them.

    Wortsman et al. 2022, Robust fine-tuning of zero-shot models (WiSE-FT); against regressions Schumann et al. 2024,
    Backward compatibility during data updates by weight interpolation (BCWI). It works where the new model was trained
    on from the old weights: two trainings from scratch end in places with nothing good between them.

    Args:
        old: the replaced model, its state dict, or the path of a checkpoint.
        new: its update, on its device; left as found. An `Evaluator` says in which precision it runs.
        share: of the old weights, in [0, 1]. At the ends the state is, bit for bit, that of one of the models.
        training: data for the statistics of batch norm layers, read once; not needed without such layers.
        **estimating: arguments of `lightning_nrl.updates.batch_norm.estimate_statistics`.

    Raises:
        ConfigurationError: the share is not in [0, 1], the architectures differ, or training data are needed.

    Example:
        >>> old, new = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = old.load_state_dict({"weight": torch.tensor([[1.0, 0.0]])})
        >>> _ = new.load_state_dict({"weight": torch.tensor([[0.0, 2.0]])})
        >>> interpolate(old, new, 0.25)
        {'weight': tensor([[0.2500, 1.5000]])}
    """
    check_share(share)
    evaluator = Evaluator.of(new)
    before = fitting("old", read_state("old", old), evaluator.model)
    mixed = between(before, snapshot(evaluator.model), 1 - share)
    return mixed | (_statistics(evaluator, mixed, training, **estimating) if 0 < share < 1 else {})


@torch.no_grad()
def choose_share(
    old: nn.Module | State | str | Path,
    new: nn.Module | Evaluator,
    data: Data,
    training: Data | None = None,
    *,
    tolerance: float | None = ACCURACY_TOLERANCE,
    shares: Sequence[float] = DEFAULT_SHARES,
    batches: int | None = None,
    seed: int = 0,
    adapter: Adapter = unpack,
) -> ShareChoice:
    """Finds the largest share of the old weights that costs next to no accuracy on data set aside.

    The larger the share, the fewer samples break, as a rule; one that breaks more than share 0 is taken only where
    nothing that breaks as few is within the tolerance. Each share costs a pass over `data`, and one over `training`
    where the model has batch norm layers.

    Args:
        old: as for `interpolate`.
        new: its update, on its device; left as found. An `Evaluator` says what else there is to say of it: the task,
            mixed precision, the ranks that share the data. Each rank ends with the same choice.
        data: to count on, such as validation data: none that the new model was trained on, since there the new model as
            it is is the most accurate.
        training: as for `interpolate`.
        tolerance: how far below the best accuracy of the curve the chosen one may lie, in [0, 1]; None: takes the
            largest share, whatever it costs.
        shares: that are tried, in [0, 1], beside 0.
        batches: how many of `training` the statistics are estimated from; None: all.
        seed: of their order.
        adapter: takes raw batches apart.

    Raises:
        ConfigurationError: an argument cannot be used, the architectures differ, or there is no sample.
        EvaluationError: the data could not be read on another rank.

    Example:
        Classes are told apart by a threshold. The old one, 3, is right on all but 2.5; the new one, 0, on all but 1.
        Half way, at 1.5, both are right.

        >>> def threshold(at):
        ...     model = nn.Linear(2, 2, bias=False)
        ...     _ = model.load_state_dict({"weight": torch.tensor([[0.0, at], [1.0, 0.0]])})
        ...     return model
        >>> data = [(torch.tensor([[-1.0, 1.0], [1.0, 1.0], [2.5, 1.0], [4.0, 1.0]]), torch.tensor([0, 0, 1, 1]))]
        >>> choice = choose_share(threshold(3.0), threshold(0.0), data)
        >>> choice.share, choice.chosen.accuracy, choice.curve[0].accuracy
        (0.5, 1.0, 0.75)
    """
    if tolerance is not None:
        check_share(tolerance, "tolerance")
    for share in shares:
        check_share(share, "shares")
    evaluator = Evaluator.of(new)
    collective = evaluator.collective
    before, after = fitting("old", read_state("old", old), evaluator.model), snapshot(evaluator.model)
    was_right, label = _judged(evaluator, before, data, adapter)
    curve, statistics = [], {}
    for share in sorted({0.0, *map(float, shares)}):
        mixed = between(before, after, 1 - share)
        if 0 < share < 1:
            # Kept, being small, so that the choice costs no further pass.
            statistics[share] = _statistics(evaluator, mixed, training, batches=batches, seed=seed, adapter=adapter)
            mixed |= statistics[share]
        right, again = _judged(evaluator, mixed, data, adapter)
        if collective.any(not torch.equal(label, again)):
            raise ConfigurationError(
                "`data`: a second pass gave other samples than the first.",
                "give a source, a list of batches or a DataLoader that does not shuffle.",
            )
        counts = FlipCounts.of(was_right, right)
        total = collective.sum(torch.tensor([counts.kept, counts.broken, counts.repaired, counts.failing]))
        if not int(total.sum()):
            raise ConfigurationError("`data`: there is no sample.", "give data to choose the share on.")
        curve.append(SharePoint(share, FlipCounts(*total.tolist())))
    # In counts: the difference of two shares that are each rounded could be a hair too large.
    most, alone = max(point.counts.right for point in curve), curve[0].counts
    lost = alone.n if tolerance is None else tolerance * alone.n + 1e-6
    within = [point for point in curve if most - point.counts.right <= lost]
    if tolerance is not None:
        # More share for no fewer regressions is bought for nothing, as between two trainings from scratch.
        within = [point for point in within if point.counts.broken <= alone.broken] or within
    chosen = max(within, key=lambda point: point.share)
    state = between(before, after, 1 - chosen.share) | statistics.get(chosen.share, {}) if chosen.share else {}
    return ShareChoice(chosen, tuple(curve), tolerance, state)


def check_share(share: object, argument: str = "share") -> None:
    """A `ConfigurationError` for what is no number from 0 to 1."""
    check_real(argument, share, "share", "write a number from 0 to 1.", least=0, most=1)


def alignment(old: State, new: nn.Module) -> float:
    """The cosine of the angle between the weights of two models, a state and a module, in [-1, 1].

    Of parameters with two dimensions or more: those with one, such as scales of norms, are alike in all models. It is 1
    for a copy, and about 0 for two models that began at different random weights.
    """
    sums = []
    for name, weight in new.named_parameters():
        if weight.ndim > 1 and weight.is_floating_point():
            a, b = old[name].detach().float(), weight.detach().float()
            sums.append(torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]))
    if not sums:
        return 1.0
    product, first, second = torch.stack(sums).sum(0).tolist()
    size = (first * second) ** 0.5
    return product / size if size else 1.0


def _statistics(evaluator: Evaluator, state: State, training: Data | None, **estimating: Any) -> dict[str, Tensor]:
    """Batch norm statistics that fit weights between two models; none where there are no such layers."""
    layers = batch_norms(evaluator.model)
    if not layers:
        return {}
    if training is None:
        raise ConfigurationError(
            f"`training`: there are none, and the batch norm layer {next(iter(layers))!r} needs new statistics.",
            "give the data that the new model was trained on, best without augmentation.",
        )
    with holding(evaluator.model, state):
        return estimate_statistics(evaluator, training, **estimating)


def _judged(evaluator: Evaluator, state: State, data: Data, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Which of this rank's samples these weights get right, `n` bool, and their classes, `n`; -1 without classes."""

    def run() -> tuple[Tensor, Tensor]:
        rights, labels = [], []
        for output, target in evaluator.outputs(data, adapter):
            right, label = evaluator.task.right(output, target), evaluator.task.label(target)
            rights.append(right)
            labels.append(torch.full_like(right, -1, dtype=torch.int64) if label is None else label)
        if not rights:
            return torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
        return torch.cat(rights).cpu(), torch.cat(labels).cpu()

    with preserve(evaluator.model), holding(evaluator.model, state):
        return evaluator.collective.all_or_none(run, "`data` could not be read on another rank.")
