"""The paper's research questions, answered from the table of a study: what it found, what is found here, do they agree.

A table is the runs of one experiment, as a sweep gives them. All counts are of unseen data, as the
paper's figures are, unless *known* is written. Differences between settings are taken within a seed, so that the two
runs of a pair begin alike, and their interval is that of the mean over seeds.
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

from lightning_nrl.analysis.sweep import Run
from lightning_nrl.pipeline import TABLE_II, PaperRow
from lightning_nrl.report.stats import lower_limit, upper_limit

Tables = Mapping[str, Sequence[Run]]
"""The runs of each experiment."""

SETTING = ("fitness", "alpha", "perfect_intact", "n_weights", "n_passed", "particles")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the 95 % interval of it."""

    mean: float
    low: float
    high: float

    def __format__(self, how: str) -> str:
        return "{:+{how}} [{:+{how}}, {:+{how}}]".format(self.mean, self.low, self.high, how=how or ".1f")

    @property
    def sign(self) -> int:
        """1 if the interval lies above 0, -1 if below, 0 if 0 is in it."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Answer:
    """A claim of the paper beside what the table says; `agrees` is None where that does not settle it."""

    question: str
    paper: str
    found: str
    agrees: bool | None

    def __str__(self) -> str:
        verdict = {True: "yes", False: "no", None: "not settled"}[self.agrees]
        return f"| {self.question} | {self.paper} | {self.found} | {verdict} |"


def answers(tables: Tables) -> tuple[Answer, ...]:
    """An answer to each claim of the paper that the experiments in the tables speak of."""
    found = [answer for name, runs in tables.items() for answer in levels(name, runs)]
    found += drift(tables)
    for line, ask in zip(LINES, (intact_weight, positive_samples, localised_weights), strict=True):
        for experiment, runs in tables.items():
            answer = ask(experiment, runs, line)
            found += [] if answer is None else [answer]
    return tuple(found)


def page(found: Sequence[Answer]) -> str:
    """Answers as a table in markdown."""
    return "\n".join(["| | the paper | here | agrees |", "|---|---|---|---|", *map(str, found)]) + "\n"


def like(runs: Sequence[Run], row: PaperRow) -> list[Run]:
    """The runs of one setting, by rising seed."""
    wanted = (row.equation, row.alpha, row.perfect_intact, row.n_weights, row.n_passed, row.particles)
    return sorted((run for run in runs if _setting(run) == wanted), key=lambda run: run.seed)


def fewest_broken(runs: Sequence[Run]) -> list[Run]:
    """The runs of the paper's *minimum regression case*, found on known data.

    Of the settings that repair something in the mean, the one that breaks the fewest known samples in the mean; among
    equals the one that repairs more.
    """
    settings = list(_by_setting(runs).values())
    able = [own for own in settings if any(run.known.repaired for run in own)] or settings
    return min(able, key=lambda own: (fmean(r.known.broken for r in own), -fmean(r.known.repaired for r in own)))


def effect(runs: Sequence[Run], axis: str, low: float, high: float, column: str) -> Interval | None:
    """How much more of a count, such as `known.broken`, there is at `high` than at `low`, all else equal, in the mean.

    The differences are averaged within each seed, so that each seed is one observation. None if there is no pair.
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
    """The mean of some numbers, and its 95 % interval by Student's t; of a single number none is known (NaN)."""
    mean, n = fmean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def share(runs: Sequence[Any], holds: Callable[[Any], bool]) -> str:
    """How many runs, with the 95 % limits of Clopper and Pearson on the rate."""
    k, n = sum(map(holds, runs)), len(runs)
    low, high = lower_limit(k, n, 0.975), upper_limit(k, n, 0.975)
    return f"{k} of {n} runs ({100 * low:.0f} to {100 * high:.0f} %)"


def levels(experiment: str, runs: Sequence[Run]) -> list[Answer]:
    """RQ1 and RQ2: at which level regression is suppressed.

    The level of accuracy is that of the setting that breaks the fewest known samples; it is reached if the interval of
    its mean gain lies above 0, and not if it lies below. The level of instances is reached
    if there is a setting none of whose runs breaks an unseen sample of the target, and that repairs one.
    """
    question = "RQ2" if experiment == "C" else "RQ1"
    best = fewest_broken(runs)
    gain = interval([100 * (run.unseen.accuracy_after - run.unseen.accuracy_before) for run in best])
    able = [run for run in runs if run.unseen.repaired]
    accuracy = Answer(
        question,
        f"{experiment}: suppressed at the level of accuracy",
        f"{best[0].setting}: {gain:.2f} points of accuracy, not below in {share(best, _no_worse)}; of all that repair "
        f"something in {share(able, _no_worse)}",
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
        f"of the unseen target nothing is broken and something repaired in {share(runs, _spared)}, and in all runs "
        f"of {len(clean)} of {len(settings)} settings; the fewest by {fewest}: "
        f"{broken[fewest]:.1f} broken, {repaired[fewest]:.1f} repaired. Of all known "
        f"samples nothing is broken and something repaired in {share(runs, lambda run: run.regression_free)}",
        bool(clean) == claimed,
    )
    return [accuracy, instances]


def drift(tables: Tables) -> list[Answer]:
    """RQ2: whether a smaller share of the known targets is repaired with drift.

    By one setting, which breaks the fewest samples of B, and by each experiment's own rows of Table II.
    """
    if not {"B", "C"} <= set(tables):
        return []
    names = {run.setting for run in tables["C"]}
    best = fewest_broken([run for run in tables["B"] if run.setting in names])
    same = {"B": best, "C": [run for run in tables["C"] if run.setting == best[0].setting]}
    own = {
        name: [run for row, setting in TABLE_II.items() if row[4] == name for run in like(tables[name], setting)]
        for name in "BC"
    }
    found = [_rarer("fewer repairs in C than in B", best[0].setting, same)]
    return [*found, _rarer("the same, each by its own rows", "means of the rows", own)] if all(own.values()) else found


def _rarer(claim: str, by: str, runs: Tables) -> Answer:
    """Whether repairs are rarer in C; a seed's mean over its settings is one observation."""
    rates = {}
    for name, own in runs.items():
        seeds: dict[int, list[float]] = {}
        for run in own:
            seeds.setdefault(run.seed, []).append(100 * run.known.repaired_in_target / run.known.targeted)
        rates[name] = interval([fmean(shares) for shares in seeds.values()])
    words = "; ".join(f"{name}: {r.mean:.1f} % [{r.low:.1f}, {r.high:.1f}]" for name, r in rates.items())
    fewer, more = rates["C"].high < rates["B"].low, rates["C"].low > rates["B"].high
    agrees = True if fewer else False if more else None
    return Answer("RQ2", claim, f"{by}: of the known targets are repaired in {words}", agrees)


def intact_weight(experiment: str, runs: Sequence[Run], line: Line) -> Answer | None:
    """RQ3: between the alphas of the paper, and from a smaller one."""
    (low, high), least = line.ends, line.values[0]
    broken, repaired, words = _effects(runs, line.axis, low, high)
    if broken is None or repaired is None:
        return None
    wider, _, more = _effects(runs, line.axis, least, high)
    settled = broken.sign and repaired.sign
    return Answer(
        "RQ3",
        f"{experiment}: a larger alpha breaks fewer and repairs fewer",
        f"alpha {low} to {high}: {words}" + (f". Alpha {least} to {high}: {more}" if wider else ""),
        (broken.sign, repaired.sign) == (-1, -1) if settled else None,
    )


def positive_samples(experiment: str, runs: Sequence[Run], line: Line) -> Answer | None:
    """RQ3: from 500 to 1000 passed samples, where regressions are weighed (not under perfect intact)."""
    few, many = line.ends
    weighed = [run for run in runs if not run.perfect_intact]
    broken, _, words = _effects(weighed, line.axis, few, many)
    if broken is None:
        return None
    counts = (fmean(r.n_passed - r.intact for r in weighed if r.n_passed == n) for n in (few, many))
    sampled = " and ".join(f"{n:.1f}" for n in counts)
    strict = effect([run for run in runs if run.perfect_intact], line.axis, few, many, "known.broken")
    return Answer(
        "RQ3",
        f"{experiment}: more passed samples, more broken",
        f"#pos {few} to {many}: {words}; of the sampled ones {sampled} broken"
        + (f"; under perfect intact known {strict} broken" if strict else ""),
        broken.sign == 1 if broken.sign else None,
    )


def localised_weights(experiment: str, runs: Sequence[Run], line: Line) -> Answer | None:
    """RQ3: of the rows of C, the one with 32 weights breaks the fewest; with half as many more break."""
    own = [run for row in line.settings(experiment) for run in like(runs, row)]
    (few, most), some = line.ends, line.values[1]
    less, more = (effect(own, line.axis, some, other, "unseen.broken") for other in (few, most))
    if less is None or more is None:
        return None
    return Answer(
        "RQ3",
        f"{experiment}: some weights are needed ({few} break more than {some}), more do not help",
        f"beside {some} weights: {less} broken with {few}, {more} with {most}",
        (less.sign, more.sign >= 0) == (1, True) if less.sign else None,
    )


def _spared(run: Run) -> bool:
    """True if a run suppresses regression at the level of instances: of the unseen samples of the target."""
    counts = run.counts("unseen")
    return counts.broken_in_target == 0 and counts.repaired_in_target > 0


def _no_worse(run: Run) -> bool:
    """Whether a run suppresses regression at the level of accuracy."""
    return run.unseen.accuracy_after >= run.unseen.accuracy_before


def _effects(runs: Sequence[Run], axis: str, low: float, high: float) -> tuple[Interval | None, Interval | None, str]:
    """Unseen broken and repaired, and both in words with known broken."""
    broken, repaired, known = (
        effect(runs, axis, low, high, name) for name in ("unseen.broken", "unseen.repaired", "known.broken")
    )
    return broken, repaired, f"{broken} broken, {repaired} repaired; known {known} broken"


def _by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    return settings


def _setting(run: Run) -> tuple:
    return tuple(getattr(run, name) for name in SETTING)
