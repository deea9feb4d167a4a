"""Interpolation between the weights of an old and a new model, with matching batch norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.device import at_least_float32
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.formatting import percent
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.state import State, between, device_of, snapshot, temporary_weights, write
from lightning_nrl.data.adapters import bind_adapter, unpack
from lightning_nrl.data.batch import Adapter, Source, run_model, unpacked
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.report.page import Heading, Page, Renderable, Row, Table, Text

DEFAULT_SHARES = tuple(step / 20 for step in range(11))
ACCURACY_TOLERANCE = 0.005  # accuracy to give up for fewer negative flips: half a percentage point

Data = Source | Iterable[Any]
"""A source, or batches that can be read more than once, such as a data loader."""


@dataclass(frozen=True)
class SharePoint:
    """Flips from the old model to the interpolated model for one share of the old weights, in [0,
    1].
    """

    share: float
    counts: FlipCounts

    @property
    def accuracy(self) -> float:
        return self.counts.accuracy_after

    @property
    def negative_flip_rate(self) -> float:
        return self.counts.broken / self.counts.n


@dataclass(frozen=True)
class ShareChoice(Renderable):
    """The chosen share of the old weights, and the results for all shares. `rich.print(choice)`
    shows
    a table.

    Attributes:
        chosen: result for the chosen share. Of the shares whose accuracy is at most `tolerance`
            below the best in `curve`, it is the largest that breaks no more samples than share 0,
            or the largest if all break more.
        curve: the results for all shares in ascending order, beginning with 0, the unchanged new
            model.
        tolerance: largest accepted loss of accuracy, in [0, 1]. If it is None, `chosen` is the
            largest share of all.
        state: weights and buffers for the chosen share; empty for share 0.
    """

    chosen: SharePoint
    curve: tuple[SharePoint, ...]
    tolerance: float | None
    state: State = field(default_factory=dict, repr=False, compare=False)

    @property
    def share(self) -> float:
        return self.chosen.share

    def write(self, model: nn.Module) -> bool:
        """Copies `state` into a model of the same architecture. Returns False if `state` is empty."""
        write(model, self.state)
        return bool(self.state)

    def to_table(self) -> Page:
        rows = []
        for point in self.curve:
            c, taken = point.counts, point == self.chosen
            cells = (
                percent(point.accuracy),
                f"{c.repaired:,}",
                f"{c.broken:,}",
                percent(point.negative_flip_rate),
            )
            rows.append(
                Row(f"share {point.share:.2f}" + ", taken" * taken, cells, "gain" if taken else "")
            )
        near = f"within {100 * (self.tolerance or 0):g} points of the best accuracy"
        rule = (
            "As given"
            if self.tolerance is None
            else f"The largest that breaks no more than share 0, {near}"
        )
        columns = tuple(
            (name, "") for name in ("accuracy", "repaired", "broken", "negative flip rate")
        )
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
    """Returns the weights `(1 - share) new + share old` for `load_state_dict`, with matching batch
    norm statistics.

    The method is WiSE-FT (Wortsman et al. 2022, Robust fine-tuning of zero-shot models). Schumann
    et al. 2024 (Backward compatibility during data updates by weight interpolation) use it against
    negative flips. The training of the new model must have started from the old weights; otherwise
    the accuracy of interpolated weights is very low.

    Args:
        old: the old model, its state dict, or the path of a checkpoint.
        new: the new model, on its device; it does not change. An `Evaluator` sets the precision.
        share: share of the old weights, in [0, 1]. 0 gives bit for bit the new model, 1 gives the
            old model.
        training: data for the batch norm statistics, read once. Needed if the model has batch norm
            and 0 < share < 1.
        **estimating: arguments of `lightning_nrl.updates.interpolation.estimate_statistics`.

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
    """Finds the largest share of the old weights that costs almost no accuracy on validation data.

    A larger share usually breaks fewer samples. Shares that break more samples than share 0, the
    new model itself, are passed over, unless all shares within the tolerance break more. Each share
    needs a pass over `data`, which must return the same samples in the same order each time. With
    batch norm, each share also needs a pass over `training`.

    Args:
        old: the same as for `interpolate`.
        new: the same as for `interpolate`. An `Evaluator` also sets the task and the ranks that
            share the data.
        data: data that the new model was not trained on. On its training data, share 0 is always
            the most accurate.
        training: the same as for `interpolate`.
        tolerance: how far the accuracy may be below the best accuracy of all shares, in [0, 1].
            With None the largest share is chosen, whatever its accuracy and however many samples it
            breaks.
        shares: shares to try besides 0, in [0, 1].
        batches: number of batches of `training` for the batch norm statistics; None: all batches.
        seed: seed of the order of these batches.
        adapter: converts a raw batch into `(args, kwargs, target)`.
    """
    if tolerance is not None:
        check_share(tolerance, "tolerance")
    for share in shares:
        check_share(share, "shares")
    evaluator = Evaluator.of(new)
    collective = evaluator.collective
    before, after = (
        fitting("old", read_state("old", old), evaluator.model),
        snapshot(evaluator.model),
    )
    known = _right_and_class(evaluator, before, data, adapter)
    curve, statistics = [], {}
    for share in sorted({0.0, *map(float, shares)}):
        mixed = between(before, after, 1 - share)
        if 0 < share < 1:
            # Kept in memory, so that the chosen share needs no second pass over the training data.
            statistics[share] = _statistics(
                evaluator, mixed, training, batches=batches, seed=seed, adapter=adapter
            )
            mixed |= statistics[share]
        found = _right_and_class(evaluator, mixed, data, adapter)
        if collective.any(not torch.equal(known[:, 1], found[:, 1])):
            raise ConfigurationError(
                "`data`: a second pass returned other samples.",
                "give a source, a list of batches or a DataLoader that does not shuffle.",
            )
        counts = FlipCounts.of(known[:, 0] > 0, found[:, 0] > 0)
        total = collective.sum(
            torch.tensor([counts.kept, counts.broken, counts.repaired, counts.failing])
        )
        if not int(total.sum()):
            raise ConfigurationError("`data` is empty.", "give data to choose the share on.")
        curve.append(SharePoint(share, FlipCounts(*total.tolist())))
    # Counts are compared, since the difference of two rounded accuracies could be slightly above
    # the tolerance.
    most, alone = max(point.counts.right for point in curve), curve[0].counts
    lost = alone.n if tolerance is None else tolerance * alone.n + 1e-6
    within = [point for point in curve if most - point.counts.right <= lost]
    if tolerance is not None:
        # A larger share can break more samples if the new model was not trained from the old
        # weights.
        within = [point for point in within if point.counts.broken <= alone.broken] or within
    chosen = max(within, key=lambda point: point.share)
    state = (
        between(before, after, 1 - chosen.share) | statistics.get(chosen.share, {})
        if chosen.share
        else {}
    )
    return ShareChoice(chosen, tuple(curve), tolerance, state)


def check_share(share: object, argument: str = "share") -> None:
    """Raises a `ConfigurationError` unless `share` is a number from 0 to 1."""
    check_real(argument, share, "share", "write a number from 0 to 1.", least=0, most=1)


def alignment(old: State, new: nn.Module) -> float:
    """Returns the cosine between the weights of two models: 1 for a copy, about 0 if they were
    trained
    independently.

    Parameters with one dimension are left out, because some of them, such as norm scales, are alike
    in all models.
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


def _statistics(
    evaluator: Evaluator, state: State, training: Data | None, **estimating: Any
) -> dict[str, Tensor]:
    layers = batch_norms(evaluator.model)
    if layers and training is None:
        raise ConfigurationError(
            f"`training` is missing, but the batch norm layer {next(iter(layers))!r} needs new statistics.",
            "give the data that the new model was trained on, best without augmentation.",
        )
    with temporary_weights(evaluator.model, state):
        return estimate_statistics(evaluator, [] if training is None else training, **estimating)


def _right_and_class(evaluator: Evaluator, state: State, data: Data, adapter: Adapter) -> Tensor:
    """Returns two columns for this rank's samples: 1 if right under `state`, else 0; the class, or
    -1 if unknown.
    """

    def run() -> Tensor:
        rows = [torch.zeros(0, 2, dtype=torch.int64)]
        for output, target in evaluator.outputs(data, adapter):
            right, label = evaluator.task.right(output, target), evaluator.task.label(target)
            classes = (
                torch.full_like(right, -1, dtype=torch.int64)
                if label is None
                else label.to(right.device)
            )
            rows.append(torch.stack([right.long(), classes], 1).cpu())
        return torch.cat(rows)

    with preserve_state(evaluator.model), temporary_weights(evaluator.model, state):
        return evaluator.collective.all_or_none(run, "`data` could not be read on another rank.")


DEFAULT_BATCH_SIZE = 256  # for a source without `batch_size`
MIN_BATCH_SIZE = (
    4  # with less, a rank could get a batch of one sample, for which batch norm raises an error
)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Returns by name the batch norm layers whose running statistics the training updates.

    Frozen layers are left out: layers that do not track statistics (this is how Lightning freezes
    them), and layers in evaluation mode inside a model in training mode.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and layer.track_running_stats
        and layer.running_mean is not None
        and (layer.training or not model.training)
    }


@torch.no_grad()
def estimate_statistics(
    model: nn.Module | Evaluator,
    data: Source | Iterable[Any],
    *,
    batches: int | None = None,
    seed: int = 0,
    adapter: Adapter = unpack,
) -> dict[str, Tensor]:
    """Averages the mean and variance of each batch norm layer's inputs over batches, in one pass
    over
    the data.

    Izmailov et al. 2018 (Averaging weights leads to wider optima and better generalization) do the
    same after they average weights. Only batch norm layers are in training mode, so dropout is off.
    The model does not change.

    Args:
        model: the model, on its device, with the weights that the statistics must match. An
            `Evaluator` sets the precision and the ranks that share the data. In the average, each
            batch of each rank counts the same.
        data: a source, read in random order because batches of sorted data have unlike means; or
            batches from a data loader, read in their order, where no batch should be much smaller
            than the others.
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
    chosen = (
        _random_batches(data, batches, seed, collective)
        if isinstance(data, Source)
        else islice(data, batches)
    )

    def run() -> int:
        n, bound = 0, bind_adapter(adapter, evaluator.model)
        for args, kwargs, _ in unpacked(chosen, bound, device_of(evaluator.model)):
            with evaluator.context():
                run_model(evaluator.model, args, kwargs)
            n += 1
        return n

    with preserve_state(evaluator.model), _reset_to_average(layers):
        n = collective.all_or_none(
            run, "the data for batch norm statistics could not be read on another rank."
        )
        if not int(collective.sum(torch.tensor(n))):
            raise ConfigurationError(
                "`data` has no batch for batch norm statistics.", "give data with samples."
            )
        return _mean_statistics(layers, collective)


def _random_batches(
    source: Source, batches: int | None, seed: int, collective: Collective
) -> Iterator[Any]:
    """Reads this rank's samples as shuffled batches of similar size. All ranks get the same number
    of batches.
    """
    mine = source.positions
    size = max(int(getattr(source, "batch_size", 0) or DEFAULT_BATCH_SIZE), MIN_BATCH_SIZE)
    most = int(torch.cat(collective.gather(torch.tensor([len(mine)]))).max())
    order = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(seed))]
    parts = [part for part in order.tensor_split(max(-(-most // size), 1)) if len(part)]
    return iter(source.draw(parts[:batches]))


@contextmanager
def _reset_to_average(layers: dict[str, _BatchNorm]) -> Iterator[None]:
    """Resets the statistics, which `preserve_state` must restore, and makes the layers average all
    batches equally.
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
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
        assert mean is not None and var is not None and count is not None  # noqa: PT018
        both, total = torch.stack([mean, var]), collective.sum(count)
        if collective.world_size > 1:
            both = (collective.sum(at_least_float32(both) * count) / total.clamp_min(1)).to(
                both.dtype
            )
        if int(total):
            prefix = f"{name}." if name else ""
            found |= {
                f"{prefix}running_mean": both[0].clone(),
                f"{prefix}running_var": both[1].clone(),
            }
            found[f"{prefix}num_batches_tracked"] = total.clone()
    return found
