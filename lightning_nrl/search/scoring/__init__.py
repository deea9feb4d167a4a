"""Scores candidates by the part of the model after the repaired layer.

The model runs once up to this layer. In: a model, known data, candidates. Out: `Scores`.
`recording` stores the activations at the layer in an `ActivationCache`. `sparse_delta` computes the
effect of changed weights on the layer's output, and `candidate_tensor` carries the effect through
the rest of the model. `chunk_scorer` and `scorer` count passed samples and sum losses.
"""

# Registers the operations of `CandidateTensor`.
from lightning_nrl.search.scoring import candidate_ops  # noqa: F401
