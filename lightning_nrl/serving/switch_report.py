"""What a switch repairs and breaks beside its two models, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.deserialize import Record
from lightning_nrl._utils.precision import Context
from lightning_nrl._utils.preserve import preserve
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.errors import ConfigurationError, check_kind, check_whole
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.metrics.rates import RATES
from lightning_nrl.report._formatting import percent
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Shown, Table
from lightning_nrl.serving.margin_switch import MarginSwitch, predicts
from lightning_nrl.tasks import Multiclass

__all__ = ["SwitchReport", "SwitchSplit", "Timing", "report_switch"]

SWITCH_RATES = (RATES["repair_rate"], RATES["break_rate"], RATES["negative_flip_rate"])


@dataclass(frozen=True)
class SwitchSplit:
    """What becomes of one split's samples from the old model to the `new` one and to the switch, by forward passes.

    Of the samples the new model answers so many (`served`).
    """

    split: str
    new: FlipCounts
    switch: FlipCounts
    served: int


@dataclass(frozen=True)
class Timing:
    """Seconds of a forward pass of the old model, the new one and the switch, each the median of several `runs`.

    One of each in turn, of a batch of so many samples, on a device such as `cpu` or `cuda:0`.
    """

    samples: int
    device: str
    runs: int
    old: float
    new: float
    switch: float

    @property
    def ratio(self) -> float:
        """How many times as long as the new model alone the switch takes."""
        return self.switch / self.new


@dataclass(frozen=True)
class SwitchReport(Record, Shown):
    """A switch with its threshold beside its two models. `rich.print(report)` shows it as tables."""

    threshold: float
    splits: tuple[SwitchSplit, ...]
    timing: Timing

    def to_table(self) -> Page:
        """The tables, for rich's `print`."""
        blocks: list[Block] = [Heading("Switch", 1)]
        for split in self.splits:
            blocks += [Heading(split.split), _table(split)]
        t = self.timing
        plural = "s" if t.samples != 1 else ""
        cost = (
            f"{1e3 * t.old:.3g} ms old, {1e3 * t.new:.3g} ms new, {1e3 * t.switch:.3g} ms switch: "
            f"{t.ratio:.2f} times the new model alone ({t.samples:,} sample{plural}, {t.device}, median of {t.runs})"
        )
        facts = (("threshold", f"{self.threshold:.6g}"), ("forward pass", cost))
        return Page((*blocks, Facts(facts)))


@torch.no_grad()
def report_switch(
    switch: MarginSwitch,
    sources: Sequence[Source],
    *,
    batch: Batch | None = None,
    runs: int = 20,
    context: Context = nullcontext,
) -> SwitchReport:
    """Counts what the new model and the switch repair and break, and times a forward pass of each.

    Every model makes a forward pass of its own, also the switch, so that the counts are those of what is deployed.

    Args:
        switch: the two models; it is left as it was found.
        sources: the splits, with batches on the models' device. Labels are as the new model numbers them.
        batch: what is timed; None: the first batch of the first split.
        runs: how often each is timed, from 1, after one run that is not.
        context: entered around every forward pass, such as autocast.

    Raises:
        ConfigurationError: there is no sample, or `runs` or what the models return cannot be used.
    """
    check_kind("switch", switch, isinstance(switch, MarginSwitch), "switch", "switch=MarginSwitch(old, new, threshold)")
    check_whole("runs", runs, 1)
    first = batch or next((batch for source in sources for batch in source), None)
    if first is None:
        raise ConfigurationError("`sources` hold no sample.", "give at least one split with samples.")
    with preserve(switch):
        splits = tuple(_count(switch, source, context) for source in sources)
        timing = _time(switch, first, runs, context)
    return SwitchReport(float(switch.threshold), splits, timing)


def _count(switch: MarginSwitch, source: Source, context: Context) -> SwitchSplit:
    columns: list[tuple[Tensor, ...]] = []
    for batch in source:
        labels = Multiclass().label(batch.target)
        with context():
            served = switch(*batch.args, **batch.kwargs)
            new = switch.new(*batch.args, **batch.kwargs)
            old = switch.mapped(switch.old(*batch.args, **batch.kwargs), new.shape[1])
            by_new = switch.is_served(old, new)
        columns.append((*(predicts(logits, labels) for logits in (old, new, served)), by_new))
    if not columns:
        return SwitchSplit(source.split, FlipCounts(0, 0, 0, 0), FlipCounts(0, 0, 0, 0), 0)
    was, now, served, by_new = (torch.cat(column).cpu() for column in zip(*columns, strict=True))
    return SwitchSplit(source.split, FlipCounts.of(was, now), FlipCounts.of(was, served), int(by_new.sum()))


def _time(switch: MarginSwitch, batch: Batch, runs: int, context: Context) -> Timing:
    device = switch.threshold.device
    seconds: tuple[list[float], ...] = ([], [], [])
    for _ in range(runs + 1):
        # In turn, so that a machine that becomes busy on the way slows down all of them.
        for model, spent in zip((switch.old, switch.new, switch), seconds, strict=True):
            with context():
                _wait(device)
                began = time.perf_counter()
                model(*batch.args, **batch.kwargs)
                _wait(device)
            spent.append(time.perf_counter() - began)
    return Timing(len(batch), str(device), runs, *(median(spent[1:]) for spent in seconds))


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _table(split: SwitchSplit) -> Table:
    n, after = split.new.n, (split.new, split.switch)

    def row(label: str, old: str, cells: Sequence[str], **style: Any) -> Row:
        return Row(label, (old, *cells), **style)

    def counted(label: str, name: str, **style: Any) -> Row:
        return row(label, "", [f"{getattr(counts, name):,}" for counts in after], **style)

    rows = [
        row("samples", f"{n:,}", [f"{n:,}"] * 2),
        row("right", f"{split.new.passed:,}", [f"{counts.right:,}" for counts in after]),
        row(
            "accuracy", percent(split.new.accuracy_before), [percent(c.accuracy_after) for c in after], ends_group=True
        ),
        counted("repaired (was wrong, now right)", "repaired", tone="gain"),
        counted("broken (was right, now wrong)", "broken", tone="harm"),
        counted("kept (right before and after)", "kept"),
        counted("failing (wrong before and after)", "failing", ends_group=True),
    ]
    rows += [row(rate.label, "", [percent(rate.of(counts)) for counts in after]) for rate in SWITCH_RATES]
    served = split.served / n if n else float("nan")
    rows.append(row("answered by the new model", "", ("", percent(served))))
    return Table((("old", ""), ("new", ""), ("switch", "")), tuple(rows))
