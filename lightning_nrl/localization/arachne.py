"""Arachne's localisation: the Pareto front of gradient and forward impact (Sohn, Kang, Yoo 2019, 2022).

`Arachne` looks at the failed data alone. `ArachneV2` looks for what matters for the failed and little for the passed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.localization.contribution import contribution
from lightning_nrl.localization.impact import Replay, measure
from lightning_nrl.localization.localizer import LOCALIZERS, Localization, check_numbers, localized
from lightning_nrl.localization.pareto import first_fronts

__all__ = ["Arachne", "ArachneV2"]

TOP_PER_FAILURE = 20
"""Weights that Arachne looks at for each failed sample."""


@LOCALIZERS.register("arachne")
@dataclass(frozen=True)
class Arachne:
    """Localises the weights on the Pareto front of |dL/dw| and mean |o_i w_ij| on the failed samples (Arachne, 2019).

    Of all weights the `n_g` with the largest gradient come into question; passed samples are not looked at.

    Attributes:
        n_weights: how many weights to localise: further fronts follow the first one until there are so many. None: the
            first front, as published.
        n_g: how many weights of largest gradient come into question; None: 20 for each failed sample, as published, and
            no fewer than `n_weights`.
        include_bias: whether biases may be localised too.

    Raises:
        ConfigurationError: a number below 1 or not whole.
    """

    n_weights: int | None = None
    n_g: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights, n_g=self.n_g)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Measures both impacts on the failed samples and takes the front."""
        impact = measure(recording, evaluator, failed)
        total = len(impact.backward)
        n_g = self.n_g or max(TOP_PER_FAILURE * int(failed.sum()), self.n_weights or 0)
        top = impact.backward.argsort(descending=True, stable=True)[:n_g].sort().values
        weights = top[first_fronts(impact.backward[top], impact.forward[top], self.n_weights)]
        return localized(weights, len(top), self.n_weights, total)


@LOCALIZERS.register("arachne-v2")
@dataclass(frozen=True)
class ArachneV2:
    r"""Localises the weights that matter for the failed samples and little for the passed (Arachne, TOSEM 2022).

    The Pareto front of two costs of all weights, each `cost(failed) / (1 + cost(passed))`: the gradient loss
    :math:`|\sum dL/dw|` and the forward impact (`contribution`). Where the published method draws as many passed
    samples as there are failed ones, stratified by label, all are measured here and their sum counts as if they were so
    many: the same on average, and nothing is drawn.

    Attributes:
        n_weights: how many weights to localise: further fronts follow the first one until there are so many. None: the
            first front, as published.
        include_bias: whether biases may be localised too.

    Raises:
        ConfigurationError: a number below 1 or not whole.
    """

    n_weights: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Measures both costs on failed and passed samples and takes the front."""
        n_failed = int(failed.sum())
        costs = []
        for rows in (failed, passed):
            gradient = measure(recording, evaluator, rows).backward * n_failed
            costs.append((gradient, contribution(recording, evaluator, rows)))
        gradient, forward = (of_failed / (1 + of_passed) for of_failed, of_passed in zip(*costs, strict=True))
        weights = first_fronts(gradient, forward, self.n_weights)
        return localized(weights, len(gradient), self.n_weights, len(gradient))
