"""The splits of a training's record: which can be recorded, and a pass over them that leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_nrl._lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._lightning.private_parts import batch_limit, validating
from lightning_nrl._trainer.data_splits import SplitLoaders
from lightning_nrl._trainer.loaders import check_loader, make_source, sample_index
from lightning_nrl._trainer.trainer_state import make_evaluator
from lightning_nrl._utils.preserve import preserve, random_state
from lightning_nrl.data.batch import Adapter
from lightning_nrl.errors import ConfigurationError, DataWarning
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Task


def find_splits(splits: tuple[str, ...], loaders: SplitLoaders) -> tuple[str, ...]:
    """Returns the splits to be recorded; `auto`: training and validation data that can be."""
    if splits != ("auto",):
        for split in splits:
            sample_index(check_loader(loaders.get(split), split))
        return splits
    found: list[str] = []
    for name in ("train", "val"):
        given = loaders.get(name)
        several = len(given) if isinstance(given, (list, tuple)) else 1
        for split in [name] if several == 1 else [f"{name}:{i}" for i in range(several)]:
            if given is not None:
                try:
                    sample_index(check_loader(loaders.get(split), split))
                    found.append(split)
                except ConfigurationError as error:
                    problem, _, hint = str(error).partition("\nHINT: ")
                    rank_zero_warn(DataWarning(f"`TrainingHistory` does not record {problem}", hint))
    if not found:
        hint = "name data that can be read by index: `splits='repair'`."
        raise ConfigurationError("`splits='auto'`: no training or validation data can be recorded.", hint)
    return tuple(found)


def run_splits(
    splits: Sequence[str], trainer: Trainer, model: LightningModule, task: Task, adapter: Adapter
) -> SampleResults:
    """Evaluates the model on all samples of some splits; modes and random states stay as found."""
    limit = batch_limit(trainer)
    with random_state(), validating(trainer), torch.no_grad(), preserve(model):
        model.eval()
        loaders = SplitLoaders(trainer, model)
        how: dict[str, Any] = {"trainer": trainer, "model": model, "adapter": adapter, "limit": limit}
        sources = [make_source(loaders.get(split), split, **how) for split in splits]
        return make_evaluator(trainer, model, task).run(sources)
