"""A repair in small before training begins: what cannot work is to be found now, not after hours of training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from lightning_nrl._model.layers import find_scope
from lightning_nrl._scoring import record
from lightning_nrl._utils.preserve import preserve
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import EmptyLocalizationError, EvaluationError, OtherRankError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.pipeline.input_checks import check_task
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.reference.old_model import OldModel, Reference

__all__ = ["run_sanity_check"]


@torch.no_grad()
def run_sanity_check(
    evaluator: Evaluator,
    sources: Sequence[Source],
    settings: Settings,
    *,
    reference: Reference | None = None,
) -> None:
    """Evaluates a few samples and localises on some of them. The model is left as found.

    Raises what does not fit: the layer, the batches, the target, the task, the method or the reference.
    """
    model, task = evaluator.model, evaluator.task
    space, _ = find_scope(model, settings.layer, include_bias=settings.localizer.include_bias)
    with preserve(model):
        few, _ = settings.samples.columns().evaluate(evaluator, sources, settings.target)
        if reference is not None:
            # Without its cache, which is for all samples.
            asked = replace(reference, cache=None) if isinstance(reference, OldModel) else reference
            asked.answers(evaluator, sources, few)
        check_task(settings, few, task)
        first = sources[0]
        known = torch.arange(len(few)) < len(first.index)
        failed = known & (torch.arange(len(few)) % 2 == 0)
        batches = ((batch, few.rows(first.split, batch.position)) for batch in first)
        # What these few samples say of the weights does not matter yet, nor what is worth a warning.
        budget = settings.search.budget
        work = partial(record, evaluator, batches, space, known, budget=budget)
        ranks = evaluator.collective
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recording = ranks.all_or_none(work, "known data could not be recorded on another rank.")
                settings.localizer(recording, evaluator, failed=failed, passed=known & ~failed)
        except OtherRankError:
            raise
        except (EmptyLocalizationError, EvaluationError):
            return
