"""What to do about failures, in a sentence or two with the reason in figures."""

from __future__ import annotations

import math

from lightning_nrl.analysis.diagnosis.diagnosis_result import Diagnosis, HeldOutCheck, LayerCapacity
from lightning_nrl.report._formatting import rough_percent, rough_time

__all__ = ["advise"]

DOUBTED_SHARE = 0.2
"""Share of targets with doubtful labels from which on labels come first."""

MIN_EXCHANGE_RATE = 2.0
"""Others repaired for each one broken from which on a repair of the last layer is worth its unseen breaks."""

MAX_CHANGE_RATIO = 4.0
"""Times the easiest layer's change that the last layer may need: both are medians over few targets."""

MAX_SMALL_CHANGE = 0.5
"""A change of a layer by half of its norm is no small one: the first-order figures do not hold there."""


def advise(found: Diagnosis) -> str:
    """The advice. The rules are few and in order: labels, then the last layer, then the network, then data."""
    if not found.known["targeted"]:
        return "Nothing to repair: no failed sample is in the target."
    if not found.known["passed"]:
        return "Get data: no known sample passes, so there is nothing to keep and nothing to compare with."
    if all(math.isnan(target.margin) for target in found.targets):
        return "Use method='auto', which is the swarm here: the task has no margins, so little can be said before."
    n, doubts = found.known["targeted"], len(found.doubts)
    if doubts < max(1, DOUBTED_SHARE * n):
        return _method(found)
    return (
        f"Look at labels first: those of {doubts:,} of {n:,} targets may be wrong, since neighbours and model "
        f"agree on another class. Then: {_method(found)}"
    )


def _method(found: Diagnosis) -> str:
    head, check, best, mixing = found.head, found.check, found.easiest_layer, found.mixing
    times = {cost.method: rough_time(cost.seconds) for cost in found.costs}
    own = next((layer for layer in found.layers if layer.layer == head), None)
    alone, tried = found.count("yes"), len(found.targets) - found.count("not tried")
    near = own is None or best is None or own.change <= MAX_CHANGE_RATIO * best.change
    worth = check is not None and not check.rate < MIN_EXCHANGE_RATE
    last = " ".join((_last_layer(alone, tried, check), _change(own, best))).strip()
    if 2 * alone > tried and near and worth:
        return (
            f"Use method='convex', {times.get('convex', 'seconds')}: the last layer ({head}) is likely to do. {last} "
            f"The default, method='auto', {times['auto']}, changes the whole network and may repair more."
        )
    if best is None:
        return f"Use the default, method='auto', {times['auto']}. {last}".strip()
    if best.change < MAX_SMALL_CHANGE:
        why = f": {_against(head, 2 * alone > tried, worth, check)}" if tried else ""
        return (
            f"Use the default, method='auto', on the whole network, {times['auto']}{why}. {last} "
            f"If one layer must do, take method='linearized' on {best.layer}, {times['linearized']}."
        )
    mixed = ""
    if mixing is not None:
        mixed = f" Of the nearest passed samples, {rough_percent(mixing.mean('targets'))} have a target's label."
    return f"Get more data like the targets and train on it: no layer repairs them by a small change. {last}{mixed}"


def _against(head: str | None, enough: bool, worth: bool, check: HeldOutCheck | None) -> str:
    """Why the last layer is not advised."""
    if not enough:
        return f"the last layer ({head}) is not enough"
    if check is None:
        return f"what the last layer ({head}) would break on other data is not known"
    if not worth:
        return f"the last layer ({head}) would break too much on other data"
    return f"the last layer ({head}) would have to change much more than others"


def _last_layer(alone: int, tried: int, check: HeldOutCheck | None) -> str:
    if not tried:
        return ""
    text = f"One at a time, it can fix {alone:,} of {tried:,} targets at zero known regressions"
    if check is None:
        return f"{text}."
    others = f"repairs {check.repaired:.1f} other targets and breaks {check.broken:.1f} passed samples"
    return f"{text}; on samples held out, fixing one {others}."


def _change(own: LayerCapacity | None, best: LayerCapacity | None) -> str:
    if best is None or best.change == math.inf:
        return ""
    text = f"A typical target needs a change of {best.layer} by {rough_percent(best.change)} of its norm"
    if own is None or own == best:
        return f"{text}."
    if own.change == math.inf:
        return f"{text}; none of {own.layer} does it."
    return f"{text}, of {own.layer} by {rough_percent(own.change)}."
