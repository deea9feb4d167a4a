"""Which weights are worth searching: the impact of each, and the sets they are chosen by.

In: the model on known data, and which samples fail and pass. Out: a `Localization`. A new way is one file with a
`Localizer` in it, registered in `LOCALIZERS`.
"""

from lightning_nrl.localization.all_weights import AllWeights
from lightning_nrl.localization.impact import Aggregation, Impact, measure
from lightning_nrl.localization.localizer import LOCALIZERS, Localization, Localizer
from lightning_nrl.localization.neurecover_lite import NeuRecoverLite, default_n_weights, localize, set_sizes

__all__ = [
    "LOCALIZERS",
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
