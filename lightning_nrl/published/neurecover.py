"""NeuRecover's localisation, from the history of the training (Tokui et al. 2022).

The history is a sequence of points (epochs or checkpoints) that ends at the current model. From one
point to the next a sample may turn from right to wrong (a regression) or from wrong to right (an
improvement).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._trainer.lightning.packages import Trainer
from lightning_nrl._trainer.lightning.private_parts import callbacks_of_class
from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, check_kind, check_real
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.localization import Impact, measure
from lightning_nrl.localization.localizer import (
    KnownData,
    Localization,
    Localizer,
    Replay,
    check_numbers,
    default_n_weights,
)
from lightning_nrl.localization.neurecover_lite import (
    NeuRecoverLite,
    nearest,
    rank_impacts,
    sizes_at,
)
from lightning_nrl.published.history import (
    HISTORY_ARGUMENT,
    CheckpointHistory,
    History,
    HistoryPoint,
)
from lightning_nrl.published.training_history import TrainingHistory
from lightning_nrl.published.training_record import FolderHistory


@dataclass(frozen=True)
class NeuRecover(Localizer):
    r"""Localises weights by the history of the training.

    The regressions (deg) are targets (I_neg) that used to be right. The improvements (imp) are
    passed samples (I_pos) that used to be wrong. In each layer the weights `(F_deg & G_deg & D) -
    (F_imp & G_imp)` are localised. F_deg has the weights with the largest forward impact on the
    regressions, G_deg has the weights with the largest gradient, and D has the weights that the
    training changed most. F_imp and G_imp are like F_deg and G_deg for the improvements. In a layer
    of n weights, each set has `round(n * s * rate)` weights. Here s is the suspiciousness of the
    layer:

    .. math:: s = \frac{\bar f_{deg}}{\bar f_{deg} + \bar f_{imp}} \cdot \overline{|\Delta w|}

    In this formula, f is a weight's forward impact and :math:`\Delta w` its change, and bars are
    means over the layer's weights. Each of the two factors of s is divided by its maximum over the
    layers.

    Attributes:
        history: earlier points of the training, oldest first: a list of checkpoints (paths,
            modules, state dicts), a folder written by `TrainingHistory`, or a `History`. None: the
            `TrainingHistory` in the same Trainer.
        n_weights: number of weights to localise, by default `default_n_weights`. The result may
            differ slightly.
        rate: share of a layer's weights in each set if s is 1, above 0 and at most 1. It replaces
            `n_weights`.
        last: number of most recent steps (from a point to the next) to use; None: all. The
            published method uses 1.
        decay: weight of a step relative to the step after it, above 0 and at most 1.
        include_bias: True to localise biases too.
    """

    history: str | Path | Sequence[Any] | History | None = None
    n_weights: int | None = None
    rate: float | None = None
    last: int | None = None
    decay: float = 0.8
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights, last=self.last)
        hint = "give a number above 0 and at most 1."
        check_real("decay", self.decay, "number", hint, above=0, most=1)
        if self.rate is not None:
            hint = "give a share above 0 and at most 1."
            check_real("rate", self.rate, "share", hint, above=0, most=1)
            if self.n_weights is not None:
                raise ConfigurationError(
                    f"`n_weights={self.n_weights}` and `rate={self.rate}` are both given.",
                    "give one of them.",
                )
        _history_of(self.history)

    def in_trainer(self, trainer: Trainer, failing: Sequence[str] | None) -> Localizer:
        """Returns the localizer with the record of the first `TrainingHistory` in the Trainer.

        Before the training, there is no record yet, and another localizer checks the data.
        """
        if self.history is not None:
            return self
        for callback in callbacks_of_class(trainer, TrainingHistory):
            if failing is not None:
                _check_recorded(callback.recorded, failing)
                return NeuRecoverLite()
            return self if callback.folder is None else replace(self, history=str(callback.folder))
        return self

    def on(self, known: KnownData) -> HistoryLocalizer:
        """Reads the history, evaluates its checkpoints, and returns the localizer for the data.

        Raises a `ConfigurationError` if there is no history, or if no point has other weights than
        the current model.
        """
        history = _history_of(self.history)
        if history is None:
            raise ConfigurationError(
                "`localizer`: NeuRecover has no history of the training.",
                "give checkpoints, `NeuRecover(history=['epoch1.ckpt', 'epoch2.ckpt'])`, or put a "
                "`TrainingHistory` callback before `RegressionFreeRepair`.",
            )
        current = HistoryPoint(known.before.passed.to(torch.int8), known.space.flat())
        points = history.points(known)
        while points and torch.equal(points[-1].weights.to(current.weights), current.weights):
            points = points[:-1]
        if not points:
            raise ConfigurationError(
                "`NeuRecover.history` has no point before the current model.",
                "give at least one earlier checkpoint.",
            )
        points = [*points, current]
        if self.last is not None:
            points = points[-self.last - 1 :]
        return HistoryLocalizer(self, TrainingFlips.between(points, self.decay))

    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        """Always raises a `ConfigurationError`; call the localizer of `on(known)` instead."""
        raise ConfigurationError(
            "`localizer`: NeuRecover does not have the known data.",
            "call the localizer that `on(known)` returns.",
        )


@dataclass(frozen=True)
class TrainingFlips:
    """Flips of samples and changes of weights in a training.

    A step counts `decay` times as much as the next step.
    """

    regressed: Tensor  # N: weighted number of flips from right to wrong
    improved: Tensor  # N: weighted number of flips from wrong to right
    change: Tensor  # W: weighted mean of each weight's absolute change per step

    @classmethod
    def between(cls, points: Sequence[HistoryPoint], decay: float) -> TrainingFlips:
        """Compares each point with the next.

        A sample whose result is unknown at one of the two points did not flip.
        """
        regressed = torch.zeros(len(points[0].passed), dtype=torch.float64)
        improved = torch.zeros_like(regressed)
        change = torch.zeros(len(points[0].weights), dtype=torch.float64)
        total = 0.0
        for age, (old, new) in enumerate(zip(points[-2::-1], points[:0:-1], strict=True)):
            step_weight = decay**age
            regressed += step_weight * ((old.passed == 1) & (new.passed == 0))
            improved += step_weight * ((old.passed == 0) & (new.passed == 1))
            change += step_weight * (new.weights.cpu().double() - old.weights.cpu().double()).abs()
            total += step_weight
        return cls(regressed, improved, change / total)


@dataclass(frozen=True)
class HistoryLocalizer(Localizer):
    """Localizer that `NeuRecover.on` returns. It has the history of the training."""

    settings: NeuRecover
    flips: TrainingFlips

    @property
    def include_bias(self) -> bool:  # type: ignore[override]
        return self.settings.include_bias

    def __call__(
        self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor
    ) -> Localization:
        regressed = self.flips.regressed * failed.cpu()
        improved = self.flips.improved * passed.cpu()
        if not regressed.any():
            raise EmptyLocalizationError(
                f"`localizer`: none of the {int(failed.sum())} targets was right at an earlier "
                "point of the history.",
                "record more often, record the targets' splits "
                "(`TrainingHistory(splits=[...])`), give more checkpoints, or use "
                "`neurecover-lite`, which needs no history.",
            )
        deg = measure(recording, evaluator, regressed > 0, weight=regressed)
        imp = None
        if improved.any():
            imp = measure(recording, evaluator, improved > 0, weight=improved)
        return localize_by_history(
            recording.space,
            deg,
            imp,
            self.flips.change,
            n_weights=self.settings.n_weights,
            rate=self.settings.rate,
        )


def localize_by_history(
    space: ParameterSpace,
    deg: Impact,
    imp: Impact | None,
    change: Tensor,
    *,
    n_weights: int | None = None,
    rate: float | None = None,
) -> Localization:
    """Localises weights by the sets of `NeuRecover`.

    Args:
        space: the layers to repair.
        deg: impacts on the regressions.
        imp: impacts on the improvements; None: no improvements.
        change: absolute change of each weight during the training, in the order of `space.flat`.
        n_weights: requested number of weights if `rate` is None; by default `default_n_weights`. Of
            the rates for which the number of localised weights is nearest to `n_weights`, the
            smallest is used.
        rate: as in `NeuRecover`.

    Raises:
        EmptyLocalizationError: no weight is left.
    """
    change = change.to(deg.forward)
    enter = torch.full_like(deg.forward, torch.inf)
    leave = torch.full_like(deg.forward, torch.inf)
    suspicious = suspiciousness(space, deg, imp, change).tolist()
    for site, s in zip(space.sites, suspicious, strict=True):
        if not s:
            continue
        layer = slice(site.offset, site.offset + site.size)
        per_rank = 1 / (s * site.size)
        # A weight of rank k enters its set at the rate at which round(n * s * rate) = k.
        worst = _worst_rank(deg.forward[layer], deg.backward[layer], change[layer])
        enter[layer] = (worst - 0.5) * per_rank
        if imp is not None:
            worst = _worst_rank(imp.forward[layer], imp.backward[layer])
            leave[layer] = (worst - 0.5) * per_rank
    if rate is None:
        n_weights = n_weights or default_n_weights(space.size)
        events = torch.cat([enter, leave]).unique()
        events = events[events.isfinite()]
        localized = sizes_at(enter, leave, events)["localized"]
        rate = float(events[nearest(localized, n_weights)]) if len(events) else 1.0
    weights = ((enter <= rate) & (leave > rate)).nonzero().squeeze(1)
    size_tensors = sizes_at(enter, leave, enter.new_tensor([rate]))
    sizes = {name: int(size) for name, size in size_tensors.items()}
    sizes["total"] = space.size
    if not len(weights):
        raise EmptyLocalizationError(
            f"`localizer` leaves no weight at the rate {rate:.3g}: {sizes['failed']} weights "
            "changed and matter for regressions, but all of them are among the "
            f"{sizes['passed']} that matter for improvements.",
            "give another `rate` or `n_weights`, choose another layer, or use `neurecover-lite`.",
        )
    n_top = 0
    for site, s in zip(space.sites, suspicious, strict=True):
        n_top += min(site.size, int(s * site.size * rate + 0.5))
    return Localization(weights, n_top, n_weights, sizes)


def suspiciousness(
    space: ParameterSpace, deg: Impact, imp: Impact | None, change: Tensor
) -> Tensor:
    """Returns the suspiciousness of each layer, from 0 to 1 (see `NeuRecover`)."""
    sizes = [site.size for site in space.sites]

    def means(x: Tensor) -> Tensor:
        return torch.stack([weights.mean() for weights in x.split(sizes)])

    of_deg = means(deg.forward)
    moved = means(change)
    of_imp = torch.zeros_like(of_deg) if imp is None else means(imp.forward)
    share = torch.nan_to_num(of_deg / (of_deg + of_imp))
    return torch.nan_to_num(share / share.max()) * torch.nan_to_num(moved / moved.max())


def _history_of(history: str | Path | Sequence[Any] | History | None) -> History | None:
    if isinstance(history, (str, Path)):
        return FolderHistory(Path(history))
    if history is None:
        return None
    check_kind(
        HISTORY_ARGUMENT,
        history,
        isinstance(history, (History, Sequence)),
        "history",
        f"{HISTORY_ARGUMENT}=['epoch1.ckpt', 'epoch2.ckpt']",
    )
    if isinstance(history, History):
        return history
    if not history:
        raise ConfigurationError(
            f"`{HISTORY_ARGUMENT}` is an empty list.", "give at least one earlier checkpoint."
        )
    return CheckpointHistory(history)


def _check_recorded(recorded: Sequence[str], failing: Sequence[str]) -> None:
    # If no split with failures is recorded, there is no regression among the failures.
    if recorded and not set(failing) & set(recorded):
        raise ConfigurationError(
            f"`callbacks`: TrainingHistory records {list(recorded)}, the failures are in "
            f"{list(failing)}.",
            "NeuRecover needs a record of them: "
            f"`TrainingHistory(splits={[*recorded, *failing]})`.",
        )


def _worst_rank(*impacts: Tensor) -> Tensor:
    return torch.stack([rank_impacts(impact) for impact in impacts]).amax(0).to(impacts[0])
