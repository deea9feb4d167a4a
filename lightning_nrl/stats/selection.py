"""Choosing one of several candidates by calibration data so that what is said of the chosen one still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_nrl.stats.binomial import binomial_cdf, check_confidence, check_counts, percent_up, show_confidence

__all__ = ["Choice", "choose"]


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
