"""Scoring of candidates: known data is recorded once and replayed from the repaired layer on, for many at once.

In: a model, known data, candidate weights. Out: `Scores`, how many samples each candidate repairs and breaks, and its
losses.
"""

from lightning_nrl._scoring.activation_cache import ActivationCache, Chunk, record
from lightning_nrl._scoring.replay import LayerEdit
from lightning_nrl._scoring.scorer import SampleScores, SwarmScorer, make_scorer
from lightning_nrl._scoring.scores import Scorer, Scores
from lightning_nrl._scoring.sparse_delta import LayerDelta, make_changes

__all__ = [
    "ActivationCache",
    "Chunk",
    "LayerDelta",
    "LayerEdit",
    "SampleScores",
    "Scorer",
    "Scores",
    "SwarmScorer",
    "make_changes",
    "make_scorer",
    "record",
]
