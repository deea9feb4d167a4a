"""Contents of a repair's log: numbers, figures, pictures of samples, tables and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from lightning_nrl._trainer.tracking.scalars import (
    Scalars,
    final_numbers,
    search_curves,
    strength_curves,
)
from lightning_nrl.report import RepairReport
from lightning_nrl.report.repair_plot import (
    SEARCH_TITLE,
    gallery_figures,
    reviewer_figures,
    summary_figure,
)
from lightning_nrl.report.sample_views import SampleView, by_flip

CARD = (4.2, 3.0)  # inches; small, so that text is large in loggers
UPLOADED = ("html", "markdown", "json", "patch", "predictions")
"""Kinds of files that loggers get. Each logger has its own rules for checkpoints."""

Figure: TypeAlias = Any
"""A figure of matplotlib, which may not be installed."""


@dataclass(frozen=True, eq=False)
class RepairLog:
    report: RepairReport
    step: int  # training step of the repair
    name: str = "repair"  # prefix of tags and sub-runs
    changes: Mapping[str, Tensor] = field(default_factory=dict)  # changes of whole tensors by name
    views: Sequence[SampleView] = ()
    hparams: Mapping[str, Any] = field(
        default_factory=dict
    )  # hyperparameters that the training logged

    @property
    def points(self) -> list[tuple[int, Scalars]]:
        """Pairs of a step and its numbers.

        A step is a search iteration, a strength in percent, or a training step.
        """
        search = enumerate(search_curves(self.report, self.name))
        strength = strength_curves(self.report, self.name).items()
        return [*search, *strength, (self.step, final_numbers(self.report, self.name))]

    @cached_property
    def drawn(self) -> bool:
        """True if figures can be drawn. Without matplotlib, all figures are missing."""
        return find_spec("matplotlib") is not None

    @cached_property
    def summary(self) -> Figure:
        return summary_figure(self.report)

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Figures by title, except the summary."""
        if not self.drawn:
            return {}
        figures = reviewer_figures(self.report, self.changes)
        for title, figure in figures.items():
            if title != SEARCH_TITLE:  # this figure has four panels
                figure.set_size_inches(*CARD)
        return figures

    @cached_property
    def galleries(self) -> dict[str, Figure]:
        """Figures of broken and of repaired samples with captions, by split."""
        return gallery_figures(self.views) if self.drawn else {}

    @cached_property
    def pictures(self) -> dict[str, list[SampleView]]:
        return by_flip([view for view in self.views if view.pixels is not None])

    @cached_property
    def texts(self) -> dict[str, list[SampleView]]:
        return by_flip([view for view in self.views if view.pixels is None])


def written(files: Mapping[str, str]) -> dict[str, Path]:
    """Returns paths by kind, of the existing files of the kinds in `UPLOADED`."""
    paths = {kind: Path(files[kind]) for kind in UPLOADED if kind in files}
    return {kind: path for kind, path in paths.items() if path.is_file()}


def next_free(folder: Path, pattern: str) -> Path:
    """Returns the first of `folder`, `folder-1`, ..., that holds no file of this pattern."""
    free, number = folder, 0
    while any(free.glob(pattern)):
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
