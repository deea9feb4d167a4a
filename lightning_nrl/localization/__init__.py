"""Localisation chooses the weights to search.

In: a recording of the model on known data, and masks of the failed and the passed samples. Out: a `Localization` with
the chosen weights. To add a method, write a `Localizer` and register it in `LOCALIZERS`.
"""

from lightning_nrl.localization.arachne import Arachne, ArachneV2, contribution, first_fronts, pareto_front
from lightning_nrl.localization.history import (
    CheckpointHistory,
    DataLocalizer,
    History,
    HistoryPoint,
    KnownData,
    on_data,
)
from lightning_nrl.localization.impact import Aggregation, ByGradient, Impact, measure
from lightning_nrl.localization.localizer import (
    LOCALIZERS,
    AllWeights,
    Localization,
    Localizer,
    RandomWeights,
    default_n_weights,
)
from lightning_nrl.localization.neurecover import NeuRecover, TrainingFlips, localize_by_history
from lightning_nrl.localization.neurecover_lite import NeuRecoverLite, localize, set_sizes
from lightning_nrl.localization.training_record import RecordedSplit, TrainingRecord

__all__ = [
    "LOCALIZERS",
    "Aggregation",
    "AllWeights",
    "Arachne",
    "ArachneV2",
    "ByGradient",
    "CheckpointHistory",
    "DataLocalizer",
    "History",
    "HistoryPoint",
    "Impact",
    "KnownData",
    "Localization",
    "Localizer",
    "NeuRecover",
    "NeuRecoverLite",
    "RandomWeights",
    "RecordedSplit",
    "TrainingFlips",
    "TrainingRecord",
    "contribution",
    "default_n_weights",
    "first_fronts",
    "localize",
    "localize_by_history",
    "measure",
    "on_data",
    "pareto_front",
    "set_sizes",
]
