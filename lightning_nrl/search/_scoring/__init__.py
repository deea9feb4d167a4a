"""Scoring of candidates: known data is recorded once and replayed from the repaired layer on, for many at once.

In: a model, known data, candidate weights. Out: `Scores`. `recording` builds an `ActivationCache`; `sparse_delta`
computes the effect of changed weights on a layer's output, `candidate_tensor` carries it through the rest of the model;
`chunk_scorer` and `scorer` count and sum.
"""

# Registers the operations of `CandidateTensor`.
from lightning_nrl.search._scoring import candidate_ops  # noqa: F401
