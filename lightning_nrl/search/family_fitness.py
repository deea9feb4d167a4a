"""The fitnesses of Arachne and NeuRecover, and all that have a name.

Pure functions of scores like `Fitness`, `S x P -> S x P`; larger is better. L is a mean loss under the candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
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
        """The fitness of each candidate, `S x P`; one whose loss is NaN or infinite is worth minus infinity."""
        patched, intact = _counts(scores)
        return _finite(scores, (patched + 1) / (_failed(scores) + 1) + (intact + 1) / (_passed(scores) + 1))


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
        """The fitness of each candidate, `S x P`; one whose loss is NaN or infinite is worth minus infinity."""
        patched, intact = _counts(scores)
        repaired = (patched / scores.n_failed + 1) / (_failed(scores) + 1)
        kept = (intact / scores.n_passed + 1) / (_passed(scores) + 1)
        return _finite(scores, repaired + self.alpha * kept)


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
        """The fitness of each candidate, `S x P`; one whose loss is NaN or infinite is worth minus infinity.

        Raises:
            ValueError: the scores have no credits; `make_scorer(..., credit=True)` gives them.
        """
        if scores.credit_failed is None or scores.credit_passed is None:
            raise ValueError("The scores have no credits: make the scorer with `credit=True`.")
        return _finite(scores, scores.credit_passed + self.aggressiveness * scores.credit_failed)


def needs_credit(fitness: FitnessFunction) -> bool:
    """Whether a fitness asks for the credits of wrong samples: it says so by `uses_credit`."""
    return bool(getattr(fitness, "uses_credit", False))


def _counts(scores: Scores) -> tuple[Tensor, Tensor]:
    dtype = widest(scores.patched.device)
    patched = scores.patched if scores.gain is None else scores.gain
    intact: Any = scores.intact if scores.harm is None else scores.n_passed - scores.harm
    return patched.to(dtype), intact.to(dtype)


def _failed(scores: Scores) -> Tensor:
    return scores.loss_failed.to(widest(scores.patched.device))


def _passed(scores: Scores) -> Tensor:
    return scores.loss_passed.to(widest(scores.patched.device))


def _finite(scores: Scores, value: Tensor) -> Tensor:
    finite = scores.loss_failed.isfinite() & scores.loss_passed.isfinite() & torch.isfinite(value)
    return value.masked_fill(~finite, -math.inf)
