"""Scoring of candidates: how many samples pass, and how large their losses are, for all candidates in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.collective import Collective
from lightning_nrl.scoring.recording import Chunk, Recording
from lightning_nrl.scoring.scores import Scorer, Scores
from lightning_nrl.scoring.slots import repeat_all
from lightning_nrl.scoring.sparse import make_changes
from lightning_nrl.sites import Site
from lightning_nrl.tasks import Task

__all__ = ["Outcome", "SwarmScorer", "make_scorer"]


@dataclass(frozen=True)
class Outcome:
    """What each candidate does on each of this rank's samples.

    Attributes:
        rows: rows of the samples in the evidence, `n` int64.
        passed: `P x n` bool.
        loss: `P x n`.
    """

    rows: Tensor
    passed: Tensor
    loss: Tensor


class SwarmScorer:
    """Scores candidates on a recording. See `make_scorer`."""

    def __init__(
        self,
        recording: Recording,
        where: Tensor,
        failed: Tensor,
        passed: Tensor,
        task: Task,
        *,
        collective: Collective,
        budget: int,
    ) -> None:
        self.recording = recording
        self.task = task
        self.collective = collective
        self.budget = budget
        self.where = where
        self.changes = make_changes(recording.subject.space, where)
        self.failed, self.passed = failed.cpu(), passed.cpu()
        counts = torch.tensor([int(m[recording.rows].sum()) for m in (self.failed, self.passed)])
        self.n_failed, self.n_passed = (int(c) for c in collective.sum(counts))

    @torch.no_grad()
    def __call__(self, values: Tensor) -> Scores:
        """Scores candidates, `S x P x K`, on all ranks' samples."""
        s, p, k = values.shape
        device = self.recording.subject.space.device
        values = values.reshape(s * p, k).to(device)
        precise = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(4, s * p, device=device, dtype=precise)
        for chunk, part, passes, loss in self._blocks(values):
            for i, mask in enumerate((self.failed, self.passed)):
                inside = mask[chunk.rows].to(device)
                sums[i, part] += (passes & inside).sum(1)
                sums[2 + i, part] += torch.where(inside, loss, 0.0).sum(1, dtype=precise)
        patched, intact, loss_failed, loss_passed = self.collective.sum(sums).view(4, s, p)
        return Scores(
            patched.float(),
            intact.float(),
            (loss_failed / max(self.n_failed, 1)).to(torch.promote_types(values.dtype, torch.float32)),
            (loss_passed / max(self.n_passed, 1)).to(torch.promote_types(values.dtype, torch.float32)),
            self.n_failed,
            self.n_passed,
        )

    @torch.no_grad()
    def outcome(self, values: Tensor) -> Outcome:
        """What each candidate, `P x K`, does on each of this rank's samples."""
        wanted = (self.failed | self.passed)[self.recording.rows]
        rows = self.recording.rows[wanted]
        place = torch.full((len(self.failed),), -1)
        place[rows] = torch.arange(len(rows))
        passed = torch.zeros(len(values), len(rows), dtype=torch.bool)
        loss = torch.zeros(len(values), len(rows), dtype=torch.float64)
        for chunk, part, passes, losses in self._blocks(values.to(self.recording.subject.space.device)):
            passed[part, place[chunk.rows]] = passes.cpu()
            loss[part, place[chunk.rows]] = losses.cpu().double()
        return Outcome(rows, passed, loss)

    def _blocks(self, values: Tensor) -> Iterator[tuple[Chunk, slice, Tensor, Tensor]]:
        """Passes and losses, `p x n`, of blocks of candidates and samples."""
        row_bytes = 64 << 10
        rows = max(1, min(self.budget // row_bytes, 4096))
        p = min(len(values), rows)
        for chunk in self.recording.chunks(max(1, rows // p), self.failed | self.passed):
            for start in range(0, len(values), p):
                part = slice(start, min(start + p, len(values)))
                logits = self._logits(chunk, values[part])
                copies = part.stop - part.start
                target = repeat_all(chunk.target, copies)
                passes, loss = self.task.passed(logits, target), self.task.loss(logits, target)
                yield chunk, part, passes.view(copies, -1), loss.view(copies, -1)

    def _logits(self, chunk: Chunk, values: Tensor) -> Tensor:
        if not self.recording.replayable(chunk):
            return self.recording.rerun(chunk, self.where, values)
        changes = {id(change.site): change for change in self.changes}
        copies = 1

        def edit(site: Site, x: Tensor, y: Tensor) -> Tensor:
            nonlocal copies
            before, copies = copies, len(values)
            return changes[id(site)].output(values, x, y, before)

        return self.recording.replay(chunk, edit, copies=len(values))


def make_scorer(
    recording: Recording,
    where: Tensor,
    failed: Tensor,
    passed: Tensor,
    task: Task,
    *,
    collective: Collective | None = None,
    budget: int | None = None,
) -> Scorer:
    """Prepares the scoring of candidates.

    Args:
        recording: the known data of this rank.
        where: `K` int64, flat positions of the localised weights.
        failed: `N` bool by row of the evidence, I_neg.
        passed: `N` bool by row of the evidence, I_pos.
        task: says what passed and loss mean.
        collective: the ranks that share the work.
        budget: bytes that scoring may take on the device; by default a share of what is free.

    Returns:
        A scorer of candidates, with `outcome` for a look at single samples.
    """
    return SwarmScorer(
        recording, where, failed, passed, task, collective=collective or Collective(), budget=budget or (1 << 28)
    )
