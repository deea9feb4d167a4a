"""Scoring of candidates: known data is recorded once and replayed from the repaired layer on, for many at once.

In: a model, known data, candidate weights. Out: `Scores`, how many samples each candidate repairs and breaks, and its
losses. `recording` makes an `ActivationCache`; `sparse_delta` follows the few changed weights, `candidate_tensor` what
all candidates share; `chunk_scorer` and `scorer` count.
"""

# This registers what `CandidateTensor` does in an operation.
from lightning_nrl.search._scoring import candidate_ops  # noqa: F401
