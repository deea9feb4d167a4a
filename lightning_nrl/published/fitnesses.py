"""Fitness functions of Arachne and NeuRecover."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.errors import check_real
from lightning_nrl.search import FitnessFunction
from lightning_nrl.search.scores import Scores


@dataclass(frozen=True)
class ArachneFitness(FitnessFunction):
    r"""Arachne's fitness; L is a mean loss.

    .. math:: \frac{N_{patched}+1}{L(I_{neg})+1} + \frac{N_{intact}+1}{L(I_{pos})+1}
    """

    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        patched, intact, failed, passed = scores.columns()
        return scores.finite((patched + 1) / (failed + 1) + (intact + 1) / (passed + 1))


@dataclass(frozen=True)
class NeuRecoverFitness(FitnessFunction):
    r"""NeuRecover's fitness: like `ArachneFitness`, but with rates instead of counts.

    .. math:: \frac{N_{patched}/|I_{neg}|+1}{L(I_{neg})+1}
        + \alpha \frac{N_{intact}/|I_{pos}|+1}{L(I_{pos})+1}

    Attributes:
        alpha: factor of the second term, at least 0.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_real(
            "fitness.alpha", self.alpha, "weight", "give a finite number of at least 0.", least=0
        )

    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        patched, intact, failed, passed = scores.columns()
        repaired = (patched / scores.n_failed + 1) / (failed + 1)
        kept = (intact / scores.n_passed + 1) / (passed + 1)
        return scores.finite(repaired + self.alpha * kept)


@dataclass(frozen=True)
class ArachneDEFitness(FitnessFunction):
    r"""Fitness of Arachne's second version: a weighted sum of the credits c of all samples.

    .. math:: \sum_{I_{pos}} c + a \sum_{I_{neg}} c

    The credit of a sample is 1 if it is right under the candidate, else 1/(loss + 1). Sample
    weights are ignored.

    Attributes:
        aggressiveness: a, the weight of a failed sample relative to a passed sample, at least 0.
    """

    aggressiveness: float = 10.0

    def __post_init__(self) -> None:
        hint = "give a finite number of at least 0."
        check_real("fitness.aggressiveness", self.aggressiveness, "weight", hint, least=0)

    def credit(self, passed: Tensor, loss: Tensor) -> Tensor:
        return torch.where(passed, 1.0, 1 / (loss + 1))

    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        """Returns the fitness of each candidate, `P`.

        Raises a `ValueError` if the scores have no credits.
        """
        if scores.credit_failed is None or scores.credit_passed is None:
            raise ValueError("The scores have no credits: make the scorer with this fitness.")
        return scores.finite(scores.credit_passed + self.aggressiveness * scores.credit_failed)
