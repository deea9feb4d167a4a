"""Scoring of candidates: known data is recorded once and replayed from the repaired layer on, for many at once.

In: a model, known data, candidate weights. Out: `Scores`, how many samples each candidate repairs and breaks, and its
losses. `recording` makes an `ActivationCache`; `sparse_delta` follows the few changed weights, `candidate_tensor` what
all candidates share; `chunk_scorer` and `scorer` count.
"""

# This registers what `CandidateTensor` does in an operation.
from lightning_nrl.search._scoring import candidate_ops  # noqa: F401
from lightning_nrl.search._scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl.search._scoring.recording import record
from lightning_nrl.search._scoring.scorer import SwarmScorer, make_scorer
from lightning_nrl.search._scoring.sparse_delta import LayerDelta, make_layer_deltas
from lightning_nrl.search._scoring.traced_model import LayerEdit

__all__ = [
    "ActivationCache",
    "Chunk",
    "LayerDelta",
    "LayerEdit",
    "SwarmScorer",
    "make_layer_deltas",
    "make_scorer",
    "record",
]
