"""Interpolation between an old and a new model, with matching batch norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_nrl._utils.checkpoint import read_fitting
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.formatting import percent
from lightning_nrl._utils.preserve import preserve_state, shuffled
from lightning_nrl._utils.state import State, between, device_of, snapshot, temporary_weights, write
from lightning_nrl.data.adapters import bind_adapter, unpack
from lightning_nrl.data.batch import Adapter, Source, run_model, unpacked
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.rates import RATES
from lightning_nrl.evaluation.sample_results import FlipCounts, flip_masks
from lightning_nrl.report.page import Heading, Page, Renderable, Row, Table, Text

DEFAULT_STRENGTHS = tuple(1 - step / 20 for step in range(11))
"""From the new model, 1, to 1/2, which Wortsman et al. recommend."""
ACCURACY_TOLERANCE = 0.005  # accuracy to give up for fewer negative flips: half a percentage point
ROUNDING_SLACK = 1e-6  # samples; a tolerance times a number of samples may be rounded down

OldWeights: TypeAlias = nn.Module | State | str | Path
"""A model, its state dict, or the path of a checkpoint."""
Data: TypeAlias = Source | Iterable[Any]
"""A source, or batches that can be read more than once, such as a data loader."""


@dataclass(frozen=True)
class InterpolationPoint:
    """Flips from the old model to the model interpolated with one strength, in [0, 1]."""

    strength: float
    counts: FlipCounts

    @property
    def accuracy(self) -> float:
        return self.counts.accuracy_after

    @property
    def negative_flip_rate(self) -> float:
        return RATES["negative_flip_rate"].of(self.counts)


@dataclass(frozen=True)
class InterpolationChoice(Renderable):
    """The chosen strength and the results of all strengths; `rich.print(choice)` shows a table.

    Attributes:
        chosen: result of the chosen strength. Of the strengths whose accuracy is at most
            `tolerance` below the best in `curve`, it is the smallest that breaks no more samples
            than strength 1, or the smallest if all break more.
        curve: the results of all strengths in descending order, beginning with 1, the unchanged
            new model.
        tolerance: largest accepted loss of accuracy, in [0, 1]. If it is None, `chosen` is the
            smallest strength of all.
        state: weights and buffers of the chosen strength; empty for strength 1.
    """

    chosen: InterpolationPoint
    curve: tuple[InterpolationPoint, ...]
    tolerance: float | None
    state: State = field(default_factory=dict, repr=False, compare=False)

    @property
    def strength(self) -> float:
        return self.chosen.strength

    def write(self, model: nn.Module) -> bool:
        """Copies `state` into a model of the same architecture; returns False if it is empty."""
        write(model, self.state)
        return bool(self.state)

    def to_table(self) -> Page:
        rule = "As given"
        if self.tolerance is not None:
            rule = (
                "The smallest that breaks no more than strength 1, "
                f"within {100 * self.tolerance:g} points of the best accuracy"
            )
        columns = (("accuracy", ""), ("repaired", ""), ("broken", ""), ("negative flip rate", ""))
        heading = Heading("Strength of the new weights", 1)
        table = Table(columns, tuple(map(self._row, self.curve)))
        return Page((heading, Text(f"{rule}: {self.strength:.2f}."), table))

    def _row(self, point: InterpolationPoint) -> Row:
        cells = (
            percent(point.accuracy),
            f"{point.counts.repaired:,}",
            f"{point.counts.broken:,}",
            percent(point.negative_flip_rate),
        )
        label = f"strength {point.strength:.2f}"
        if point == self.chosen:
            return Row(f"{label}, taken", cells, "good")
        return Row(label, cells)


@torch.no_grad()
def interpolate(
    old: OldWeights,
    new: nn.Module | Evaluator,
    strength: float,
    training: Data | None = None,
    *,
    batches: int | None = None,
    seed: int = 0,
    adapter: Adapter = unpack,
) -> dict[str, Tensor]:
    """Returns the weights `(1 - strength) old + strength new`, for `load_state_dict`.

    The method is WiSE-FT (Wortsman et al. 2022, Robust fine-tuning of zero-shot models). Schumann
    et al. 2024 (Backward compatibility during data updates by weight interpolation) use it against
    negative flips. The training of the new model must have started from the old weights; otherwise
    the accuracy of interpolated weights is very low.

    Args:
        old: the old model, its state dict, or the path of a checkpoint.
        new: the new model, on its device; it does not change. An `Evaluator` sets the precision.
        strength: weight of the new model, in [0, 1]. 1 gives bit for bit the new model, 0 gives
            the old model.
        training: data for the batch norm statistics, read once. Needed if the model has batch norm
            and 0 < strength < 1.
        batches: number of batches of `training` to read; None: all batches.
        seed: seed of the order of these batches.
        adapter: converts a raw batch into `(args, kwargs, target)`.

    Example:
        >>> old, new = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = old.load_state_dict({"weight": torch.tensor([[1.0, 0.0]])})
        >>> _ = new.load_state_dict({"weight": torch.tensor([[0.0, 2.0]])})
        >>> interpolate(old, new, 0.75)
        {'weight': tensor([[0.2500, 1.5000]])}
    """
    check_part("strength", strength, "strength")
    evaluator = Evaluator.of(new)
    path = _Path(old, evaluator, training, batches=batches, seed=seed, adapter=adapter)
    return path.weights(strength)


@torch.no_grad()
def choose_interpolation(
    old: OldWeights,
    new: nn.Module | Evaluator,
    data: Data,
    training: Data | None = None,
    *,
    tolerance: float | None = ACCURACY_TOLERANCE,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    batches: int | None = None,
    seed: int = 0,
    adapter: Adapter = unpack,
) -> InterpolationChoice:
    """Finds the smallest strength that costs almost no accuracy on validation data.

    A smaller strength usually breaks fewer samples. Strengths that break more samples than
    strength 1, the new model itself, are passed over, unless all strengths within the tolerance
    break more. Each strength needs a pass over `data`, which must return the same samples in the
    same order each time. With batch norm, each strength also needs a pass over `training`.

    Args:
        old: the same as for `interpolate`.
        new: the same as for `interpolate`. An `Evaluator` also sets the task and the ranks that
            share the data.
        data: data that the new model was not trained on. On its training data, strength 1 is
            always the most accurate.
        training: the same as for `interpolate`.
        tolerance: how far the accuracy may be below the best accuracy of all strengths, in [0, 1].
            With None the smallest strength is chosen, whatever its accuracy and however many
            samples it breaks.
        strengths: strengths to try besides 1, in [0, 1].
        batches: the same as for `interpolate`.
        seed: the same as for `interpolate`.
        adapter: the same as for `interpolate`.
    """
    if tolerance is not None:
        check_part("tolerance", tolerance, "share")
    for strength in strengths:
        check_part("strengths", strength, "strength")
    evaluator = Evaluator.of(new)
    path = _Path(old, evaluator, training, batches=batches, seed=seed, adapter=adapter)
    old_answers = _answers(evaluator, path.start, data, adapter)
    curve = []
    for strength in sorted({1.0, *map(float, strengths)}, reverse=True):
        answers = _answers(evaluator, path.weights(strength), data, adapter)
        flips = _count_flips(old_answers, answers, evaluator.collective)
        curve.append(InterpolationPoint(strength, flips))
    chosen = _chosen_point(curve, tolerance)
    state: State = path.weights(chosen.strength) if chosen.strength < 1 else {}
    return InterpolationChoice(chosen, tuple(curve), tolerance, state)


class _Path:
    """Weights between the old and the new model, with matching batch norm statistics.

    `reading` are arguments of `estimate_statistics`.
    """

    def __init__(
        self, old: OldWeights, new: Evaluator, training: Data | None, **reading: Any
    ) -> None:
        self.model = new.model
        self.start: State = read_fitting("old", old, self.model)
        self.end = snapshot(self.model)
        self.statistics = partial(estimate_statistics, new, training, **reading)
        # Kept in memory, so that the chosen strength needs no second pass over the training data.
        self.estimated: dict[float, dict[str, Tensor]] = {}

    def weights(self, strength: float) -> dict[str, Tensor]:
        weights = between(self.start, self.end, strength)
        if strength in (0, 1):
            return weights
        if strength not in self.estimated:
            with temporary_weights(self.model, weights):
                self.estimated[strength] = self.statistics()
        return weights | self.estimated[strength]


def _chosen_point(
    curve: Sequence[InterpolationPoint], tolerance: float | None
) -> InterpolationPoint:
    if tolerance is None:
        return curve[-1]
    # Counts are compared, since the difference of two rounded accuracies could be slightly above
    # the tolerance.
    new_model = curve[0].counts
    best = max(point.counts.right for point in curve)
    least = best - tolerance * new_model.n - ROUNDING_SLACK
    accurate = [point for point in curve if point.counts.right >= least]
    # A smaller strength can break more if the new model was not trained from the old weights.
    safe = [point for point in accurate if point.counts.broken <= new_model.broken]
    return (safe or accurate)[-1]


def check_part(argument: str, value: object, kind: str) -> None:
    """Raises a `ConfigurationError`, "is no `kind`", unless a value is a number from 0 to 1."""
    check_real(argument, value, kind, "write a number from 0 to 1.", least=0, most=1)


def alignment(old: State, new: nn.Module) -> float:
    """Returns the cosine between the weights of two models.

    It is 1 for a copy, and about 0 if the models were trained independently. Parameters with one
    dimension are left out, because some of them, such as norm scales, are alike in all models.
    """
    old_parts, new_parts = [], []
    for name, parameter in new.named_parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            old_parts.append(old[name].detach().float().flatten())
            new_parts.append(parameter.detach().float().flatten())
    if not new_parts:
        return 1.0
    return float(torch.cosine_similarity(torch.cat(old_parts), torch.cat(new_parts), dim=0))


class _Answers(NamedTuple):
    """Answers of one model on this rank's `n` samples."""

    right: Tensor  # n bool
    label: Tensor  # n int64, true classes; -1 if unknown


def _answers(evaluator: Evaluator, weights: State, data: Data, adapter: Adapter) -> _Answers:
    task = evaluator.task

    def read() -> _Answers:
        rights = [torch.zeros(0, dtype=torch.bool)]
        labels = [torch.zeros(0, dtype=torch.int64)]
        for output, target in evaluator.outputs(data, adapter):
            right, label = task.right(output, target), task.label(target)
            if label is None:
                label = torch.full_like(right, -1, dtype=torch.int64)
            rights.append(right.cpu())
            labels.append(label.cpu())
        return _Answers(torch.cat(rights), torch.cat(labels))

    with preserve_state(evaluator.model), temporary_weights(evaluator.model, weights):
        return evaluator.collective.all_or_none(read, "`data` could not be read on another rank.")


def _count_flips(old: _Answers, new: _Answers, collective: Collective) -> FlipCounts:
    if collective.any(not torch.equal(old.label, new.label)):
        raise ConfigurationError(
            "`data`: a second pass returned other samples.",
            "give a source, a list of batches or a DataLoader that does not shuffle.",
        )
    counts = collective.sum(torch.stack(flip_masks(old.right, new.right)).sum(1))
    if not int(counts.sum()):
        raise ConfigurationError("`data` is empty.", "give data to choose the strength on.")
    return FlipCounts(*counts.tolist())


DEFAULT_BATCH_SIZE = 256  # for a source without `batch_size`
MIN_BATCH_SIZE = 4
"""With less, a rank could get a batch of one sample, for which batch norm raises an error."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Returns by name the batch norm layers whose running statistics the training updates.

    Frozen layers are left out: layers that do not track statistics (this is how Lightning freezes
    them), and layers in evaluation mode inside a model in training mode.
    """
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats:
            is_frozen = model.training and not layer.training
            if layer.running_mean is not None and not is_frozen:
                layers[name] = layer
    return layers


@torch.no_grad()
def estimate_statistics(
    model: nn.Module | Evaluator,
    data: Data | None,
    *,
    batches: int | None = None,
    seed: int = 0,
    adapter: Adapter = unpack,
) -> dict[str, Tensor]:
    """Averages mean and variance of each batch norm layer's inputs in one pass over the data.

    Izmailov et al. 2018 (Averaging weights leads to wider optima and better generalization) do the
    same after they average weights. Only batch norm layers are in training mode, so dropout is off.
    The model does not change.

    Args:
        model: the model, on its device, with the weights that the statistics must match. An
            `Evaluator` sets the precision and the ranks that share the data. In the average, each
            batch of each rank counts the same.
        data: a source, read in random order because batches of sorted data have unlike means; or
            batches from a data loader, read in their order, where no batch should be much smaller
            than the others. Needed if the model has batch norm.
        batches: number of batches to read; None: all batches.
        seed: seed of the random order.
        adapter: converts a raw batch into `(args, kwargs, target)`.

    Returns:
        `running_mean`, `running_var` and `num_batches_tracked` of each layer that was called, by
        state dict key.
    """
    evaluator = Evaluator.of(model)
    layers, collective = batch_norms(evaluator.model), evaluator.collective
    if not layers:
        return {}
    if data is None:
        raise ConfigurationError(
            f"`training` is missing, but the batch norm layer {next(iter(layers))!r} needs new "
            "statistics.",
            "give the data that the new model was trained on, best without augmentation.",
        )
    if isinstance(data, Source):
        data = _random_batches(data, batches, seed, collective)
    else:
        data = islice(data, batches)

    def run() -> int:
        n_batches = 0
        bound = bind_adapter(adapter, evaluator.model)
        for args, kwargs, _ in unpacked(data, bound, device_of(evaluator.model)):
            with evaluator.context():
                run_model(evaluator.model, args, kwargs)
            n_batches += 1
        return n_batches

    unread = "the data for batch norm statistics could not be read on another rank."
    with preserve_state(evaluator.model), _reset_to_average(layers):
        n_batches = collective.all_or_none(run, unread)
        if not int(collective.sum(torch.tensor(n_batches))):
            raise ConfigurationError(
                "`data` has no batch for batch norm statistics.", "give data with samples."
            )
        return _mean_statistics(layers, collective)


def _random_batches(
    source: Source, batches: int | None, seed: int, collective: Collective
) -> Iterator[Any]:
    """Reads this rank's samples as shuffled batches of similar size, equally many on all ranks."""
    positions = source.positions
    batch_size: int = getattr(source, "batch_size", DEFAULT_BATCH_SIZE)
    per_rank = torch.cat(collective.gather(torch.tensor([len(positions)])))
    n_batches = -(-int(per_rank.max()) // max(batch_size, MIN_BATCH_SIZE))  # rounded up
    generator = torch.Generator().manual_seed(seed)
    order = shuffled(positions, generator)
    parts = [part for part in order.tensor_split(max(n_batches, 1)) if len(part)]
    return iter(source.draw(parts[:batches]))


@contextmanager
def _reset_to_average(layers: dict[str, _BatchNorm]) -> Iterator[None]:
    """Resets the statistics, and makes the layers average all batches equally.

    The caller restores the statistics with `preserve_state`.
    """
    momenta = [layer.momentum for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None
            layer.training = True
        yield
    finally:
        for layer, momentum in zip(layers.values(), momenta, strict=True):
            layer.momentum = momentum


def _mean_statistics(layers: dict[str, _BatchNorm], collective: Collective) -> dict[str, Tensor]:
    statistics: dict[str, Tensor] = {}
    for name, layer in layers.items():
        mean, var, n_batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
        assert mean is not None and var is not None and n_batches is not None  # noqa: PT018
        moments, total = torch.stack([mean, var]), collective.sum(n_batches)
        if collective.world_size > 1:
            weighted = collective.sum(at_least_float32(moments) * n_batches)
            moments = (weighted / total.clamp_min(1)).to(moments.dtype)
        if int(total):
            prefix = f"{name}." if name else ""
            statistics[f"{prefix}running_mean"] = moments[0].clone()
            statistics[f"{prefix}running_var"] = moments[1].clone()
            statistics[f"{prefix}num_batches_tracked"] = total.clone()
    return statistics
