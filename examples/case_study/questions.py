"""The paper's research questions, answered from the table of a study: what it found, what is found here, do they agree.

A table is the runs of one experiment, with the columns of `lightning_nrl.sweep`. All counts are of unseen data, as the
paper's figures are, unless *known* is written. Differences between settings are taken within a seed, so that the two
runs of a pair begin alike, and their interval is a bootstrap over the seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, median
from typing import Any

import numpy as np
from grid import LINES, Line
from scipy.stats import bootstrap

from lightning_nrl.bounds import lower_limit, upper_limit
from lightning_nrl.paper import PaperRow

Run = Any
"""A row of the table: `known_broken`, `unseen_repaired` and so on are attributes."""
Tables = Mapping[str, Sequence[Run]]
"""The runs of each experiment."""

SETTING = ("fitness", "alpha", "perfect_intact", "n_weights", "n_passed", "particles")
RESAMPLES = 10_000


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
    """One claim of the paper beside what the table says.

    Attributes:
        question: which of the three.
        paper: the claim.
        found: what the table says, in words and numbers.
        agrees: True, False, or None where the table does not settle it.
    """

    question: str
    paper: str
    found: str
    agrees: bool | None

    def __str__(self) -> str:
        verdict = {True: "yes", False: "no", None: "not settled"}[self.agrees]
        return f"| {self.question} | {self.paper} | {self.found} | {verdict} |"


def answers(tables: Tables) -> tuple[Answer, ...]:
    """An answer to each claim of the paper that the experiments in the table speak of."""
    found = [*levels(tables), *drift(tables)]
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
    settings = [list(own) for _, own in groupby(sorted(runs, key=_setting_key), key=_setting)]
    able = [own for own in settings if any(run.known_repaired for run in own)] or settings
    return min(able, key=lambda own: (fmean(r.known_broken for r in own), -fmean(r.known_repaired for r in own)))


def free(run: Run, role: str) -> bool:
    """Whether a run suppresses regression at the instance level: something repaired, nothing broken."""
    return getattr(run, f"{role}_broken") == 0 and getattr(run, f"{role}_repaired") > 0


def effect(runs: Sequence[Run], axis: str, low: float, high: float, column: str) -> Interval | None:
    """How much more of `column` there is at `high` than at `low`, all else equal, in the mean over pairs of runs.

    Pairs have the same seed and the same setting but for `axis`. The differences are averaged within each seed, and the
    seeds are resampled.

    Returns:
        None if there is no such pair.
    """
    values: dict[tuple, dict[float, float]] = {}
    for run in runs:
        rest = tuple(getattr(run, name) for name in (*SETTING, "seed") if name != axis)
        values.setdefault(rest, {})[getattr(run, axis)] = getattr(run, column)
    seeds: dict[int, list[float]] = {}
    for rest, found in values.items():
        if low in found and high in found:
            seeds.setdefault(rest[-1], []).append(found[high] - found[low])
    return interval([fmean(own) for own in seeds.values()]) if seeds else None


def interval(values: Sequence[float]) -> Interval:
    """The mean of some numbers, and its 95 % bootstrap interval (BCa; Efron 1987)."""
    mean = fmean(values)
    if len(set(values)) == 1:
        return Interval(mean, mean, mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(0)).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def share(runs: Sequence[Run], holds: Callable[[Run], bool]) -> str:
    """How many runs, with the 95 % limits of Clopper and Pearson on the rate."""
    k, n = sum(map(holds, runs)), len(runs)
    low, high = lower_limit(k, n, 0.975), upper_limit(k, n, 0.975)
    return f"{k} of {n} runs ({100 * low:.0f} to {100 * high:.0f} %)"


def levels(tables: Tables) -> list[Answer]:
    """RQ1 and RQ2: at which level regression is suppressed, by the setting that breaks the fewest known samples."""
    found = []
    for experiment, runs in tables.items():
        question = "RQ2" if experiment == "C" else "RQ1"
        best = fewest_broken(runs)
        gain = interval([100 * (run.unseen_accuracy_after - run.unseen_accuracy_before) for run in best])
        able = [run for run in runs if run.unseen_repaired]
        found.append(
            Answer(
                question,
                f"{experiment}: suppressed at the level of accuracy",
                f"{best[0].setting}: {gain:.2f} points of accuracy, not below in {share(best, _no_worse)}; "
                f"of all runs that repair something in {share(able, _no_worse)}",
                gain.mean >= 0,
            )
        )
        claimed = experiment != "A"
        both = [run for run in runs if free(run, "known") and free(run, "unseen")]
        reached = all(run.unseen_broken == 0 for run in best) and any(run.unseen_repaired for run in best)
        found.append(
            Answer(
                question,
                f"{experiment}: {'suppressed' if claimed else 'not suppressed'} at the level of instances"
                + (", with 0 or 1 repairs" if claimed else ""),
                f"{best[0].setting}: {fmean(r.known_broken for r in best):.1f} known and "
                f"{fmean(r.unseen_broken for r in best):.1f} unseen broken; nothing broken and something repaired on "
                f"known data in {share(runs, lambda r: free(r, 'known'))} of all settings, there and on unseen data in "
                f"{share(runs, lambda r: free(r, 'known') and free(r, 'unseen'))}{_repairs(both)}",
                reached == claimed,
            )
        )
    return found


def drift(tables: Tables) -> list[Answer]:
    """RQ2: whether fewer are repaired with drift, by the settings that break the fewest known samples of B and of C."""
    if not {"B", "C"} <= set(tables):
        return []
    rates = {
        name: interval([100 * run.known_repaired_in_target / run.known_targeted for run in fewest_broken(tables[name])])
        for name in "BC"
    }
    words = "; ".join(f"{name}: {r.mean:.1f} % [{r.low:.1f}, {r.high:.1f}]" for name, r in rates.items())
    fewer, more = rates["C"].high < rates["B"].low, rates["C"].low > rates["B"].high
    agrees = True if fewer else False if more else None
    return [Answer("RQ2", "fewer repairs in C than in B", f"targets repaired where the fewest break: {words}", agrees)]


def intact_weight(experiment: str, runs: Sequence[Run], line: Line) -> Answer | None:
    """RQ3: from the smallest alpha to the largest."""
    broken, repaired, known = _effects(runs, line.axis, line.values[0], line.values[-1])
    if broken is None:
        return None
    settled = broken.sign and repaired.sign
    return Answer(
        "RQ3",
        f"{experiment}: a larger alpha breaks fewer and repairs fewer",
        f"alpha {line.values[0]} to {line.values[-1]}: {broken} broken, {repaired} repaired; known {known} broken",
        (broken.sign, repaired.sign) == (-1, -1) if settled else None,
    )


def positive_samples(experiment: str, runs: Sequence[Run], line: Line) -> Answer | None:
    """RQ3: from 500 to 1000 passed samples."""
    broken, repaired, known = _effects(runs, line.axis, line.values[0], line.values[-1])
    if broken is None:
        return None
    return Answer(
        "RQ3",
        f"{experiment}: more passed samples, more broken",
        f"#pos {line.values[0]} to {line.values[-1]}: {broken} broken, {repaired} repaired; known {known} broken",
        broken.sign == 1 if broken.sign else None,
    )


def localised_weights(experiment: str, runs: Sequence[Run], line: Line) -> Answer | None:
    """RQ3: of the rows of C, the one with 32 weights breaks the fewest; with half as many more break."""
    own = [run for row in line.settings(experiment) for run in like(runs, row)]
    few, some, *_, most = line.values
    less, more = (effect(own, line.axis, some, other, "unseen_broken") for other in (few, most))
    if less is None or more is None:
        return None
    return Answer(
        "RQ3",
        f"{experiment}: some weights are needed ({few} break more than {some}), more do not help",
        f"beside {some} weights: {less} broken with {few}, {more} with {most}",
        (less.sign, more.sign >= 0) == (1, True) if less.sign else None,
    )


def _no_worse(run: Run) -> bool:
    """Whether a run suppresses regression at the level of accuracy."""
    return run.unseen_accuracy_after >= run.unseen_accuracy_before


def _effects(runs: Sequence[Run], axis: str, low: float, high: float) -> list[Interval | None]:
    return [effect(runs, axis, low, high, name) for name in ("unseen_broken", "unseen_repaired", "known_broken")]


def _repairs(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    counts = [run.known_repaired_in_target for run in runs]
    return f", with {median(counts):g} known targets repaired in the median, {max(counts)} at most"


def _setting(run: Run) -> tuple:
    return tuple(getattr(run, name) for name in SETTING)


def _setting_key(run: Run) -> tuple:
    return tuple(
        (value is not None, value or 0) if name != "fitness" else value
        for name, value in zip(SETTING, _setting(run), strict=True)
    )
