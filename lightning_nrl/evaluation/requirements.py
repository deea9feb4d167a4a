"""What a method needs of a task, found out before a method begins, and where it can be before training does."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Task

__all__ = ["Need", "check_needs"]

Need = Literal["margins", "classes", "recording"]
"""`recording`: batches that can be taken apart sample by sample, so that what the model computes can be recorded."""


def check_needs(
    needs: Collection[Need],
    results: SampleResults,
    task: Task,
    by: str = "`method='convex'`",
    hint: str = "use `method='linearized'` for one layer, or leave `method` at 'auto'.",
) -> None:
    """Refuses a task that does not have what a method needs.

    Args:
        needs: `margins`, with gradients; `classes`, one a sample, the right one that with the largest logit.
        results: of some samples at least.
        task: that they were judged by.
        by: what needs classes.
        hint: what to do where there are none.

    Raises:
        ConfigurationError: it lacks one.
    """
    name = type(task).__name__
    if "margins" in needs and len(results) and bool(results.margin.isnan().all()):
        raise ConfigurationError(
            f"`task`: {name} has no `margin`, so there is nothing that steps could improve.",
            "give it a `margin`, or repair with `method='swarm'`, which needs no gradients.",
        )
    if "classes" in needs and bool((results.label < 0).any()):
        raise ConfigurationError(f"{by} needs a class for each sample, the task {name} has none.", hint)
