"""Published repair methods besides the paper's: Arachne, NeuRecover, Apricot, merged repairs.

In: a `Problem`, as for every method. Out: a `Solution`. The parts of these methods (localizers,
fitnesses, searchers) can be combined with those of the core. `TrainingHistory` makes the record of
a training that NeuRecover reads. Registries name these parts and load them on first use; no other
package imports this one.
"""

from lightning_nrl.published.apricot import Apricot
from lightning_nrl.published.arachne import Arachne, ArachneV2
from lightning_nrl.published.bundles import BUNDLES, bundle
from lightning_nrl.published.differential_evolution import DifferentialEvolution
from lightning_nrl.published.fitnesses import ArachneDEFitness, ArachneFitness, NeuRecoverFitness
from lightning_nrl.published.history import CheckpointHistory, History, HistoryPoint
from lightning_nrl.published.merged_repairs import MergedRepairs
from lightning_nrl.published.neurecover import NeuRecover
from lightning_nrl.published.training_history import TrainingHistory
from lightning_nrl.published.training_record import RecordedSplit, TrainingRecord

__all__ = [
    "BUNDLES",
    "Apricot",
    "Arachne",
    "ArachneDEFitness",
    "ArachneFitness",
    "ArachneV2",
    "CheckpointHistory",
    "DifferentialEvolution",
    "History",
    "HistoryPoint",
    "MergedRepairs",
    "NeuRecover",
    "NeuRecoverFitness",
    "RecordedSplit",
    "TrainingHistory",
    "TrainingRecord",
    "bundle",
]
