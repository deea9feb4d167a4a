"""Draws the figures of the docs that show an idea.

python docs/figures/draw.py

They are SVG: sharp in print, and drawn without a plotting library.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from lightning_nrl.evaluation.stats import Bound

HERE = Path(__file__).parent
INK, FAINT, RIGHT, WRONG, REPAIRED, BROKEN = (
    "#222",
    "#8a8a8a",
    "#b9c4bd",
    "#c62828",
    "#00796b",
    "#e65100",
)


def text(
    x: float,
    y: float,
    words: str,
    size: float = 14,
    anchor: str = "middle",
    color: str = INK,
    **more: str,
) -> str:
    """One line of text."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{color}"'
    return f"<text {place}{extra}>{escape(words)}</text>"


def cross(x: float, y: float, color: str, arm: float = 5) -> str:
    """A wrong sample."""
    path = (
        f"M{x - arm:g} {y - arm:g}l{2 * arm:g} {2 * arm:g}m0 {-2 * arm:g}l{-2 * arm:g} {2 * arm:g}"
    )
    return f'<path d="{path}" stroke="{color}" stroke-width="3" fill="none"/>'


def dot(x: float, y: float, color: str) -> str:
    """A right sample."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{color}"/>'


def box(
    x: float, y: float, width: float, height: float, fill: str = "#fff", edge: str = FAINT
) -> str:
    """A rounded box."""
    area = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {area} rx="8" fill="{fill}" stroke="{edge}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head."""
    line = f"M{x1:g} {y1:g}L{x2:g} {y2:g}"
    return f'<path d="{line}" stroke="{FAINT}" stroke-width="2" marker-end="url(#head)"/>'


def picture(width: int, height: int, title: str, *parts: str) -> str:
    """The file."""
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5"'
        ' markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{FAINT}"/></marker>'
    )
    frame = f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    font = ' font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">'
    inside = "\n".join(part for part in parts)
    opening = f"{start}{font}<title>{escape(title)}</title>"
    return f"{opening}\n<defs>{head}</defs>{frame}\n{inside}\n</svg>\n"


def problem() -> str:
    """Draws the effect of retraining and of a repair."""
    failures = {(9, 1), (10, 1), (9, 2), (10, 2), (11, 2), (10, 3), (11, 3), (9, 3)}
    broken = {(2, 4), (5, 0), (6, 5)}
    heads = (
        ("the model in use", "8 failures of one kind", set(), set()),
        ("retrained", "8 repaired, 3 broken", failures, broken),
        ("repaired", "8 repaired, 0 broken", failures, set()),
    )
    parts = []
    for place, (title, counts, fixed, lost) in enumerate(heads):
        left = 30 + 300 * place
        parts += [text(left + 120, 34, title, 17, font_weight="600"), box(left, 50, 240, 138)]
        for column in range(12):
            for row in range(6):
                x, y = left + 20 + 18.2 * column, 66 + 21 * row
                at = (column, row)
                if at in failures and at not in fixed:
                    parts.append(cross(x, y, WRONG))
                elif at in lost:
                    parts.append(cross(x, y, BROKEN))
                else:
                    parts.append(dot(x, y, REPAIRED if at in fixed else RIGHT))
        parts.append(text(left + 120, 212, counts, 15, color=BROKEN if lost else INK))
        if place == 1:
            parts.append(arrow(left - 54, 119, left - 8, 119))
        elif place:
            parts.append(text(left - 30, 124, "or", 17, color=FAINT))
    legend = (
        (dot, RIGHT, "right"),
        (cross, WRONG, "wrong"),
        (dot, REPAIRED, "repaired"),
        (cross, BROKEN, "broken"),
    )
    for place, (mark, color, word) in enumerate(legend):
        parts += [
            mark(262 + 118 * place, 244, color),
            text(275 + 118 * place, 249, word, 14, "start", FAINT),
        ]
    title = "Retraining repairs failures and breaks other samples; a repair breaks no known sample"
    return picture(900, 266, title, *parts)


def flow() -> str:
    """A repair from data to verdict."""
    steps = (
        ("evaluate", "the model, on all", "known samples"),
        ("localise", "weights that matter", "for the failures only"),
        ("search", "new values for them", "that break nothing"),
        ("judge", "the real model,", "counted once more"),
    )
    parts = []
    for place, (title, *lines) in enumerate(steps):
        left = 20 + 222 * place
        parts += [box(left, 24, 174, 96), text(left + 87, 52, title, 17, font_weight="600")]
        parts += [
            text(left + 87, 78 + 20 * row, line, 13.5, color="#555")
            for row, line in enumerate(lines)
        ]
        if place:
            parts.append(arrow(left - 44, 72, left - 6, 72))
    left = 20 + 222 * 3 + 87
    parts += [arrow(left - 40, 124, left - 250, 160), arrow(left + 10, 124, left + 10, 158)]
    parts += [
        box(left - 560, 150, 306, 54, "#e0f2f1", REPAIRED),
        text(left - 407, 182, "accepted: weights change, once", 15),
    ]
    parts += [
        box(left - 166, 164, 250, 54, "#fbe9e7", BROKEN),
        text(left - 41, 196, "refused: nothing changes", 15),
    ]
    return picture(
        900,
        236,
        "Evaluate, localise, search, judge; then the weights change once, or not at all",
        *parts,
    )


def climb() -> str:
    """Draws the rungs of the default, each from where the last one stands."""
    rungs = (
        ("search", "a swarm, few weights", "left if time is short"),
        ("training", "rounds, then a polish", "from the old weights"),
        ("exact", "the last layer alone", "by a programme"),
        ("push", "small steps", "on what is left"),
    )
    parts = []
    for place, (title, *lines) in enumerate(rungs):
        left, top = 20 + 222 * place, 190 - 50 * place
        fill, edge = ("#f5f5f5", FAINT) if place == 0 else ("#e0f2f1", REPAIRED)
        parts += [
            box(left, top, 180, 96, fill, edge),
            text(left + 90, top + 28, title, 17, font_weight="600"),
        ]
        parts += [
            text(left + 90, top + 54 + 20 * row, line, 13.5, color="#555")
            for row, line in enumerate(lines)
        ]
        if place > 1:
            parts.append(arrow(left - 40, top + 82, left - 6, top + 48))
    parts += [
        text(96, 318, "the old weights", 14, "start", FAINT),
        arrow(110, 304, 110, 290),
        arrow(206, 312, 318, 242),
        text(470, 262, "A rung is kept only if the samples that it does not use", 14, "start"),
        text(470, 284, "lose no more than they gain.", 14, "start"),
    ]
    title = "Training, exact and push climb on top of each other; search stands beside them"
    return picture(890, 326, title, *parts)


def choose() -> str:
    """Which method for what."""
    rows = (
        (
            "you have retrained, and something broke",
            'reference="old.ckpt"',
            "the regressions of the update come back",
        ),
        (
            "you know nothing special",
            "nothing: the default",
            "a ladder from the least change to the most",
        ),
        (
            "it must take seconds, and change little",
            'method="convex"',
            "the last Linear layer, solved exactly",
        ),
        (
            "only one inner layer may change",
            'layer="encoder.4"',
            "that layer, searched and then trained",
        ),
        (
            "as many repairs as possible",
            'method="finetune-polish"',
            "the whole network: training, then polish",
        ),
        (
            "right has no gradient (a rule of yours)",
            'method="swarm"',
            "the paper's search; needs no gradient",
        ),
    )
    parts = []
    for place, (situation, say, what) in enumerate(rows):
        y = 16 + 50 * place
        parts += [
            box(16, y, 318, 40, "#f5f5f5"),
            text(28, y + 25, situation, 14, "start"),
            arrow(336, y + 20, 368, y + 20),
        ]
        parts += [box(372, y, 222, 40, "#e0f2f1", REPAIRED)]
        parts += [
            text(483, y + 25, say, 13.5, font_family="ui-monospace, Menlo, Consolas, monospace")
        ]
        parts += [text(608, y + 25, what, 13.5, "start", "#555")]
    return picture(910, 320, "Which method suits which situation", *parts)


def limits() -> str:
    """Draws the limit on unseen regressions by the number of samples."""
    sizes = (50, 100, 200, 300, 500, 1000, 2000, 3000)
    left, bottom, width, height, top = 74, 270, 560, 220, 0.08

    def place(order: int, rate: float) -> tuple[float, float]:
        return left + width * order / (len(sizes) - 1), bottom - height * min(rate, top) / top

    parts = [
        text(
            left,
            28,
            "with 95 % confidence at most this share of such samples breaks",
            14,
            "start",
            "#555",
        )
    ]
    for rate in (0, 0.02, 0.04, 0.06, 0.08):
        y = place(0, rate)[1]
        parts.append(f'<path d="M{left} {y:g}h{width}" stroke="#e0e0e0"/>')
        parts.append(text(left - 10, y + 5, f"{rate:.0%}".replace("%", " %"), 13, "end", FAINT))
    for order, size in enumerate(sizes):
        parts.append(text(place(order, 0)[0], bottom + 22, f"{size:,}", 13, color=FAINT))
    parts.append(
        text(
            left + width / 2,
            bottom + 46,
            "samples that were right, and that nothing has looked at",
            14,
            color="#555",
        )
    )
    for broken, color in ((0, REPAIRED), (1, "#5c6bc0"), (3, BROKEN)):
        points = [place(order, Bound.of(broken, size).upper) for order, size in enumerate(sizes)]
        points = [
            point
            for point, size in zip(points, sizes, strict=True)
            if Bound.of(broken, size).upper <= top
        ]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="{path}" stroke="{color}" stroke-width="3" fill="none"/>')
        y = 70 + 24 * (0, 1, 3).index(broken)
        parts += [
            f'<path d="M420 {y}h30" stroke="{color}" stroke-width="3"/>',
            text(460, y + 5, f"{broken} broke", 14, "start"),
        ]
    return picture(
        670, 336, "The limit on the rate of regressions falls as more samples are counted", *parts
    )


def defaults() -> str:
    """Draws unseen samples that fine-tuning and the default repair and break, from the study."""
    table = (HERE.parents[1] / "examples" / "studies" / "results" / "defaults.md").read_text(
        encoding="utf-8"
    )
    found = re.findall(
        r"^\| (\w.*), (fine-tuning|default) \|(?:[^|]*\|){2} ([\d,]+) : ([\d,]+) \|",
        table,
        re.MULTILINE,
    )
    middle, step, per = 360, 58, 0.12
    parts = [
        text(middle - 8, 24, "broken", 14, "end", BROKEN),
        text(middle + 8, 24, "repaired", 14, "start", REPAIRED),
    ]
    for place, (name, method, *counts) in enumerate(found):
        y = 36 + step * (place // 2) + 22 * (place % 2)
        gained, lost = (int(count.replace(",", "")) for count in counts)
        faint = 0.45 if method == "fine-tuning" else 1
        for x, n, color in ((middle, gained, REPAIRED), (middle - per * lost, lost, BROKEN)):
            area = f'x="{x:g}" y="{y}" width="{per * n:g}" height="19"'
            parts.append(f'<rect {area} fill="{color}" opacity="{faint}"/>')
        parts.append(
            text(
                middle + per * gained + 6, y + 14, f"{counts[0]} : {counts[1]}", 12, "start", "#555"
            )
        )
        parts += [] if place % 2 else [text(196, y + 27, name, 14, "end")]
    y = 36 + step * (len(found) // 2) + 12
    parts.append(
        text(middle, y, "upper bars, pale: fine-tuning; lower bars: the default", 13, color="#555")
    )
    return picture(
        830, y + 14, "Unseen samples that fine-tuning and the default repair and break", *parts
    )


if __name__ == "__main__":
    for draw in (problem, flow, climb, choose, limits, defaults):
        (HERE / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")
