"""Data that no search uses: calibration data, to choose the strength by, and unseen data, which are only counted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_nrl._utils.state import State
from lightning_nrl.data import Source
from lightning_nrl.errors import DataWarning, OtherRankError, TargetError
from lightning_nrl.evaluation import Evaluator, Flips, SampleResults
from lightning_nrl.pipeline.settings import Settings

__all__ = ["HeldOut", "evaluate_held_out"]


@dataclass(frozen=True)
class HeldOut:
    """Data that no search uses.

    Attributes:
        sources: this rank's share of them.
        before: what the original model does on them.
    """

    sources: Sequence[Source]
    before: SampleResults

    def flips(self, evaluator: Evaluator, state: State) -> Flips:
        """What becomes of their samples under other weights."""
        return Flips.between(self.before, evaluator.run_with(state, self.sources))


def evaluate_held_out(evaluator: Evaluator, sources: Sequence[Source], settings: Settings) -> SampleResults:
    """The results on data that no search uses.

    Which of their failures are in the target is for the report alone, so a target that cannot say so, for instance
    because these data lack a column, is a warning. Whatever else goes wrong is raised, on every rank if on one.

    Warns:
        DataWarning: the failures in the target are not marked.
    """
    try:
        return settings.samples.evaluate(evaluator, sources, settings.target, everywhere=True, known=False)[0]
    except Exception as error:
        # Where one rank fails, all come here; they try again only if all can.
        if evaluator.collective.any(not isinstance(error, (TargetError, OtherRankError))):
            raise
        problem = f"the target's failures are not counted on unseen data: {error}"
        warnings.warn(DataWarning(problem), stacklevel=3)
    return settings.samples.evaluate(evaluator, sources, known=False)[0]
