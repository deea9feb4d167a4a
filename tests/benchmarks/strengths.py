"""How often the limit printed after a choice of strength is wrong: the true rate lies above it, in
1,000 draws.

The strength is chosen by `line_search`, and the limit is that of the report. What breaks at each
strength is drawn from a world where the true rates are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from lightning_nrl import Gate, TensorSource
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import find_scope
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults
from lightning_nrl.evaluation.stats import (
    ORDERED_LEVEL_SHARE,
    binomial_cdf,
    limit_after,
    limit_at_level,
    upper_limit,
)
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Problem
from lightning_nrl.pipeline.baseline import EvaluatedData
from lightning_nrl.pipeline.strength import LIMIT_STRENGTHS, PatchPath, line_search
from lightning_nrl.records import StrengthPoint
from lightning_nrl.search import Fitness

DRAWS, CONFIDENCE = 1000, 0.95
N, ALLOWED = 915, 9
LIMIT = limit_at_level(ALLOWED, N, (1 - CONFIDENCE) * ORDERED_LEVEL_SHARE)
"""What is said of a strength that a walk accepts: the rate of which 9 of 915 are the limit."""

State = Mapping[str, torch.Tensor]
Rates = Callable[[float], float]  # the true rate of broken samples by strength; it never falls


@dataclass(frozen=True)
class Trial:
    """In how many draws the printed limit (`missed`) or that of the chosen strength alone (`naive`)
    is
    too low.

    `taken`: draws in which any strength was taken; `strength`: its mean.
    """

    chosen: str
    world: str
    missed: int
    naive: int
    taken: int
    strength: float


def trials(draws: int = DRAWS, seed: int = 0) -> list[Trial]:
    """All ways to choose, in worlds where each is in danger."""
    generator = np.random.default_rng(seed)
    above = LIMIT * 1.0001
    rising = lambda t: 0.004 + 0.012 * t  # noqa: E731
    brink = lambda t: above  # noqa: E731
    stair = lambda t: 0.003 if t <= 0.6 else above  # noqa: E731
    limit = {"limit": Gate.tolerance(ALLOWED)}
    cases = [
        ("given: `strength=0.6`", "rising with the strength", rising, {"fixed": 0.6}),
        ("a step beyond if it is free", "rising with the strength", rising, {}),
        ("a step beyond if it is free", "the same at each strength", lambda t: 0.006, {}),
        ("under a limit", "rising with the strength", rising, limit),
        ("under a limit", "a little above what is said, everywhere", brink, limit),
        ("under a limit", "safe up to 0.6, then a little above what is said", stair, limit),
    ]
    return [
        _trial(chosen, world, rates, how, draws, generator) for chosen, world, rates, how in cases
    ]


def _trial(
    chosen: str, world: str, rates: Rates, how: dict, draws: int, generator: np.random.Generator
) -> Trial:
    missed = naive = 0
    strengths = []
    for _ in range(draws):
        luck = generator.random(N)  # samples that break at one strength break at all stronger ones
        broken = {t: int((luck < rates(t)).sum()) for t in LIMIT_STRENGTHS}
        with _counting(broken):
            found = line_search(PROBLEM, PATCH, Gate.instance(), calibration=CALIBRATION, **how)
        if found.chosen is None:
            continue
        strengths.append(found.chosen)
        k, rate = broken[found.chosen], rates(found.chosen)
        missed += limit_after(k, N, found.selection, CONFIDENCE) < rate
        naive += upper_limit(k, N, CONFIDENCE) < rate
    return Trial(
        chosen,
        world,
        missed,
        naive,
        len(strengths),
        float(np.mean(strengths)) if strengths else 0.0,
    )


@contextmanager
def _counting(broken: dict[float, int]) -> Iterator[None]:
    """What a forward pass would count is what was drawn. Nothing known breaks, so that no strength
    is polished.
    """

    def flips(data: EvaluatedData, evaluator: Evaluator, state: State) -> Flips:
        k = broken[min(LIMIT_STRENGTHS, key=lambda t: abs(t - float(state["weight"])))]
        bad, none = torch.arange(N) < k, torch.zeros(N, dtype=torch.bool)
        return Flips(~bad, bad, none, none)

    def count(
        path: PatchPath, strength: float, state: State, after: SampleResults | None = None
    ) -> StrengthPoint:
        repaired, drawn = round(100 * strength), flips(CALIBRATION, path.problem.evaluator, state)
        return StrengthPoint(strength, repaired, FlipCounts(100, 0, repaired, 200), drawn.counts())

    with patch.object(PatchPath, "_count", count), patch.object(EvaluatedData, "flips", flips):
        yield


class Scale(nn.Module):
    """One weight, which is the strength itself: 0 at first, and 1 at the patch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.weight.expand(len(x), 1) * 0], 1)


def _problem() -> tuple[Problem, EvaluatedData]:
    evaluator = Evaluator(Scale())
    known = [
        TensorSource(
            torch.tensor([[1.0], [-1.0]]),
            torch.tensor([0, 0]),
            split="known",
            passed=True,
            failed=True,
        )
    ]
    aside = [TensorSource(torch.ones(N, 1), torch.zeros(N, dtype=torch.int64), split="calibration")]
    before = evaluator.run(known)
    space, _ = find_scope(nn.Linear(1, 2))
    parts = (space, ("weight",), NeuRecoverLite(), Fitness(), before.passed)
    return Problem(evaluator, known, before, *parts), EvaluatedData(aside, evaluator.run(aside))


PATCH = {"weight": torch.ones(1)}
PROBLEM, CALIBRATION = _problem()


def strengths() -> None:
    may = round((1 - CONFIDENCE) * DRAWS)
    print(
        "| the strength is | what breaks | taken | mean strength "
        f"| missed of {DRAWS:,} | its own limit missed |"
    )
    print("|---|---|---|---|---|---|")
    for t in trials():
        print(
            f"| {t.chosen} | {t.world} | {t.taken:,} | {t.strength:.2f} | {t.missed} | {t.naive} |"
        )
    most = next(k for k in range(DRAWS) if binomial_cdf(k, DRAWS, 1 - CONFIDENCE) >= 0.999)
    print(
        f"\nMay be missed: {may}. "
        f"What fails as often as it may stays within {most} in 999 of 1,000 studies."
    )
