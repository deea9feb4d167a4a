"""A repair on two ranks, one of which runs out of memory in a stage, for `test_starved_rank.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import Collective
from torch import Tensor, nn
from toy_problems import same, shares, snapshot
from toy_repairs import known, quick, trained, unseen

from lightning_nrl import ParticleSwarm, repair_module
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.methods import FineTunePolish
from lightning_nrl.tasks import Multiclass

TRAINED = ("fit", "polish")
"""Stages of a method that makes steps; the others are those of a swarm."""


class Stages:
    """An observer that knows which stage it is."""

    now = "begin"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer, self.now = self.now, name
        try:
            yield
        finally:
            self.now = outer

    def search(self, *args: Any) -> None:
        pass

    def expect(self, *args: Any) -> None:
        pass

    def announce(self, text: str) -> None:
        pass


class Starved(Multiclass):
    """Multiclass on a rank without memory in one stage, once it has got that far.

    In a polish there is memory to count samples, and none for steps.
    """

    def __init__(self, stages: Stages, stage: str) -> None:
        self.stages, self.stage = stages, stage

    def logits(self, output: Tensor) -> Tensor:
        if self.stages.now == self.stage and (self.stage != "polish" or output.requires_grad):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().logits(output)


class StarvedSwarm(ParticleSwarm):
    """A swarm on a rank without memory for its candidates."""

    def ask(self, *args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def one(stage: str, collective: Collective, model: nn.Module) -> dict[str, Any]:
    """What becomes of a repair in which the second rank has no memory in a stage."""
    watch, before, began, said = Stages(), snapshot(model), time.monotonic(), ""
    is_starved = collective.rank == 1
    swarm = StarvedSwarm if is_starved and stage == "search" else ParticleSwarm
    try:
        repair_module(
            Evaluator(model, Starved(watch, stage if is_starved else ""), collective=collective),
            shares(known(), collective.rank, 2),
            quick(
                method=FineTunePolish() if stage in TRAINED else swarm(particles=6, iterations=4),
                # Of the last layer the first pass records what a localisation needs.
                layer="0" if stage == "localize" else "auto",
            ),
            unseen=shares(unseen(), collective.rank, 2),
            observer=watch,
        )
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {
        "said": said,
        "seconds": time.monotonic() - began,
        "same": same(before, snapshot(model)),
    }


def outcomes(folder: Path, stages: Sequence[str], ports: Sequence[int]) -> None:
    """By a rank of two: one repair for each stage, in a process group of its own, which the rank
    leaves at its end.
    """
    model, found = trained(), {}
    for stage, port in zip(stages, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        dist.init_process_group("gloo", timeout=timedelta(seconds=100))
        found[stage] = one(stage, Collective.current(torch.device("cpu")), model)
        dist.destroy_process_group()
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
