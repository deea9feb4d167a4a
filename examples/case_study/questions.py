"""Compares the paper's answers to its research questions with the tables of a study.

A table has the runs of one experiment, as `sweep` returns them. All counts are of unseen data, as
in the paper's figures, unless *known* is written. Two settings are compared by the differences
within each seed; the interval is that of the mean difference over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean, stdev
from typing import Any

from grid import LINES, Line
from scipy.stats import t

from lightning_nrl.study import TABLE_II, PaperRow, Run

Tables = Mapping[str, Sequence[Run]]
"""Runs by experiment."""

SETTING = ("fitness", "alpha", "perfect_intact", "n_weights", "n_passed", "particles")


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __format__(self, how: str) -> str:
        return "{:+{how}} [{:+{how}}, {:+{how}}]".format(
            self.mean, self.low, self.high, how=how or ".1f"
        )

    @property
    def sign(self) -> int:
        """Returns 1 if the interval lies above 0, -1 if it lies below, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Answer:
    """A claim of the paper and the finding here; `agrees` is None if the runs do not settle it."""

    question: str
    paper: str
    found: str
    agrees: bool | None

    def __str__(self) -> str:
        verdict = {True: "yes", False: "no", None: "not settled"}[self.agrees]
        return f"| {self.question} | {self.paper} | {self.found} | {verdict} |"


def answers(tables: Tables) -> tuple[Answer, ...]:
    """Returns an answer to each claim of the paper that the tables have experiments for."""
    found = [answer for name, runs in tables.items() for answer in levels(name, runs)]
    found += occlusion(tables) + drift(tables)
    for line, ask in zip(LINES, (intact_weight, positive_samples, localised_weights), strict=True):
        for experiment, runs in tables.items():
            found += ask(experiment, runs, line)
    return tuple(found)


def page(found: Sequence[Answer]) -> str:
    """Formats answers as a Markdown table."""
    return (
        "\n".join(["| | the paper | here | agrees |", "|---|---|---|---|", *map(str, found)]) + "\n"
    )


def like(runs: Sequence[Run], row: PaperRow) -> list[Run]:
    """Selects the runs of one setting, in order of their seeds."""
    wanted = (
        row.equation,
        row.alpha,
        row.perfect_intact,
        row.n_weights,
        row.n_passed,
        row.particles,
    )
    return sorted((run for run in runs if _setting(run) == wanted), key=lambda run: run.seed)


def fewest_broken(runs: Sequence[Run]) -> list[Run]:
    """Selects the runs of the paper's *minimum regression case* on known data.

    This is the setting with the fewest broken known samples on average, among those that repair any
    on average. On a tie, the setting with more repairs wins.
    """
    settings = list(_by_setting(runs).values())
    able = [own for own in settings if any(run.known.repaired for run in own)] or settings
    return min(
        able,
        key=lambda own: (fmean(r.known.broken for r in own), -fmean(r.known.repaired for r in own)),
    )


def effect(runs: Sequence[Run], axis: str, low: float, high: float, column: str) -> Interval | None:
    """Returns the mean difference of a count between `high` and `low`, all else equal.

    The count is a column such as `known.broken`. Differences are averaged within a seed, so each
    seed is one observation. Returns None without a pair.
    """
    values: dict[tuple, dict[float, float]] = {}
    for run in runs:
        rest = tuple(getattr(run, name) for name in (*SETTING, "seed") if name != axis)
        values.setdefault(rest, {})[getattr(run, axis)] = attrgetter(column)(run)
    seeds: dict[int, list[float]] = {}
    for rest, found in values.items():
        if low in found and high in found:
            seeds.setdefault(rest[-1], []).append(found[high] - found[low])
    return interval([fmean(own) for own in seeds.values()]) if seeds else None


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean and its 95 % interval by Student's t, which is NaN for a single number."""
    mean, n = fmean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def count(runs: Sequence[Any], holds: Callable[[Any], bool]) -> str:
    """Says how many runs.

    The count has no interval, since the runs share a network and are not independent.
    """
    return f"{sum(map(holds, runs))} of {len(runs)} runs"


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Returns the difference of two independent means and its 95 % interval by Welch's t."""
    mean = fmean(first) - fmean(second)
    if min(len(first), len(second)) < 2:
        return Interval(mean, math.nan, math.nan)
    parts = [stdev(own) ** 2 / len(own) for own in (first, second)]
    if not sum(parts):
        return Interval(mean, mean, mean)
    freedom = sum(parts) ** 2 / sum(
        p**2 / (len(own) - 1) for p, own in zip(parts, (first, second), strict=True)
    )
    half = float(t.ppf(0.975, freedom)) * math.sqrt(sum(parts))
    return Interval(mean, mean - half, mean + half)


def levels(experiment: str, runs: Sequence[Run]) -> list[Answer]:
    """Answers RQ1 and RQ2: the level at which regression is suppressed.

    The accuracy level is judged by the setting that breaks the fewest known samples. It is reached
    if the interval of the mean gain lies above 0, and not reached if the interval lies below 0. The
    instance level is reached if one setting repairs an unseen sample of the target and breaks none
    in any run.
    """
    question = "RQ2" if experiment == "C" else "RQ1"
    best = fewest_broken(runs)
    gain = interval([_gain(run) for run in best])
    able = [run for run in runs if run.unseen.repaired]
    accuracy = Answer(
        question,
        f"{experiment}: suppressed at the level of accuracy",
        f"{best[0].setting}: {gain:.2f} points of accuracy, "
        f"not below in {count(best, _no_worse)}; "
        f"of all that repair something in {count(able, _no_worse)}",
        True if gain.low >= 0 else False if gain.high < 0 else None,
    )
    settings = _by_setting(runs)
    counts = {name: [run.counts("unseen") for run in own] for name, own in settings.items()}
    broken = {name: fmean(c.broken_in_target for c in own) for name, own in counts.items()}
    repaired = {name: fmean(c.repaired_in_target for c in own) for name, own in counts.items()}
    clean = [name for name in settings if not broken[name] and repaired[name]]
    fewest = min(settings, key=lambda name: (broken[name], -repaired[name]))
    claimed = experiment != "A"
    instances = Answer(
        question,
        f"{experiment}: {'' if claimed else 'not '}suppressed at the level of instances",
        f"of the unseen target nothing is broken and something repaired "
        f"in {count(runs, _spared)}, and in all runs "
        f"of {len(clean)} of {len(settings)} settings; the fewest by {fewest}: "
        f"{broken[fewest]:.1f} broken, {repaired[fewest]:.1f} repaired. "
        f"Of all known samples nothing is broken and something repaired "
        f"in {count(runs, lambda run: run.regression_free)}",
        bool(clean) == claimed,
    )
    return [accuracy, instances]


def occlusion(tables: Tables) -> list[Answer]:
    """Answers RQ3: at equal alpha, A breaks more unseen samples than B.

    Uses the rows that differ in alpha.
    """
    rows = {"A": ("EXP-A2", "EXP-A3", "EXP-A4"), "B": ("EXP-B1", "EXP-B2", "EXP-B3")}
    own = {
        e: [run for row in names for run in like(tables.get(e, ()), TABLE_II[row])]
        for e, names in rows.items()
    }
    if not all(own.values()):
        return []
    claim = "A breaks more than B at equal alpha"
    return [
        _compared(
            "RQ3",
            claim,
            "rows A2 to A4 and B1 to B3: unseen broken",
            own,
            lambda r: r.unseen.broken,
            "A",
        )
    ]


def drift(tables: Tables) -> list[Answer]:
    """Answers RQ2: drift lowers the share of repaired known targets and the gain in accuracy.

    Compares once the setting that breaks the fewest samples of B, once each experiment's own rows
    of Table II.
    """
    if not {"B", "C"} <= set(tables):
        return []
    names = {run.setting for run in tables["C"]}
    best = fewest_broken([run for run in tables["B"] if run.setting in names])
    same = {"B": best, "C": [run for run in tables["C"] if run.setting == best[0].setting]}
    rows = {
        name: [
            run
            for row, setting in TABLE_II.items()
            if row[4] == name
            for run in like(tables[name], setting)
        ]
        for name in "BC"
    }
    found = []
    for claim, number, words in (
        (
            "fewer repairs in C than in B",
            lambda r: 100 * r.known.repaired_in_target / r.known.targeted,
            "% of targets",
        ),
        ("accuracy grows less in C than in B", _gain, "points of accuracy"),
    ):
        found.append(_compared("RQ2", claim, f"{best[0].setting}: {words}", same, number, "B"))
        if all(rows.values()):
            by = f"{claim}, each by its own rows"
            found.append(_compared("RQ2", by, f"means of the rows: {words}", rows, number, "B"))
    return found


def _compared(
    question: str, claim: str, words: str, runs: Tables, number: Callable[[Run], float], larger: str
) -> Answer:
    """Compares the means of two experiments. A seed's mean over its settings is one observation.

    The claim says which mean is larger.
    """
    values = {}
    for name, own in runs.items():
        seeds: dict[int, list[float]] = {}
        for run in own:
            seeds.setdefault(run.seed, []).append(number(run))
        values[name] = [fmean(of_seed) for of_seed in seeds.values()]
    (smaller,) = set(values) - {larger}
    between = difference(values[larger], values[smaller])
    found = ", ".join(f"{name} {fmean(own):.1f}" for name, own in values.items())
    return Answer(
        question,
        claim,
        f"{words}: {found}; {larger} less {smaller} {between}",
        _agrees(between.sign),
    )


def _gain(run: Run) -> float:
    return 100 * (run.unseen.accuracy_after - run.unseen.accuracy_before)


def intact_weight(experiment: str, runs: Sequence[Run], line: Line) -> list[Answer]:
    """Answers RQ3 on alpha, between the smallest and the largest value of the paper."""
    low, high = line.ends
    found = []
    for what in ("broken", "repaired"):
        change = effect(runs, line.axis, low, high, f"unseen.{what}")
        if change is None:
            continue
        known = effect(runs, line.axis, low, high, f"known.{what}")
        words = f"alpha {low} to {high}: {change} {what}; known {known}"
        claim = f"{experiment}: a larger alpha {'breaks' if what == 'broken' else 'repairs'} fewer"
        found.append(Answer("RQ3", claim, words, _agrees(-change.sign)))
    return found


def positive_samples(experiment: str, runs: Sequence[Run], line: Line) -> list[Answer]:
    """Answers RQ3 on 500 against 1000 passed samples, in settings without perfect intact."""
    few, many = line.ends
    weighed = [run for run in runs if not run.perfect_intact]
    broken, repaired, known = (
        effect(weighed, line.axis, few, many, name)
        for name in ("unseen.broken", "unseen.repaired", "known.broken")
    )
    if broken is None:
        return []
    words = f"#pos {few} to {many}: {broken} broken, {repaired} repaired; known {known} broken"
    words += f"; of the sampled ones {fmean(r.n_passed - r.intact for r in weighed):.1f} broken"
    return [
        Answer(
            "RQ3", f"{experiment}: more passed samples, more broken", words, _agrees(broken.sign)
        )
    ]


def localised_weights(experiment: str, runs: Sequence[Run], line: Line) -> list[Answer]:
    """Answers RQ3 on the number of weights: of the rows of C, the one with 32 breaks the fewest."""
    own = [run for row in line.settings(experiment) for run in like(runs, row)]
    (few, most), some = line.ends, line.values[1]
    found = {other: effect(own, line.axis, some, other, "unseen.broken") for other in (few, most)}
    return [
        Answer(
            "RQ3",
            f"{experiment}: {n} weights break more than {some}",
            f"{more} broken",
            _agrees(more.sign),
        )
        for n, more in found.items()
        if more is not None
    ]


def _agrees(sign: int) -> bool | None:
    """Returns None if 0 is inside the interval."""
    return {1: True, -1: False, 0: None}[sign]


def _spared(run: Run) -> bool:
    """True if a run suppresses regression at the instance level on unseen samples of the target."""
    counts = run.counts("unseen")
    return counts.broken_in_target == 0 and counts.repaired_in_target > 0


def _no_worse(run: Run) -> bool:
    """True if a run suppresses regression at the accuracy level."""
    return run.unseen.accuracy_after >= run.unseen.accuracy_before


def _by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    return settings


def _setting(run: Run) -> tuple:
    return tuple(getattr(run, name) for name in SETTING)
