"""Runs of the default repair and of what it is compared with, as Markdown tables with verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import numpy as np
from default_records import Run

from lightning_nrl.stats import lower_limit, upper_limit

BROKEN_LIMIT = 0.6
"""Unseen samples that the default may break, as a share of what fine-tuning breaks."""
TIME_LIMIT, SHORT_TIME_LIMIT, SHORT_FIT = 1.5, 2.0, 2.0
"""The default's time, as a multiple of fine-tuning's; the second where a fit takes under so many seconds."""
REPAIRS_SHARE, POINTS_SHARE = 0.85, 0.8
"""What another fit must reach of the repairs and points of the owner's training in the same seconds."""
AUGMENTED_SHARE, AUGMENTED_TIME_LIMIT = 0.9, 1.3
"""What augmentation in the data set must reach of that in `training_step`, and in which multiple of its time."""
ESTIMATE_FACTOR = 1.5
"""Within this factor an estimate of unseen data agrees with what happened."""

Counts = tuple[int, int, int, int]
"""Repaired, of how many failures, and broken, of how many that passed."""

Runs = Mapping[str, Sequence[Run]]
"""By method, one run a seed, the same seeds in all."""


def compared(problems: Mapping[str, Runs]) -> str:
    """The methods of each problem, then all problems together, then the verdicts."""
    rows = [[name, *_row(method, runs)] for name, methods in problems.items() for method, runs in methods.items()]
    methods = next(iter(problems.values()))
    pooled = {method: [run for runs in problems.values() for run in runs[method]] for method in methods}
    rows += [["**all**", *_row(method, runs)] for method, runs in pooled.items()]
    parts = [
        _table(("problem", *HEADS), rows),
        _verdicts({**problems, "**all**": pooled}),
        _estimates(pooled["default"]),
    ]
    return "\n\n".join(part for part in parts if part)


def fitted(name: str, fits: Runs, fine_tuning: Mapping[str, Sequence[Run]]) -> str:
    """The default after each fit, beside fine-tuning of the weights that this fit's training gave."""
    rows = []
    for fit, runs in fits.items():
        tuned, reason = fine_tuning[fit], _fit_verdict(fit, fits)
        fewer = sum(run.accuracy_after < other.accuracy_after for run, other in zip(runs, tuned, strict=True))
        rows.append([*_row(fit, runs), f"{_accuracy(runs):.2f}", f"{_accuracy(tuned):.2f}", f"{fewer}", reason])
    heads = (*HEADS, "accuracy, %", "of fine-tuning", "seeds with less", "verdict")
    return f"{name}\n\n{_table(('fit', *heads[1:]), rows)}"


def timed(name: str, runs: Runs) -> str:
    """The default in shares of the seconds of the fit."""
    return f"{name}\n\n{_table(('time', *HEADS[1:]), [_row(method, found) for method, found in runs.items()])}"


HEADS = (
    *("method", "targets repaired", "known broken, worst", "unseen repaired : broken", "ratio"),
    *("points", "worst", "seconds", "processor seconds", "x the fit's"),
)


def _row(method: str, runs: Sequence[Run]) -> list[str]:
    unseen = _sum(runs, lambda run: run.unseen_repaired), _sum(runs, lambda run: run.unseen_broken)
    points = [run.points for run in runs]
    processor = mean(run.seconds.processor for run in runs)
    return [
        method,
        f"{_sum(runs, lambda run: run.repaired):.0f} of {_sum(runs, lambda run: run.targeted):.0f}",
        f"{max(run.known_broken for run in runs)}",
        f"{unseen[0]:.0f} : {unseen[1]:.0f}",
        f"{unseen[0] / max(unseen[1], 1):.1f}",
        f"{mean(points):+.2f}",
        f"{min(points):+.2f}",
        f"{mean(run.seconds.wall for run in runs):.1f}",
        f"{processor:.1f}",
        f"{processor / mean(run.fit.processor for run in runs):.2f}",
    ]


def _verdicts(problems: Mapping[str, Runs]) -> str:
    """Each problem's mean against fine-tuning's; what misses a limit is bold."""
    rows = []
    for name, methods in problems.items():
        default, tuned = methods["default"], methods["fine-tuning"]
        apart = [run.points - other.points for run, other in zip(default, tuned, strict=True)]
        points = mean(apart)
        broken = _ratio(default, tuned, lambda run: run.unseen_broken)
        time = _ratio(default, tuned, lambda run: run.seconds.processor)
        fit = mean(run.fit.processor for run in default)
        limit = SHORT_TIME_LIMIT if fit < SHORT_FIT else TIME_LIMIT
        known = max(run.known_broken for run in default)
        checks = (
            (f"{points:+.2f}", points >= 0),
            (f"{broken:.2f}", broken <= BROKEN_LIMIT),
            (f"{time:.2f} of {limit:g}", time <= limit),
            (f"{known}", known == 0),
        )
        held = all(good for _, good in checks)
        accuracy = 100 * mean(run.train_accuracy for run in default)
        cells = [text if good else f"**{text}**" for text, good in checks]
        cells.insert(1, f"{min(apart):+.2f}")
        rows.append([name, f"{accuracy:.1f}", f"{fit:.1f}", *cells, "holds" if held else "**missed**"])
    heads = (
        *("problem", "train accuracy, %", "the fit, s", "points beside fine-tuning's", "worst seed"),
        *("unseen broken, share of its", "time, multiple of its", "known broken, worst", "verdict"),
    )
    return _table(heads, rows)


def _estimates(runs: Sequence[Run]) -> str:
    """How well estimates from held-out data agree with what happened; empty where reports have none."""
    rows, agreeing, possible, covered = [], 0, 0.0, [0, 0]
    random = np.random.default_rng(0)
    for run in runs:
        if run.held_out is None:
            continue
        failures = round(run.unseen * (1 - run.accuracy_before))
        happened = (run.unseen_repaired, failures, run.unseen_broken, run.unseen - failures)
        agrees = bool(_agrees(np.array(run.held_out), happened))
        agreeing += agrees
        possible += _agrees(_drawn(random, run.held_out, happened), happened).mean()
        cells = []
        for i in (0, 2):
            low, high = lower_limit(*run.held_out[i : i + 2]), upper_limit(*run.held_out[i : i + 2])
            rate = happened[i] / max(happened[i + 1], 1)
            covered[i // 2] += low <= rate <= high
            cells += [f"{run.held_out[i]} of {run.held_out[i + 1]}", f"{100 * low:.1f} to {100 * high:.1f}"]
            cells.append(f"{100 * rate:.1f}" if low <= rate <= high else f"**{100 * rate:.1f}**")
        rows.append([run.name, f"{run.seed}", *cells, "yes" if agrees else "no"])
    if not rows:
        return ""
    heads = (
        *("problem", "seed", "held out: repaired", "90 %, in %", "unseen: repaired, %"),
        *("held out: broken", "90 %, in %", "unseen: broken, %", f"within {ESTIMATE_FACTOR:g} x"),
    )
    n = len(rows)
    return (
        f"{_table(heads, rows)}\n\nBoth rates within a factor of {ESTIMATE_FACTOR:g} in {agreeing} of {n} runs; "
        f"as many held-out samples with the rates of the unseen ones would be in {possible:.1f} in the mean. The "
        f"unseen rate is in the interval for repaired samples in {covered[0]}, for broken ones in {covered[1]} of {n}."
    )


def _drawn(random: np.random.Generator, held_out: Counts, happened: Counts, times: int = 2000) -> np.ndarray:
    """Counts of as many held-out samples as there were, if their rates were those of the unseen ones: `times x 4`."""
    columns = []
    for i in (0, 2):
        n, rate = held_out[i + 1], happened[i] / max(happened[i + 1], 1)
        columns += [random.binomial(n, rate, times), np.full(times, n)]
    return np.stack(columns, 1)


def _agrees(held_out: np.ndarray, happened: Counts) -> np.ndarray:
    """Whether both rates are within the factor, or less than one unseen sample apart; `held_out` is `... x 4`."""
    agree = np.ones(held_out.shape[:-1], dtype=bool)
    for i in (0, 2):
        k, n = happened[i], max(happened[i + 1], 1)
        expected = held_out[..., i] / np.maximum(held_out[..., i + 1], 1) * n
        low, high = np.minimum(expected, k), np.maximum(expected, k)
        agree &= (high <= ESTIMATE_FACTOR * low) | (high - low < 1)
    return agree


def _fit_verdict(fit: str, fits: Runs) -> str:
    """What a fit reaches of the one that it is measured against; empty for those that are measured against."""
    runs = fits[fit]
    if fit == "augmented-data":
        against = fits.get("augmented-step", fits.get("owner"))
        repairs, gained, limit = AUGMENTED_SHARE, AUGMENTED_SHARE, AUGMENTED_TIME_LIMIT
    elif fit in ("owner", "owner, limited", "augmented-step"):
        return ""
    else:
        against, repairs, gained, limit = fits.get("owner, limited"), REPAIRS_SHARE, POINTS_SHARE, None
    if against is None:
        return ""
    repaired = _ratio(runs, against, lambda run: run.repaired / max(run.targeted, 1))
    points = _ratio(runs, against, lambda run: run.points)
    time = _ratio(runs, against, lambda run: run.seconds.processor)
    held = repaired >= repairs and points >= gained and (limit is None or time <= limit)
    spent = "" if limit is None else f", {time:.2f} x the time"
    found = f"{100 * repaired:.0f} % of the repairs, {100 * points:.0f} % of the points{spent}"
    return found if held else f"**{found}**"


def _ratio(runs: Sequence[Run], others: Sequence[Run], value: Callable[[Run], float]) -> float:
    below = _sum(others, value)
    above = _sum(runs, value)
    return above / below if below else (1.0 if not above else float("inf"))


def _sum(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    return sum(value(run) for run in runs)


def _accuracy(runs: Sequence[Run]) -> float:
    return 100 * mean(run.accuracy_after for run in runs)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
