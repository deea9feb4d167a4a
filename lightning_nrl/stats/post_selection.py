"""Choosing one of several candidates by calibration data so that what is said of the chosen one still holds.

`choose` tests candidates against a limit that was fixed before; `limit_after` is the limit that holds of weights which
the data may have chosen. Both are Learn then Test (Angelopoulos et al. 2021), by fixed sequence or by Bonferroni.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_nrl.stats.binomial import (
    binomial_cdf,
    check_confidence,
    check_counts,
    limit_at_level,
    percent_up,
    show_confidence,
)

__all__ = ["Choice", "Selection", "choose", "limit_after"]

ORDERED_LEVEL_SHARE = 0.8
"""The part of what may fail that is given to strengths accepted from weak to strong; the rest to all other weights."""


@dataclass(frozen=True)
class Selection:
    """What say calibration data had in which weights are taken.

    Attributes:
        states: how many sets of weights they might have chosen, in a number fixed before they were looked at; 1: they
            had no say.
        ordered: whether strengths are accepted from weak to strong first, and these states are what there is beside.
        allowed: how many calibration samples might break, a number fixed before they were looked at, if the strength
            taken and all weaker ones of the grid keep within it; else None.
    """

    states: int = 1
    ordered: bool = False
    allowed: int | None = None


@dataclass(frozen=True)
class Choice:
    """Which candidates may be taken, and which one is.

    Attributes:
        limit: on the rate of broken samples, in (0, 1).
        confidence: with which the rates of all accepted candidates are within the limit, in (0, 1).
        p_values: of "this candidate breaks more than the limit", one a candidate.
        accepted: positions of the candidates whose rate is within the limit.
        index: the last accepted one; None if there is none.
    """

    limit: float
    confidence: float
    p_values: tuple[float, ...]
    accepted: tuple[int, ...]
    index: int | None

    def __str__(self) -> str:
        if self.index is None:
            return f"none of {len(self.p_values)} candidates can be said to break at most {percent_up(self.limit)}"
        return (
            f"candidate {self.index + 1} of {len(self.p_values)}; with {show_confidence(self.confidence)} confidence "
            f"it breaks at most {percent_up(self.limit)} of such samples"
        )


def choose(
    broken_counts: Sequence[int], n: int, limit: float, confidence: float = 0.95, ordered: bool = True
) -> Choice:
    """The boldest candidate that can be said to break at most a share `limit`.

    Learn then Test (Angelopoulos et al. 2021). A candidate's p-value is P(Bin(n, limit) <= broken), which is
    1 - confidence or less exactly if its Clopper-Pearson limit is within `limit`. *Ordered*: candidates are tested one
    after another, and the first one that fails ends it (fixed-sequence testing). For anything to be wrong, the first
    candidate whose true rate is above the limit must pass by chance, and the probability of that is at most
    1 - confidence, however many candidates there are. *Unordered*: every one of C candidates is tested at
    (1 - confidence) / C (Bonferroni).

    Nothing is assumed of how the candidates' counts depend on each other. What holds of the chosen one is the `limit`,
    not its own smaller Clopper-Pearson limit, since it was chosen for its count.

    Args:
        broken_counts: `C` counts, one a candidate, each of the same `n` samples. From the safest to the boldest, in an
            order fixed before anything was counted; if not `ordered`, from the least wanted to the most wanted.
        n: the calibration samples that were right before, from 1 for anything to be accepted.
        limit: on the rate of broken samples, in (0, 1); fixed before anything was counted.
        confidence: in (0, 1).
        ordered: whether the order is one from safe to bold.

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> choose([0, 1, 2, 9], n=900, limit=0.01).index
        2
    """
    level = 1 - check_confidence(confidence)
    check_confidence(limit, "limit")
    counts = [check_counts(broken, n) for broken in broken_counts]
    p_values = tuple(binomial_cdf(k, size, limit) for k, size in counts)
    passes = [p <= (level if ordered else level / len(counts)) for p in p_values]
    end = passes.index(False) if ordered and False in passes else len(passes)
    accepted = tuple(i for i in range(end) if passes[i])
    return Choice(limit, confidence, p_values, accepted, accepted[-1] if accepted else None)


def limit_after(broken: int, n: int, selection: Selection, confidence: float) -> float:
    """An upper limit in (0, 1] on the rate of broken samples, of weights that calibration data may have chosen.

    Let a = 1 - confidence be what may fail. Where the data had no say, the limit is that of Clopper and Pearson at the
    level a. Where they chose one of C sets of weights, each is given a / C (Bonferroni).

    Where a limit of k broken samples was set, strengths are accepted one after the other from weak to strong while k at
    most break. That is fixed-sequence testing of "more than the rate r break", r being the limit of Clopper and Pearson
    of k: the p-value P(Bin(n, r) <= broken) is within the level exactly where no more than k broke (Learn then Test;
    see `lightning_nrl.stats.choose`). These have four fifths of a together, and r is what holds of them; all else that
    might have been taken, such as polished weights, shares the last fifth.

    Args:
        broken: calibration samples that the chosen weights break.
        n: calibration samples that were right before.
        selection: what say they had.
        confidence: in (0, 1).
    """
    level = 1 - confidence
    if selection.allowed is not None:
        return limit_at_level(min(selection.allowed, n), n, level * ORDERED_LEVEL_SHARE)
    rest = level * (1 - ORDERED_LEVEL_SHARE) if selection.ordered else level
    return limit_at_level(broken, n, rest / selection.states)
