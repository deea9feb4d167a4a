"""`DataCallback`, the base class of callbacks that read data of a Trainer."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_nrl._trainer.lightning.packages import CallbackBase, LightningModule, Trainer
from lightning_nrl._trainer.lightning.private_parts import Loaders
from lightning_nrl._trainer.reading.loaders import LoaderSource, make_source, parse_adapter
from lightning_nrl._trainer.steps.prediction import open_sources
from lightning_nrl._trainer.trainer_checks import check_packages, check_strategy
from lightning_nrl._utils.preserve import random_state
from lightning_nrl.data import Adapter
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Task
from lightning_nrl.tasks.custom import task_of_output


class DataCallback(CallbackBase):
    """Callback that reads batches by an adapter and judges outputs by a task.

    In its `stages`, each rank needs all weights; `only_evaluates` is as in `check_strategy`.
    """

    stages: tuple[str, ...] = ("fit",)
    only_evaluates = False
    hint = "train with a single device or with ddp."

    def __init__(
        self, task: str | Task | None, adapter: str | Adapter | None, output: int | str | None
    ) -> None:
        super().__init__()
        self.task = task_of_output(task, output)
        self.adapter = parse_adapter(adapter)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_packages(trainer)
        if stage in self.stages:
            reason = "which are needed whole"
            check_strategy(trainer, reason, self.hint, only_evaluates=self.only_evaluates)

    def open_loaders(
        self,
        trainer: Trainer,
        model: LightningModule,
        loaders: Iterable[tuple[Loaders, str, int | None]],
        *,
        seed: int = 0,
        streams: bool = False,
    ) -> tuple[Evaluator, list[LoaderSource]]:
        """Returns an evaluator, and a source for each loader with its split and batch limit."""
        with random_state():
            sources = [
                make_source(
                    loader,
                    split,
                    trainer=trainer,
                    model=model,
                    adapter=self.adapter,
                    seed=seed,
                    limit=limit,
                    streams=streams,
                )
                for loader, split, limit in loaders
            ]
            evaluator, (opened,) = open_sources(trainer, model, self.task, sources)
        return evaluator, opened
