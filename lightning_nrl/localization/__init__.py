"""Which weights are worth searching: the impact of each, and the sets they are chosen by."""

from lightning_nrl.localization.all_weights import AllWeights
from lightning_nrl.localization.impact import Aggregation, measure
from lightning_nrl.localization.localization import Impact, Localization
from lightning_nrl.localization.localizer import Localizer
from lightning_nrl.localization.neurecover_lite import NeuRecoverLite, default_n_weights, localize, set_sizes

__all__ = [
    "Aggregation",
    "AllWeights",
    "Impact",
    "Localization",
    "Localizer",
    "NeuRecoverLite",
    "default_n_weights",
    "localize",
    "measure",
    "set_sizes",
]
