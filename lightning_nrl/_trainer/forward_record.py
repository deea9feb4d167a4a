"""Right or wrong and the loss of each sample, from the forward passes that a trainer makes anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._lightning import LightningModule, Trainer, validating
from lightning_nrl._trainer.loaders import length_of
from lightning_nrl._trainer.output_capture import Call, OutputCapture, Probe, is_same
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve
from lightning_nrl.data.batch import Adapter
from lightning_nrl.data.model_call import ModelCall
from lightning_nrl.data.unpacking import bind_adapter
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
        self._positions: list[Tensor] = []
        self._visits: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._positions)

    def add(self, positions: Tensor, logits: Tensor, target: Any) -> None:
        """One batch: `n` positions in the data set on the CPU, its logits and its truth. Nothing waits for a device."""
        self._visits.append(torch.full_like(positions, len(self._visits)))
        self._positions.append(positions)
        self._held.append((logits.detach(), target))
        self._numbers += logits.numel() + (target.numel() if isinstance(target, Tensor) else 0)
        if self._numbers > HELD_NUMBERS:
            self.judge()

    def point(self, collective: Collective, taken: str) -> SplitPoint:
        """All samples of the split over all ranks, each once, and begins anew. To be called by all ranks."""
        self.judge()
        none = {"passed": torch.bool, "loss": torch.float16, "label": torch.int64}
        mine = {
            name: torch.cat(rows).cpu() if rows else torch.zeros(0, dtype=none[name])
            for name, rows in self._judged.items()
        }
        empty = torch.zeros(0, dtype=torch.int64)
        when = torch.cat([empty, *self._visits]) * collective.world_size + collective.rank
        mine |= {"when": when, "position": torch.cat([empty, *self._positions])}
        rows = {name: torch.cat(collective.gather(column)) for name, column in mine.items()}
        self._begin_anew()
        usable = torch.isin(rows["position"], self.index) & (rows["label"] >= -1)
        rows = {name: column[usable] for name, column in rows.items()}
        order = rows["when"].argsort(descending=True)
        _, first = np.unique(rows["position"][order].numpy(), return_index=True)
        last = order[torch.from_numpy(first)]
        place = torch.searchsorted(self.index, rows["position"][last])
        n = len(self.index)
        point = SplitPoint(
            index=self.index,
            label=torch.full((n,), -1),
            passed=torch.zeros(n, dtype=torch.bool),
            loss=torch.full((n,), torch.nan, dtype=torch.float16),
            known=torch.zeros(n, dtype=torch.bool),
            taken=taken,
        )
        for name in ("label", "passed", "loss"):
            getattr(point, name)[place] = rows[name][last]
        point.known[place] = True
        return point

    def _begin_anew(self) -> None:
        self._held, self._numbers, self._positions, self._visits = [], 0, [], []
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
        self._outputs = OutputCapture()

    def attach(self, model: LightningModule) -> None:
        """Before the module may be compiled."""
        self._outputs.attach(model)

    def detach(self) -> None:
        """Listens no more."""
        self._outputs.detach()
        self._adapter, self._checked = None, False

    def begin(self, trainer: Trainer, model: LightningModule, batch: Any) -> str:
        """A batch begins; gives why outputs cannot be taken, in words, empty where they can. The first runs once."""
        if self._adapter is None:
            self._adapter = bind_adapter(self._given, model)
            try:
                args, kwargs, _ = self._adapter(batch)
            except Exception as error:
                return f"the adapter cannot read the batches of the loop ({type(error).__name__})"
            if args and isinstance(args[0], ModelCall):
                return "the adapter runs the model itself"
            probe = Probe(model)
            with preserve(model), trainer.precision_plugin.forward_context(), validating(trainer), torch.no_grad():
                _look(probe, args, kwargs)
            self._outputs.attach(model, probe.parts or ())
        self._outputs.begin()
        return ""

    def end(self, trainer: Trainer, model: LightningModule, batch: Any, positions: Tensor, tally: SampleTally) -> str:
        """A batch ends; gives why its outputs could not be taken, in words, empty where they are in the tally."""
        assert self._adapter is not None
        # As under `ddp`, where the step runs inside of a call.
        name, calls = self._outputs.calls(redirected=trainer.strategy.model is not model)
        args, kwargs, target = self._adapter(batch)
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
