"""The course of a method: its steps, the rungs of the default, the price of no broken sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_nrl._utils.json_records import OPTIONAL
from lightning_nrl.evaluation.sample_results import TargetCounts

CUT = "cut by `max_time`"
"""Words for a step that ran out of time, in its note; `Step.was_cut` says the same."""


@dataclass(frozen=True)
class Step:
    """A step of a method, such as `fit`.

    Afterwards `repaired` targets pass, and `broken` known passed samples fail. `was_cut` is True if
    `max_time` shortened the step. Steps of the kind `alternative` are results among which
    held-out samples choose; a `sparse` step changed fewer weights than the rungs.
    """

    name: str
    repaired: int
    broken: int
    seconds: float
    note: str = ""
    was_cut: bool = False
    kind: Literal["step", "alternative", "sparse"] = "step"


@dataclass(frozen=True)
class Rung:
    """One rung of the default method, which climbs from one rung to the next.

    `name` is `search` or `exact` (an exact solution) for a change of the chosen layer, `training`
    for further training, `push` for small steps until the targets that are left are right, or
    `polish` in an update. `held_out` counts known samples that the rung did not use, from where it
    starts. It is None if the rung used all known samples. `n_choices` is the number of results
    among which these samples chose, such as rounds of a training. The other counts are of all known
    samples, from the weights before the repair. The repair is the result of the last rung that is
    `kept`.
    """

    name: str
    repaired_in_target: int
    repaired: int
    broken: int
    weights_changed: int
    seconds: float
    held_out: TargetCounts | None = None
    kept: bool = False
    note: str = ""
    n_choices: int = field(default=1, metadata=OPTIONAL)


@dataclass(frozen=True)
class CautionPoint:
    """Counts of held-out samples if the training goes back by the share `caution`.

    They are counted before the held-out samples are used, and before the polish.
    """

    caution: float
    held_out: TargetCounts
    chosen: bool = False


@dataclass(frozen=True)
class PricePoint:
    """The best result if at most the share `allowed` of known passed samples may break.

    Counts are as in `Rung`.
    """

    allowed: float
    broken: int
    repaired_in_target: int
    repaired: int
    held_out: TargetCounts | None = None
