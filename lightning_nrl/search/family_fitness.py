"""The fitnesses of Arachne and NeuRecover, and all that have a name.

Pure functions of scores like `Fitness`, `S x P -> S x P`; larger is better. L is a mean loss under the candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lightning_nrl._utils.registry import Registry
from lightning_nrl.errors import check_real
from lightning_nrl.search.fitness import FITNESS_KINDS, Fitness, FitnessFunction
from lightning_nrl.search.scores import Scores

FITNESSES: Registry[FitnessFunction] = Registry("Fitness", "Fitness('eq1')", callable, group="fitnesses")
"""Fitnesses by name; a function of a candidate's scores and the original's is one, too."""

for _kind in FITNESS_KINDS:
    FITNESSES.register(_kind)(partial(Fitness, _kind))  # type: ignore[arg-type]


@FITNESSES.register("arachne")
@dataclass(frozen=True)
class ArachneFitness:
    r"""Arachne's first fitness: :math:`(N_{patched}+1)/(L(I_{neg})+1) + (N_{intact}+1)/(L(I_{pos})+1)`.

    Counts, not rates: with more passed than failed samples one of each weighs the same, up to the losses.
    """

    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        """As of `Fitness`."""
        patched, intact, failed, passed = scores.columns()
        return scores.finite((patched + 1) / (failed + 1) + (intact + 1) / (passed + 1))


@FITNESSES.register("neurecover")
@dataclass(frozen=True)
class NeuRecoverFitness:
    r"""NeuRecover's fitness, of rates.

    .. math:: \frac{N_{patched}/|I_{neg}|+1}{L(I_{neg})+1} + \alpha \frac{N_{intact}/|I_{pos}|+1}{L(I_{pos})+1}

    Attributes:
        alpha: the weight of what is kept, at least 0.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_real("fitness.alpha", self.alpha, "weight", "give a finite number of at least 0.", least=0)

    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        """As of `Fitness`."""
        patched, intact, failed, passed = scores.columns()
        repaired = (patched / scores.n_failed + 1) / (failed + 1)
        kept = (intact / scores.n_passed + 1) / (passed + 1)
        return scores.finite(repaired + self.alpha * kept)


@FITNESSES.register("arachne-de")
@dataclass(frozen=True)
class ArachneDEFitness:
    r"""The fitness of Arachne's second version, with a credit c for each sample: 1 if right, else 1/(loss + 1).

    .. math:: \sum_{I_{pos}} c + a \sum_{I_{neg}} c

    Weights of samples do not count.

    Attributes:
        aggressiveness: a, how many passed samples one failed sample is worth, at least 0.
    """

    uses_credit = True
    aggressiveness: float = 10.0

    def __post_init__(self) -> None:
        hint = "give a finite number of at least 0."
        check_real("fitness.aggressiveness", self.aggressiveness, "weight", hint, least=0)

    def __call__(self, scores: Scores, original: Scores) -> Tensor:
        """As of `Fitness`; a `ValueError` if the scores have no credits."""
        if scores.credit_failed is None or scores.credit_passed is None:
            raise ValueError("The scores have no credits: make the scorer with `credit=True`.")
        return scores.finite(scores.credit_passed + self.aggressiveness * scores.credit_failed)


def needs_credit(fitness: FitnessFunction) -> bool:
    """True if a fitness asks for the credits of wrong samples: it says so by `uses_credit`."""
    return bool(getattr(fitness, "uses_credit", False))
