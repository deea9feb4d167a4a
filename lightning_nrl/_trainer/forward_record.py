"""Right or wrong and the loss of each sample, from the forward passes that a trainer makes anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._lightning import LightningModule, Trainer, validating
from lightning_nrl._trainer.batch_order import Positions
from lightning_nrl._trainer.loaders import length_of
from lightning_nrl._trainer.output_capture import Call, OutputCapture, Probe, is_same
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve
from lightning_nrl.data.adapters import bind_adapter, unpack
from lightning_nrl.data.batch import Adapter, ModelCall, Unpacked
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.localization.training_record import SplitPoint
from lightning_nrl.tasks import Task

__all__ = ["ForwardRecorder", "SampleTally"]

HELD_NUMBERS = 2**20
"""Logits and targets that are held before they are judged: in many small batches that saves time, 4 MiB of memory."""


class SampleTally:
    """What a split's samples did in some forward passes; of a sample that came several times, the last time."""

    def __init__(self, task: Task, index: Tensor) -> None:
        self.task = task
        self.index = index
        self._held: list[tuple[Tensor, Any]] = []
        self._numbers = 0
        self._judged: dict[str, list[Tensor]] = {"passed": [], "loss": [], "label": []}
        self._positions: list[Positions] = []

    def add(self, positions: Positions, logits: Tensor, target: Any) -> None:
        """One batch: `n` positions in the data set, its logits and its truth. Nothing waits for a device.

        Of the logits there is a copy: a module may write into the same memory again for the next batch.
        """
        self._positions.append(positions)
        self._held.append((logits.detach().clone(), target))
        self._numbers += logits.numel() + (target.numel() if isinstance(target, Tensor) else 0)
        if self._numbers > HELD_NUMBERS:
            self.judge()

    def point(self, ranks: Collective, taken: str) -> SplitPoint:
        """All samples of the split over all ranks, each once, and begins anew. To be called by all ranks."""
        self.judge()
        none = {"passed": torch.bool, "loss": torch.float16, "label": torch.int64}
        mine = {
            name: torch.cat(rows).cpu() if rows else torch.zeros(0, dtype=none[name])
            for name, rows in self._judged.items()
        }
        position = np.concatenate([np.zeros(0, np.int64), *self._positions])
        number = np.repeat(np.arange(len(self._positions)), [len(one) for one in self._positions])
        mine["position"] = torch.from_numpy(position)
        mine["when"] = torch.from_numpy(number * ranks.world_size + ranks.rank)
        rows = {name: torch.cat(ranks.gather(column)) for name, column in mine.items()}
        self._begin_anew()
        n = len(self.index)
        place = torch.searchsorted(self.index, rows["position"]).clamp_max(n - 1)
        usable = (self.index[place] == rows["position"]) & (rows["label"] >= -1)
        order = rows["when"].argsort(stable=True)
        order = order[usable[order]]
        last = np.full(n, -1)
        last[place[order].numpy()] = order.numpy()  # of places that are there twice the last one stays
        row = torch.from_numpy(last)
        known = row >= 0
        found = {
            name: rows[name][row.clamp_min(0)] if len(order) else torch.zeros(n, dtype=none[name]) for name in none
        }
        return SplitPoint(
            index=self.index,
            label=found["label"].masked_fill(~known, -1),
            passed=found["passed"] & known,
            loss=found["loss"].masked_fill(~known, torch.nan),
            known=known,
            taken=taken,
        )

    def _begin_anew(self) -> None:
        self._held, self._numbers, self._positions = [], 0, []
        self._judged = {name: [] for name in self._judged}

    @torch.no_grad()
    def judge(self) -> None:
        """Judges what is held."""
        for logits, target in _joined(self._held):
            label = self.task.label(target)
            plain = label is not None and isinstance(target, Tensor) and target.shape == label.shape
            # What a loss ignores has no class; it is left out later.
            usable = target.clamp_min(0) if plain and not target.is_floating_point() else target
            passed, loss = self.task.passed_and_loss(logits, usable)
            assert loss is not None
            self._judged["passed"].append(passed & loss.isfinite())
            self._judged["loss"].append(loss.to(torch.float16))
            if label is None:
                label = torch.full_like(passed, -1, dtype=torch.int64)
            else:
                label = torch.where(label < 0, -2, label.long())
            self._judged["label"].append(label)
        self._held, self._numbers = [], 0


class ForwardRecorder:
    """Listens to a module while its trainer trains and validates it, and finds the outputs of whole batches."""

    def __init__(self, task: Task, adapter: Adapter) -> None:
        self.task = task
        self._given = adapter
        self._adapter: Adapter | None = None
        self._checked = False
        self._plain = 0  # how many parts plain batches `(x, y, *extras)` have; 0: they are not plain
        self._outputs = OutputCapture()

    def attach(self, model: LightningModule) -> None:
        """Before the module may be compiled."""
        self._outputs.attach(model)

    def detach(self) -> None:
        """Listens no more."""
        self._outputs.detach()
        self._adapter, self._checked, self._plain = None, False, 0

    def begin(self, trainer: Trainer, model: LightningModule, batch: Any) -> str:
        """A batch begins; gives why outputs cannot be taken, in words, empty where they can. The first runs once."""
        if self._adapter is None:
            self._adapter = bind_adapter(self._given, model)
            try:
                args, kwargs, target = self._adapter(batch)
            except Exception as error:
                return f"the adapter cannot read the batches of the loop ({type(error).__name__})"
            if args and isinstance(args[0], ModelCall):
                return "the adapter runs the model itself"
            plain = self._given is unpack and _is_plain(batch) and target is batch[1] and is_same(args, batch[:1])
            self._plain = len(batch) if plain else 0
            probe = Probe(model)
            with preserve(model), trainer.precision_plugin.forward_context(), validating(trainer), torch.no_grad():
                _look(probe, args, kwargs)
            self._outputs.attach(model, probe.parts or ())
        self._outputs.begin()
        return ""

    def _taken_apart(self, batch: Any) -> Unpacked:
        """What the adapter gives, which is known of plain batches and takes time in small models."""
        if self._plain and _is_plain(batch) and len(batch) == self._plain:
            return (batch[0],), {}, batch[1]
        assert self._adapter is not None
        return self._adapter(batch)

    def end(
        self, trainer: Trainer, model: LightningModule, batch: Any, positions: Positions, tally: SampleTally
    ) -> str:
        """A batch ends; gives why its outputs could not be taken, in words, empty where they are in the tally."""
        # As under `ddp`, where the step runs inside of a call.
        name, calls = self._outputs.calls(redirected=trainer.strategy.model is not model)
        args, kwargs, target = self._taken_apart(batch)
        n = length_of(target)
        if n != len(positions):
            return f"a batch of {len(positions)} samples came with {n} targets"
        logits = _output_of(calls, args, kwargs, n, self.task)
        if logits is None:
            called = f"`self.{name}`" if name else "the model"
            return f"the step does not call {called} once on a whole batch"
        tally.add(positions, logits, target)
        if not self._checked:
            self._checked = True
            try:
                self.task.check(logits, target)
                tally.judge()
            except Exception as error:
                return f"the task cannot judge them ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        return ""


def _is_plain(batch: Any) -> bool:
    """Whether a batch is `(x, y, *extras)` of tensors."""
    return type(batch) in (list, tuple) and len(batch) > 1 and all(isinstance(one, Tensor) for one in batch)


def _look(probe: Probe, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    with suppress(Exception):  # the step itself will say it
        probe(*args, **kwargs)


def _output_of(
    calls: Sequence[Call], args: Sequence[Any], kwargs: Mapping[str, Any], n: int, task: Task
) -> Tensor | None:
    """The logits of the first call on the very batch, else of the only call on so many samples; None: there is none."""
    found = []
    for given, named, output in calls:
        with suppress(ConfigurationError):
            logits = task.logits(output)
            if logits.ndim and len(logits) == n:
                if is_same(given, args) and is_same(named, kwargs):
                    return logits
                found.append(logits)
    return found[0] if len(found) == 1 else None


def _joined(held: Sequence[tuple[Tensor, Any]]) -> list[tuple[Tensor, Any]]:
    """Batches side by side, where they are of one kind."""
    if len(held) < 2:
        return list(held)
    forms = {
        (logits.shape[1:], logits.dtype, target.shape[1:], target.dtype) if isinstance(target, Tensor) else None
        for logits, target in held
    }
    if len(forms) > 1 or None in forms:
        return list(held)
    return [(torch.cat([logits for logits, _ in held]), torch.cat([target for _, target in held]))]
