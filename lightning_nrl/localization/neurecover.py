"""NeuRecover's localisation: weights that matter where training lost samples, and not where it won some (Tokui 2022).

A training goes through points, its epochs or its checkpoints, and ends at the model as it is. Between two points in a
row a sample may turn from right to wrong (a regression) or from wrong to right (an improvement).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, check_kind, check_real
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.localization.history import CheckpointHistory, History, HistoryPoint, Known
from lightning_nrl.localization.impact import Impact, measure
from lightning_nrl.localization.localizer import LOCALIZERS, Localization, Replay, check_numbers, default_n_weights
from lightning_nrl.localization.neurecover_lite import nearest, places, sizes_at
from lightning_nrl.localization.training_record import FolderHistory


@LOCALIZERS.register("neurecover")
@dataclass(frozen=True)
class NeuRecover:
    r"""Localises by what training did to weights and samples.

    In each layer `(F_deg & G_deg & D) - (F_imp & G_imp)`: the top weights by forward impact F and by gradient G on the
    regressions (deg), by the change D of the weight, and by both impacts on the improvements (imp). A layer of n
    weights has the top `round(n * s * rate)`, with its suspiciousness

    .. math:: s = \frac{F_{deg}}{F_{deg} + F_{imp}} \cdot \overline{|\Delta w|}

    of mean impacts, both factors divided by the largest of all layers. Regressions are targets (I_neg) that were right
    before, improvements are passed samples (I_pos) that were wrong.

    Attributes:
        history: earlier points of the training, the oldest first: a list of checkpoints (paths, modules, state dicts),
            the folder that `TrainingHistory` has written, or an object with `points`. None: that of a
            `TrainingHistory` in the same Trainer.
        n_weights: how many weights to localise; the nearest number that can be reached is taken. None, with `rate` None
            too, leaves the choice to `default_n_weights`.
        rate: the share of the weights of the most suspicious layer that are the top ones, above 0 to 1, instead.
        last: how many steps of the training count, from the last one back; 1 is the published method, which compares
            the last two points. None: all.
        decay: what a flip and a change of a step count of what they count in the step after it, above 0 to 1.
        include_bias: whether biases may be localised too.
    """

    history: str | Path | Sequence[Any] | History | None = None
    n_weights: int | None = None
    rate: float | None = None
    last: int | None = None
    decay: float = 0.8
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights, last=self.last)
        check_real("decay", self.decay, "number", "give a number above 0 and at most 1.", above=0, most=1)
        if self.rate is not None:
            check_real("rate", self.rate, "share", "give a share above 0 and at most 1.", above=0, most=1)
            if self.n_weights is not None:
                raise ConfigurationError(
                    f"`n_weights={self.n_weights}` and `rate={self.rate}` are both given.", "give one of them."
                )
        _history_of(self.history)

    @property
    def wants_history(self) -> bool:
        """True if the record of a `TrainingHistory` in the same Trainer is meant."""
        return self.history is None

    def with_history(self, folder: str) -> NeuRecover:
        return replace(self, history=folder)

    def on(self, known: Known) -> OnHistory:
        """Returns the localiser for these data: reads the history, running checkpoints once over the data."""
        history = _history_of(self.history)
        if history is None:
            raise ConfigurationError(
                "`localizer`: NeuRecover has no history of the training.",
                "give checkpoints, `NeuRecover(history=['epoch1.ckpt', 'epoch2.ckpt'])`, or put a `TrainingHistory` "
                "callback before `RegressionFreeRepair`.",
            )
        now = HistoryPoint(known.before.passed.to(torch.int8), known.space.flat())
        points = history.points(known)
        while points and torch.equal(points[-1].weights.to(now.weights), now.weights):
            points = points[:-1]
        if not points:
            raise ConfigurationError(
                "`NeuRecover.history` has no point before the model as it is.", "give at least one earlier checkpoint."
            )
        points = [*points, now]
        flips = TrainingFlips.between(points if self.last is None else points[-self.last - 1 :], self.decay)
        return OnHistory(self, flips)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Refuses: `on(known)` returns the localiser to be called."""
        raise ConfigurationError(
            "`localizer`: NeuRecover does not have the known data.",
            "call `NeuRecover.on(known)`, then what it gives.",
        )


@dataclass(frozen=True)
class TrainingFlips:
    """Flips during a training; later ones count more."""

    regressed: Tensor  # N, 0 where a sample never turned from right to wrong
    improved: Tensor  # N, 0 where it never turned from wrong to right
    change: Tensor  # W, mean size of the change of each weight in a step

    @classmethod
    def between(cls, points: Sequence[HistoryPoint], decay: float) -> TrainingFlips:
        """Of at least two points in a row; a sample not known at one of two points did not flip between them."""
        regressed = improved = torch.zeros(len(points[0].passed), dtype=torch.float64)
        change, total = torch.zeros(len(points[0].weights), dtype=torch.float64), 0.0
        for age, (old, new) in enumerate(zip(points[-2::-1], points[:0:-1], strict=True)):
            counts = decay**age
            was, is_now = old.passed.cpu(), new.passed.cpu()
            regressed = regressed + counts * ((was == 1) & (is_now == 0))
            improved = improved + counts * ((was == 0) & (is_now == 1))
            change = change + counts * (new.weights.cpu().double() - old.weights.cpu().double()).abs()
            total += counts
        return cls(regressed, improved, change / total)


@dataclass(frozen=True)
class OnHistory:
    """NeuRecover's localisation where the history is known."""

    settings: NeuRecover
    flips: TrainingFlips

    @property
    def include_bias(self) -> bool:
        return self.settings.include_bias

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        regressed, improved = self.flips.regressed * failed.cpu(), self.flips.improved * passed.cpu()
        if not regressed.any():
            raise EmptyLocalizationError(
                f"`localizer`: none of the {int(failed.sum())} targets was right at an earlier point of the history.",
                "record more often, or data that the targets are from (`TrainingHistory(splits=[...])`), give more "
                "checkpoints, or use `neurecover-lite`, which needs no history.",
            )
        deg = measure(recording, evaluator, regressed > 0, weight=regressed)
        imp = measure(recording, evaluator, improved > 0, weight=improved) if improved.any() else None
        n_weights, rate = self.settings.n_weights, self.settings.rate
        return localize_by_history(recording.space, deg, imp, self.flips.change, n_weights=n_weights, rate=rate)


def localize_by_history(
    space: ParameterSpace,
    deg: Impact,
    imp: Impact | None,
    change: Tensor,
    *,
    n_weights: int | None = None,
    rate: float | None = None,
) -> Localization:
    """Localises by NeuRecover's set operation in every layer (see `NeuRecover`).

    Of all rates that leave any weight the one is taken whose number of weights is nearest to the request, the smallest
    if several are equally near.

    `deg` and `imp` are impacts on regressions and improvements (None: there are none), `change`, `W`, is how much each
    weight changed.

    Raises:
        EmptyLocalizationError: no weight is left.
    """
    change = change.to(deg.forward)
    enter, leave = (torch.full_like(deg.forward, torch.inf) for _ in range(2))
    layers = [slice(site.offset, site.offset + site.size) for site in space.sites]
    suspicious = suspiciousness(deg, imp, layers, change)
    for own, s in zip(layers, suspicious.tolist(), strict=True):
        if not s:
            continue
        per_rank = 1 / (s * (own.stop - own.start))
        # A weight of rank k is among the top ones from round(n s rate) = k on.
        worst = _worst_rank(deg.forward[own], deg.backward[own], change[own])
        enter[own] = (worst - 0.5) * per_rank
        if imp is not None:
            leave[own] = (_worst_rank(imp.forward[own], imp.backward[own]) - 0.5) * per_rank
    if rate is None:
        n_weights = n_weights or default_n_weights(space.size)
        events = torch.cat([enter, leave]).unique()
        events = events[events.isfinite()]
        localized = sizes_at(enter, leave, events)["localized"]
        rate = float(events[nearest(localized, n_weights)]) if len(events) else 1.0
    weights = ((enter <= rate) & (leave > rate)).nonzero().squeeze(1)
    at = sizes_at(enter, leave, enter.new_tensor([rate]))
    sizes = {name: int(size) for name, size in at.items()} | {"total": space.size}
    if not len(weights):
        raise EmptyLocalizationError(
            f"`localizer` leaves no weight at the rate {rate:.3g}: {sizes['failed']} changed and matter for "
            f"regressions, all of them among the {sizes['passed']} that matter for improvements.",
            "give another `rate` or `n_weights`, choose another layer, or use `neurecover-lite`.",
        )
    tops = [
        min(site.size, int(s * site.size * rate + 0.5))
        for site, s in zip(space.sites, suspicious.tolist(), strict=True)
    ]
    return Localization(weights, sum(tops), n_weights, sizes)


def suspiciousness(deg: Impact, imp: Impact | None, layers: Sequence[slice], change: Tensor) -> Tensor:
    """Returns how suspicious each layer is, from 0 to 1; both factors are 1 for the layer that has most of them."""

    def means(x: Tensor) -> Tensor:
        return torch.stack([x[own].mean() for own in layers])

    of_deg, moved = means(deg.forward), means(change)
    of_imp = torch.zeros_like(of_deg) if imp is None else means(imp.forward)
    share = torch.nan_to_num(of_deg / (of_deg + of_imp))
    return torch.nan_to_num(share / share.max()) * torch.nan_to_num(moved / moved.max())


def _history_of(given: Any) -> History | None:
    if isinstance(given, (str, Path)):
        return FolderHistory(Path(given))
    if given is None or (hasattr(given, "points") and not isinstance(given, type)):
        history: History | None = given
        return history
    argument, listed = "NeuRecover.history", isinstance(given, Sequence) and not isinstance(given, bytes)
    check_kind(argument, given, listed, "history", f"{argument}=['epoch1.ckpt', 'epoch2.ckpt']")
    if not given:
        raise ConfigurationError(f"`{argument}` is an empty list.", "give at least one earlier checkpoint.")
    return CheckpointHistory(tuple(given))


def _worst_rank(*impacts: Tensor) -> Tensor:
    return torch.stack([places(impact) for impact in impacts]).amax(0).to(impacts[0])
