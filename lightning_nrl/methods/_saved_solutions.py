"""Solutions as pieces of work: what was found before a process was killed is not looked for again."""

from __future__ import annotations

from collections.abc import Callable

from lightning_nrl._optim.polish_result import PolishResult
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.localization import Localization
from lightning_nrl.problem import Problem, Proposal, Solution
from lightning_nrl.report.run_records import PricePoint, Rung, Step
from lightning_nrl.search import SearchHistory, SearchResult

__all__ = ["SOLUTION_KINDS", "found_once"]

SOLUTION_KINDS: tuple[type, ...] = (
    Solution,
    Proposal,
    PolishResult,
    SampleResults,
    TargetCounts,
    Step,
    Rung,
    PricePoint,
    Localization,
    SearchResult,
    SearchHistory,
)
"""The records in a solution."""


def found_once(problem: Problem, name: str, work: Callable[[], Solution]) -> Solution:
    """What work finds, or has found before the process was killed."""
    return problem.work.piece(name, lambda piece: work(), SOLUTION_KINDS)
