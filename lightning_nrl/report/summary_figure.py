"""The headline of a repair as one picture: the verdict, and what became of known and of unseen data."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from lightning_nrl.report._figures import INK, TONE_COLOURS, literal, new_figure
from lightning_nrl.report._formatting import count, percent
from lightning_nrl.report.run_records import RepairRecord
from lightning_nrl.report.splits import Role, by_role, pool

LABEL_WIDTH, COLUMN_WIDTH, ROW_HEIGHT = 2.1, 1.0, 0.3  # inches
HEAD_ROWS = 2.6
TARGET_CHARACTERS = 46
HARM_COLOUR, RULE_COLOUR, MUTED_COLOUR = TONE_COLOURS["warn"], "#CCCCCC", "#666666"


def summary_rows(report: RepairRecord) -> tuple[tuple[Role, ...], list[tuple[str, tuple[str, ...]]]]:
    """The roles of the data, and rows of a label and one cell a role: what a reviewer decides on.

    Of refused weights they say what these would have done to known data. In an update what broke is against the
    replaced model.
    """
    splits = report.candidate or report.splits
    pooled = {role: pool(own) for role, own in by_role(splits).items()}
    updates = {role: report.pooled_update(role) for role in pooled}
    judged = [split if (update := updates[role]) is None else update.now for role, split in pooled.items()]
    rows = [("samples", [count(split.n) for split in pooled.values()])]
    rows.append(("repaired in target (RR)", [_share(s.repaired_in_target, s.targeted) for s in pooled.values()]))
    rows.append(("repaired, all", [count(split.repaired) for split in pooled.values()]))
    rows.append(("broken (BR)", [_share(split.broken, split.passed) for split in pooled.values()]))
    if any(updates.values()):
        pairs = [(u.trained.broken, u.now.broken) if u else None for u in updates.values()]
        rows.append(("regressions", ["-" if pair is None else f"{pair[0]:,} -> {pair[1]:,}" for pair in pairs]))
    nfr = [split.rates["negative_flip_rate"] for split in judged]
    rows.append(("negative flip rate (NFR)", [percent(rate) for rate in nfr]))
    rows.append(("accuracy before", [percent(split.accuracy_before) for split in pooled.values()]))
    rows.append(("accuracy after", [percent(split.accuracy_after) for split in pooled.values()]))
    return tuple(pooled), [(label, tuple(cells)) for label, cells in rows]


def summary_figure(report: RepairRecord) -> Any:
    """The verdict above a table of `summary_rows`, as a `matplotlib.figure.Figure` that is legible when small.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    roles, rows = summary_rows(report)
    n_lines = len(rows) + HEAD_ROWS + 1
    width = LABEL_WIDTH + COLUMN_WIDTH * len(roles)
    figure = new_figure(width, ROW_HEIGHT * n_lines, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(n_lines, 0))
    verdict = report.status.capitalize() + (" (what it would do)" if report.candidate else "")
    axes.text(0.03, 0.95, verdict, color=TONE_COLOURS[report.tone], fontsize=15, weight="bold", va="center")
    about = shorten(f"{report.target}; gate {report.gate}", TARGET_CHARACTERS, placeholder=" ...")
    axes.text(0.03, 1.95, literal(about), color=MUTED_COLOUR, fontsize=9, va="center")
    ends = [0.97 - (len(roles) - 1 - i) * COLUMN_WIDTH / width for i in range(len(roles))]
    for role, x in zip(roles, ends, strict=True):
        axes.text(x, HEAD_ROWS + 0.45, role, color=MUTED_COLOUR, fontsize=10, ha="right", va="center")
    for i, (label, cells) in enumerate(rows):
        y = HEAD_ROWS + 1.45 + i
        axes.axhline(y - 0.5, 0.03, 0.97, color=RULE_COLOUR, linewidth=0.6)
        harmful = label.startswith(("broken", "regressions"))
        axes.text(0.03, y, label, color=INK, fontsize=10, va="center")
        for cell, x in zip(cells, ends, strict=True):
            harm = harmful and not cell.startswith(("0", "-")) and not cell.endswith("-> 0")
            colour = HARM_COLOUR if harm else INK
            axes.text(x, y, cell, color=colour, fontsize=10, weight="bold", ha="right", va="center")
    return figure


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" if whole else "-"
