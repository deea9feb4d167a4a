"""Localisation chooses the weights to search.

In: a recording of the model on known data, and masks of the failed and the passed samples. Out: a
`Localization` with the chosen weights. To add a method, write a `Localizer` and register it in
`LOCALIZERS`.
"""

from lightning_nrl.localization.impact import Aggregation, ByGradient, Impact, measure
from lightning_nrl.localization.localizer import (
    LOCALIZERS,
    AllWeights,
    KnownData,
    Localization,
    Localizer,
    RandomWeights,
    default_n_weights,
)
from lightning_nrl.localization.neurecover_lite import NeuRecoverLite, localize

__all__ = [
    "LOCALIZERS",
    "Aggregation",
    "AllWeights",
    "ByGradient",
    "Impact",
    "KnownData",
    "Localization",
    "Localizer",
    "NeuRecoverLite",
    "RandomWeights",
    "default_n_weights",
    "localize",
    "measure",
]
